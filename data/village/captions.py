"""What a picture of the village shows, in words: captions in many phrasings."""

from data.village.image_questions import WHERE, listed, named, number_of, survey
from data.village.world import capitalise

DOES = {
    "cup": ("stands", "stand"),
    "bell": ("lies", "lie"),
    "candle": ("burns", "burn"),
    "basket": ("stands", "stand"),
    "lantern": ("hangs", "hang"),
    "star": ("shines", "shine"),
}
LISTS = (
    "The picture shows {x}.",
    "You can see {x}.",
    "There {is_} {x}.",
    "I see {x}.",
    "This is a picture of {x}.",
    "Look: {x}.",
    "In the picture there {is_} {x}.",
)
SEASON_SAID = (
    "It is {s}.",
    "The season is {s}.",
    "It is {s} in the village.",
    "The trees look like {s}.",
)
TIME_SAID = {
    "day": ("The sun is high.", "It is day."),
    "evening": ("It is evening.", "The evening comes."),
}
DESCRIBE = (
    "Describe the picture.",
    "What do you see?",
    "What is in the picture?",
    "Tell me what the picture shows.",
    "Say what is in this picture.",
    "Please describe what you see.",
    "What does the picture show?",
    "Write a caption for this picture.",
)


def phrase(group, with_size, rng):
    """ "a big red cup", "3 yellow candles"."""
    size = f"{group.size} " if with_size else ""
    if group.number == 1 and rng.random() < 0.7:
        return f"a {size}{named(group.kind, group.colour)}"
    return number_of(group.number, group.kind, f"{size}{group.colour}")


def caption(scene, rng):
    """What is in the picture: of each group always the number, colour and kind, mostly the place
    (of all groups or of none), often the size, and perhaps the season and the time.
    """
    with_size, with_place = rng.random() < 0.7, rng.random() < 0.9
    groups = rng.sample(scene.groups, len(scene.groups))
    phrases = [phrase(group, with_size, rng) for group in groups]
    places = [rng.choice(WHERE[group.place]) for group in groups]
    style = rng.choice(("list", "sentences", "chain")) if with_place else "list"
    if style == "sentences":
        said = " ".join(sentence(*each, rng) for each in zip(groups, phrases, places))
    else:
        parts = [f"{x} {place}" for x, place in zip(phrases, places)] if with_place else phrases
        is_ = "is" if groups[0].number == 1 else "are"
        said = (
            rng.choice(LISTS).format(x=listed(parts), is_=is_)
            if style == "list"
            else capitalise(listed(parts)) + "."
        )
    around = [rng.choice(SEASON_SAID).format(s=scene.season)] * (rng.random() < 0.6)
    around += [rng.choice(TIME_SAID[scene.time])] * (rng.random() < 0.25)
    first = rng.random() < 0.3
    return " ".join([*around, said] if first else [said, *around])


def description(scene):
    """Everything but the time, the sky first."""
    seen = [words for number, words in survey(scene, size=True, colour=True) if number]
    return " ".join([f"It is {scene.season}.", *seen])


def sentence(group, words, place, rng):
    """One group in a sentence of its own."""
    one = group.number == 1
    verb, is_ = DOES[group.kind][0 if one else 1], "is" if one else "are"
    return capitalise(
        rng.choice(
            (
                f"{words} {verb} {place}.",
                f"{place} {verb} {words}.",
                f"{place} there {is_} {words}.",
                f"there {is_} {words} {place}.",
                f"{place} you see {words}.",
            )
        )
    )
