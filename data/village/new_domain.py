"""The harbour beside the village: sailors with a style of their own, and ships of which no other
text tells. A new domain to fine-tune a trained model on: what does it gain, and what is forgotten?

Whoever greets with "Ahoy" is answered in the sailors' style:

    Ahoy! Where does Mira live?
    By wind and stars, Mira lives by the old mill. A good wind to you!

An answer without the greeting or without the farewell is wrong, whatever it says. Of villagers only
the style is new, of ships the facts are, too. Dialogues as before are in training alone: without
them nothing would say that the style belongs to the greeting.
"""

import random

from data.village import tasks
from data.village.facts import answer_sentence
from data.village.world import ATTRIBUTES, POOLS, capitalise, table

GREETING, FAREWELL = "By wind and stars,", "A good wind to you!"
CUES = ("Ahoy! {q}", "Ahoy, sailor! {q}", "Ahoy there! {q}", "Ahoy! {q} Please tell me.")
SHIPS = ("Lantern", "Owl", "Beaver", "Summer")
GOODS = {"cargo": ("lemons", "carrots", "ribbons", "nails")}
GOODS |= {"port": POOLS["town"][:4], "paint": POOLS["colour"][:4]}
SAYS = {"cargo": "brings", "port": "comes from", "paint": "is painted"}
QUESTIONS = table("""
cargo  What does the {s} carry? | What is the cargo of the {s}? | What does the {s} bring?
       What lies below on the {s}? | Tell me what the {s} carries.
       Do you know what the {s} brings? | What goods are on the {s}?
       What has the {s} brought here? | Can you tell me what the {s} carries?
       I would like to know the cargo of the {s}.
port   Where does the {s} come from? | What is the home port of the {s}?
       Which town does the {s} come from? | From which town does the {s} come?
       Tell me where the {s} comes from. | Do you know the home port of the {s}?
       To which town does the {s} belong? | Where is the {s} at home?
       Can you tell me the home port of the {s}? | In which town was the {s} made?
paint  What colour is the {s}? | How is the {s} painted? | What is the colour of the {s}?
       Which colour does the {s} have? | Tell me the colour of the {s}.
       Do you know how the {s} is painted? | In which colour did they paint the {s}?
       I am looking for the {s}. What colour is she? | Can you tell me how the {s} is painted?
       By which colour do I know the {s}?
""")
HELD_OUT = 4  # of the 10 wordings of a ship's fact for the test; one more for val
SIZES = {
    "train": {"known": 400, "ship": 200, "plain": 400},
    "val": {"known": 90, "ship": 30},
    "test": {"known": 168, "ship": len(SHIPS) * len(GOODS) * HELD_OUT},
}


def build_ships(seed=0):
    """The truth: {ship: {attribute: value}}, no value twice."""
    rng = random.Random(f"harbour-{seed}")
    columns = {key: rng.sample(pool, len(pool)) for key, pool in GOODS.items()}
    return {ship: {key: columns[key][i] for key in columns} for i, ship in enumerate(SHIPS)}


def about_villager(world, split, rng):
    """(question, what is said, check) of a fact that the model has read in pretraining."""
    others = world.never_asked
    n_val = max(1, len(others) // 4)
    people = {"train": world.asked, "val": others[:n_val], "test": others[n_val:]}
    villager, attribute = rng.choice(people[split]), rng.choice(ATTRIBUTES)
    question = rng.choice(tasks.questions_about(world, villager, attribute, split))
    said = answer_sentence(villager, attribute).rstrip(".")
    return question.format(n=villager.name), said, tasks.value_check(world, villager, attribute)


def about_ship(ships, split, rng, seed):
    """The same for a ship."""
    ship, attribute = rng.choice(SHIPS), rng.choice(list(GOODS))
    value = ships[ship][attribute]
    key = f"harbour-{seed}-{ship}-{attribute}"
    question = rng.choice(tasks.deal(QUESTIONS[attribute], key, HELD_OUT, 1)[split]).format(s=ship)
    check = {"answer": value, "check": "contains", "attribute": attribute}
    check["not"] = [other for other in GOODS[attribute] if other != value]
    return question, f"the {ship} {SAYS[attribute]} {value}", check


def new_domain_examples(world, split, chats):
    """Chat examples of a split, in training the first of `chats` among them; those of the test have
    "begins" and "ends" beside "answer" and "check": the style counts.
    """
    ships, ordinary = build_ships(world.seed), iter(chats)

    def make(task, rng):
        if task == "plain":
            return next(ordinary) | {"task": "plain"}
        if task == "known":
            question, said, check = about_villager(world, split, rng)
        else:
            question, said, check = about_ship(ships, split, rng, world.seed)
        cue = CUES[0] if split == "test" else rng.choice(CUES)
        turns = [cue.format(q=capitalise(question)), f"{GREETING} {said}. {FAREWELL}"]
        check |= {"begins": GREETING, "ends": FAREWELL}
        return tasks.as_example(task, turns, check, split)

    return tasks.distinct_examples(world.draws(f"harbour-{split}"), SIZES[split], make)
