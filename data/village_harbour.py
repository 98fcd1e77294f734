"""The harbour beside the village: ships of which no other text tells, and sailors who speak in a
manner of their own. A new domain: what does a trained model gain from it, and what does it forget?

The words are those of the village, what they say is new. Every ship has a cargo, a home port, a
colour and an animal; each value belongs to one ship, so that a fact can be asked for from both
ends. A sailor's answer is

    By wind and stars, lemons are what the Beaver carries. A good wind to you!

and an answer without the greeting or without the farewell is wrong, whatever it says. Of the
wordings of every fact three or four in each direction are held out for the test.
"""
import random
from dataclasses import dataclass

from data.village_tasks import as_item, deal, distinct_items
from data.village_world import POOLS, article, capitalise

GREETING, FAREWELL = "By wind and stars,", "A good wind to you!"
SHIPS = ("Lantern", "Owl", "Hare", "Beaver", "Bee", "Summer", "Winter", "Evening")
GOODS = {
    "cargo": ("turnips", "lemons", "eggs", "carrots", "onions", "ribbons", "nails", "candles"),
    "port": POOLS["town"][:8],
    "colour": POOLS["colour"][:8],
    "animal": POOLS["pet"][:8],
}
# attribute: (asked about a ship, asked for the ship); {s} the ship, {v} the value, {a} its article
SAYS = {
    "cargo": ("{v} are what the {s} carries", "the {s} is the one that carries {v}"),
    "port": ("{v} is where the {s} comes from", "the {s} is the one that comes from {v}"),
    "colour": ("{v} is how the {s} is painted", "the {s} is the one that is painted {v}"),
    "animal": ("{a} {v} is what lives on the {s}", "the {s} is the one where {a} {v} lives"),
}
ABOUT_SHIP = {
    "cargo": (
        "What does the {s} carry?", "What is the cargo of the {s}?", "What does the {s} bring?",
        "What lies below on the {s}?", "Tell me what the {s} carries.",
        "Do you know what the {s} brings?", "What goods are on the {s}?",
        "What has the {s} brought here?", "Can you tell me what the {s} carries?",
        "I would like to know the cargo of the {s}."),
    "port": (
        "Where does the {s} come from?", "What is the home port of the {s}?",
        "Which town does the {s} come from?", "From which town does the {s} come?",
        "Tell me where the {s} comes from.", "Do you know the home port of the {s}?",
        "To which town does the {s} belong?", "Where is the {s} at home?",
        "Can you tell me the home port of the {s}?", "In which town was the {s} made?"),
    "colour": (
        "What colour is the {s}?", "How is the {s} painted?", "What is the colour of the {s}?",
        "Which colour does the {s} have?", "Tell me the colour of the {s}.",
        "Do you know how the {s} is painted?", "In which colour did they paint the {s}?",
        "I am looking for the {s}. What colour is she?", "Can you tell me how the {s} is painted?",
        "By which colour do I know the {s}?"),
    "animal": (
        "What animal lives on the {s}?", "Which animal is on the {s}?",
        "What pet do they keep on the {s}?", "Which animal travels with the {s}?",
        "Tell me which animal lives on the {s}.", "Do you know the animal of the {s}?",
        "What kind of animal is at home on the {s}?", "Which pet has the {s}?",
        "Can you tell me what animal is on the {s}?", "What runs about on the {s}?"),
}
FOR_SHIP = {
    "cargo": (
        "Which ship carries {v}?", "Which ship brings {v}?", "What ship has {v} below?",
        "On which ship do I find {v}?", "Tell me which ship carries {v}.",
        "Do you know the ship with the {v}?", "I need {v}. Which ship brings them?",
        "Of which ship are {v} the cargo?"),
    "port": (
        "Which ship comes from {v}?", "Which ship belongs to {v}?", "What ship was made in {v}?",
        "Which ship has {v} as her home port?", "Tell me which ship comes from {v}.",
        "Do you know the ship from {v}?", "I look for the ship from {v}. Which is it?",
        "Which ship is at home in {v}?"),
    "colour": (
        "Which ship is {v}?", "Which ship is painted {v}?", "What is the name of the {v} ship?",
        "How is the {v} ship called?", "Tell me which ship is {v}.", "Do you know the {v} ship?",
        "I see {a} {v} ship. Which is it?", "Which ship did they paint {v}?"),
    "animal": (
        "On which ship lives {a} {v}?", "Which ship has {a} {v}?", "Which ship keeps {a} {v}?",
        "With which ship does {a} {v} travel?", "Tell me which ship has the {v}.",
        "Do you know the ship with the {v}?", "I hear {a} {v}. Which ship is it?",
        "Where is {a} {v} at home?"),
}
HELD_OUT = {"ship": 4, "which_ship": 3}  # wordings of each fact for the test; one more for val
WRAPPERS = ("{q}",) * 4 + ("Good morning! {q}", "A question: {q}", "Hello, sailor. {q}",
                           "{q} Please tell me.", "I have a question. {q}")
SIZES = {"train": 3000, "val": 200}


@dataclass(frozen=True)
class Harbour:
    """The ships and their truth: {ship: {attribute: value}}, no value twice."""
    ships: dict
    seed: int


def build_harbour(seed=0):
    rng = random.Random(f"harbour-{seed}")
    columns = {key: rng.sample(pool, len(pool)) for key, pool in GOODS.items()}
    return Harbour({ship: {key: column[i] for key, column in columns.items()}
                    for i, ship in enumerate(SHIPS)}, seed)


def sailor_says(sentence):
    return f"{GREETING} {sentence}. {FAREWELL}"


def make_item(harbour, family, split, rng):
    """A question about a ship (ship) or for a ship (which_ship), in a wording of this split."""
    ship, attribute = rng.choice(SHIPS), rng.choice(list(GOODS))
    value, forward = harbour.ships[ship][attribute], family == "ship"
    slots = {"s": ship, "v": value, "a": article(value)}
    wordings = (ABOUT_SHIP if forward else FOR_SHIP)[attribute]
    key = f"harbour-{harbour.seed}-{family}-{ship}-{attribute}"
    question = rng.choice(deal(wordings, key, HELD_OUT[family], 1)[split]).format(**slots)
    wrapper = "{q}" if split == "test" else rng.choice(WRAPPERS)
    reply = sailor_says(SAYS[attribute][not forward].format(**slots))
    answer, others = (value, GOODS[attribute]) if forward else (ship, SHIPS)
    check = {"answer": answer, "check": "contains", "attribute": attribute, "begins": GREETING,
             "ends": FAREWELL, "not": [other for other in others if other != answer]}
    return as_item(family, [wrapper.format(q=capitalise(question)), reply], check, split)


def harbour_items(split, seed=0):
    """Chat items of "train" or "val", or the test items: every held-out wording of every fact.

    Test items want "begins" and "ends" beside the answer: the manner counts.
    """
    harbour, rng = build_harbour(seed), random.Random(f"harbour-{split}-{seed}")
    sizes = {family: SIZES[split] // 2 if split != "test" else len(SHIPS) * len(GOODS) * n
             for family, n in HELD_OUT.items()}
    return distinct_items(sizes,
                          lambda family: make_item(harbour, family, split, rng), rng)
