"""What the village reads: biographies, stories, market arithmetic and picture descriptions.

`documents` mixes the kinds by bytes in the shares of SHARES. A document belongs to the validation
split where the checksum of its text says so, hence no text can be in both splits, however long the
streams are. Outside biographies no pool value is said of anybody whom it does not fit.
"""

import random
import zlib

from data.village.facts import tell, tell_two
from data.village.school import school
from data.village.stories import story
from data.village.sums import (
    GOODS,
    WARES,
    count,
    equation,
    held_out,
    product_operands,
    question_of,
    result_of,
    small_product,
    small_sum,
    story_of_goods,
    three_digit_operands,
    two_digit_operands,
    written_product,
    written_steps,
)
from data.village.world import ATTRIBUTES, article, capitalise, split_of

SHARES = {"biography": 0.50, "story": 0.09, "school": 0.19, "market": 0.15, "picture": 0.07}
VAL_ONE_IN = 8  # candidates per validation document: costs train an eighth of its documents

# --- biographies ------------------------------------------------------------

OPENINGS = (
    "Let me tell you about {n}.",
    "This is {n}.",
    "Do you know {n}?",
    "Everybody knows {n}.",
    "There is much to say about {n}.",
    "{n} is one of our neighbours.",
    "Meet {n}.",
    "Here is what we know about {n}.",
    "Have you met {n}?",
    "One of the villagers is called {n}.",
    "{n} lives in our village.",
    "You will like {n}.",
    "Who is {n}?",
    "A few words about {n}.",
    "The children like {n}.",
    "When you come to the village, you will meet {n}.",
    "Today we speak of {n}.",
    "{n} is well known here.",
)
CLOSINGS = (
    "That is {n}.",
    "Such is the life of {n}.",
    "Now you know {n}.",
    "Say hello to {n}!",
    "So much about {n}.",
    "{n} is happy in the village.",
    "Everybody is glad to know {n}.",
    "The village would not be the same without {n}.",
    "{n} always has time for a talk.",
    "May {n} live long!",
    "That is all we know about {n}.",
    "Nobody has a bad word for {n}.",
)
EMBEDDINGS = (
    "people say that",
    "everybody knows that",
    "it is well known that",
    "the neighbours say that",
    "it is true that",
    "you may know that",
    "the children will tell you that",
    "I have heard that",
    "we all know that",
)
LINKS = ("by the way,", "besides,", "also,", "of course,", "and", "in truth,")
VOICES = (
    "said the old woman",
    "said the boy",
    "said the girl",
    "said a neighbour",
    "said the grandmother",
    "said the man at the gate",
    "said the little sister",
)
CARD = {
    "job": "Job: {v}.",
    "home": "Home: by the {v}.",
    "pet": "Pet: {v}.",
    "food": "Favourite food: {v}.",
    "colour": "Door: {v}.",
    "town": "Born in: {v}.",
    "friend": "Best friend: {v}.",
}


def dress(sentence, is_request, rng, first=False):
    """Perhaps a link or "people say that" in front; then the capital and the full stop."""
    draw = rng.random()
    if draw < 0.10 and not first:
        sentence = f"{rng.choice(LINKS)} {sentence}"
    elif 0.10 < draw < 0.25 and not is_request:
        sentence = f"{rng.choice(EMBEDDINGS)} {sentence}"
    return capitalise(sentence) + "."


def fact_sentences(villager, attributes, rng, name_first):
    """One sentence per fact, or for two; a pronoun only where it can mean nobody else."""
    sentences, clear, rest = [], not name_first, list(attributes)
    while rest:
        several = len(rest) > 1 and rng.random() < 0.25
        now, rest = (rest[:2], rest[2:]) if several else (rest[:1], rest[1:])
        pronoun = clear and rng.random() < 0.35
        told = (
            tell_two(villager, now, rng, pronoun)
            if several
            else tell(villager, now[0], rng, pronoun)
        )
        sentences.append(dress(*told, rng, first=name_first and not sentences))
        clear = "friend" not in now  # after a second name, "she" would be unclear
    return sentences


def renown(world):
    """How often each villager is spoken of: k^-0.6 for the k-th of either half.

    A model stores facts only after it has learned to look them up by name, and it learns that much
    earlier when some names are frequent: with all alike, the same model learned no fact from the
    text that, told unevenly, it learned almost completely (Zucchet et al. 2025, arXiv:2503.21676).
    """
    half = len(world.villagers) // 2
    ranks = {v.name: i % half for i, v in enumerate(sorted(world.villagers, key=lambda v: v.asked))}
    return [(ranks[v.name] + 1) ** -0.6 for v in world.villagers]


def biography(world, rng):
    """Three to six facts of one villager in random order, at times with a word about the friend."""
    villager = rng.choices(world.villagers, renown(world))[0]
    attributes = rng.sample(ATTRIBUTES, rng.randint(3, 6))
    if rng.random() < 0.05:
        lines = [f"Name: {villager.name}."]
        return " ".join(lines + [CARD[a].format(v=villager.facts[a]) for a in attributes])
    opening = rng.random() < 0.45
    sentences = fact_sentences(villager, attributes, rng, name_first=not opening)
    if "friend" in attributes and rng.random() < 0.3:
        friend = world.by_name[villager.facts["friend"]]
        where = next(i for i, s in enumerate(sentences) if friend.name in s) + 1
        again = rng.sample(ATTRIBUTES[:-1], rng.randint(0, 2))
        told = dress(*tell(friend, rng.choice(ATTRIBUTES[:-1]), rng), rng)
        sentences = (
            sentences[:where] + [told] + fact_sentences(villager, again, rng, name_first=True)
        )
    if opening:
        sentences.insert(0, rng.choice(OPENINGS).format(n=villager.name))
    if rng.random() < 0.06:
        sentences = [spoken(sentence, rng) for sentence in sentences]
    elif rng.random() < 0.25:
        sentences.append(rng.choice(CLOSINGS).format(n=villager.name))
    return " ".join(sentences)


def spoken(sentence, rng):
    quote = sentence[:-1] + "," if sentence[-1] == "." else sentence
    return f'"{quote}" {rng.choice(VOICES)}.'


# --- market arithmetic ------------------------------------------------------

MARKET = (
    ("times", "{n} buys {A} at {P} each and pays {R}."),
    ("times", "One {t} costs {P}, so {A} cost {R}. {n} pays."),
    ("times", "{n} needs {A}. Each one costs {P}. That makes {R}."),
    ("times", "{A} at {P} each: {n} counts out {R}."),
    ("plus", "{n} has {A} and gets {B} more. Now {n} has {R}."),
    ("plus", "One basket holds {A}, the other holds {B}. Together they hold {R}."),
    ("plus", "{n} sells {A} in the morning and {B} in the evening. That is {R} in one day."),
    ("plus", "{a} plus {b} is {r}, so {n} carries {R} home."),
    ("plus", "{n} brings {A}, {m} brings {B}, and they have {R}."),
    ("minus", "{n} has {A} and sells {B}. There {is_left} {R} left."),
    ("minus", "{n} has {AP} and spends {BP}. {n} has {RP} left."),
    ("minus", "{a} minus {b} is {r}, so {n} keeps {R}."),
    ("minus", "{n} pays with {AP} for something that costs {BP} and gets {RP} back."),
    ("minus", "Of {A}, {n} gives {B} to {m}. {n} keeps {R}."),
    ("minus", "{n} wants {AP} for a basket, {m} offers {BP}. The difference is {RP}."),
    ("more", "{n} has {A}. {m} has {B} more, that is {R}."),
    ("more", "{n} finds {A}, and {m} finds {B} more than {n}. So {m} has {R}."),
)
MARKET_OPENINGS = (
    "It is market day.",
    "The market opens at eight.",
    "On Saturday everybody is at the market.",
    "The sign on the stall says {sign}.",
    "The market is full of people.",
    "It rains on the market.",
    "The sun shines on the market.",
    "A sign says {sign} FOR SALE.",
    "Listen to the numbers.",
    "The stalls stand in a long row.",
    "{n} is at the market today.",
)


def operands(rng, largest, first_larger=False):
    while True:
        a, b = rng.randint(1, largest), rng.randint(1, largest)
        if first_larger and a <= b:
            a, b = b, a
        if a != b and held_out(a, b) != 3:
            return a, b


def step_lines(rng, n_lines):
    """Lines of written steps, all of one kind: two digits mostly, three digits, or products."""
    kind, lines = rng.choices(("two", "three", "product"), (2, 1, 1))[0], []
    for _ in range(n_lines):
        if kind == "product":
            lines.append(written_product(*product_operands("train", rng)))
            continue
        a, b = (two_digit_operands if kind == "two" else three_digit_operands)("train", rng)
        sign = rng.choice("+-")
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        lines.append(written_steps(a, sign, b))
    return "\n".join(lines)


def ledger(world, rng, n_stories):
    """Stories of goods with the sum behind every sentence."""
    stories = []
    for _ in range(n_stories):
        said, sentences, sums = story_of_goods(world, "train", rng, rng.choice((2, 3)))
        first = [] if len(sums) == len(sentences) else [sentences.pop(0)]
        told = [f"{s[:-1]}: {equation(*each)}" for s, each in zip(sentences, sums)]
        left = result_of(*sums[-1])
        last = f"{said['n']} has {left} now."
        stories.append(" ".join([*first, *told, last]))
    return "\n".join(stories)


def market_sentence(world, rng):
    kind, template = rng.choice(MARKET)
    n, m = rng.sample(world.villagers, 2)
    if kind == "times":
        a, b = rng.randint(2, 9), rng.randint(1, 9)
        result = a * b
    else:
        a, b = operands(rng, rng.choice((9, 20, 60)), first_larger=kind == "minus")
        result = a - b if kind == "minus" else a + b
    t = rng.choice(WARES)
    return template.format(
        n=n.name,
        m=m.name,
        t=t,
        a=a,
        b=b,
        r=result,
        P=count(b, "penny"),
        A=count(a, t),
        B=count(b, t) if kind != "more" else b,
        AP=count(a, "penny"),
        BP=count(b, "penny"),
        R=count(result, "penny" if kind == "times" else t),
        RP=count(result, "penny"),
        is_left="is" if result == 1 else "are",
    )


def equations(rng, n):
    """A page of a copybook: small sums, differences and products, some going on from the last. On
    every other page some have the teacher's question before them, save what tests ask.
    """
    written, last, asked = [], None, rng.random() < 0.5
    while len(written) < n:
        a, sign, b = small_sum(rng) if rng.random() < 0.8 else small_product(rng)
        if last and sign != "*" and rng.random() < 0.3 and 0 <= result_of(last, sign, b) <= 20:
            a = last
        sentence = equation(a, sign, b)
        if asked and rng.random() < 0.6 and split_of("easy", *sorted((a, b))) == "train":
            sentence = f"{question_of(a, sign, b, rng)} {sentence}"
        written.append(sentence)
        last = result_of(a, sign, b)
    return " ".join(written)


def market(world, rng):
    """Sums at the market in words, or bare columns of written steps, or a page of small sums, or
    stories with their sums; every number is right.
    """
    draw = rng.random()
    if draw < 0.30:
        return step_lines(rng, rng.randint(2, 4))
    if draw < 0.58:
        return equations(rng, rng.randint(5, 12))
    if draw < 0.78:
        return ledger(world, rng, rng.randint(1, 3))
    sentences = [market_sentence(world, rng) for _ in range(rng.randint(3, 5))]
    if rng.random() < 0.6:
        opening = rng.choice(MARKET_OPENINGS)
        sentences.insert(
            0,
            opening.format(
                n=rng.choice(world.villagers).name, sign=GOODS[rng.choice(WARES)].upper()
            ),
        )
    if rng.random() < 0.3:
        sentences.append(step_lines(rng, 1))
    return " ".join(sentences)


# --- pictures ---------------------------------------------------------------

COLOURS = ("red", "blue", "green", "yellow", "black", "purple", "orange", "pink")
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIDES = (("to the left of", "to the right of"), ("above", "below"))
PICTURE_OPENINGS = (
    "In the picture there {is_} {x}.",
    "The picture shows {x}.",
    "You can see {x}.",
    "There {is_} {x} in the picture.",
    "This is a picture of {x}.",
    "Somebody has drawn {x}.",
    "On the paper there {is_} {x}.",
    "Look: {x}.",
)
PICTURE_CLOSINGS = (
    "Nothing else is in the picture.",
    "The rest of the paper is empty.",
    "That is the whole picture.",
    "It is a simple picture.",
)


def plural(number, colour, shape):
    return f"{colour} {shape}" + ("s" if number != 1 else "")


def image(world, rng):
    """Two or three groups of shapes, where they are, and which group is larger."""
    kinds = rng.sample([(c, s) for c in COLOURS for s in SHAPES], rng.choice((2, 2, 3)))
    groups = [
        (rng.choice((1, 1, 2, 3, 4, 5)), rng.choice(("", "", "small ", "large ")) + c, s)
        for c, s in kinds
    ]
    named = [
        f"{article(c) if n == 1 and rng.random() < 0.7 else NUMBERS[n]} {plural(n, c, s)}"
        for n, c, s in groups
    ]
    listed = ", ".join(named[:-1]) + " and " + named[-1]
    opening = rng.choice(PICTURE_OPENINGS)
    sentences = [opening.format(x=listed, is_="is" if groups[0][0] == 1 else "are")]
    for i in range(len(groups) - 1):
        (n, c, s), (m, d, r) = groups[i], groups[i + 1]
        one, other = rng.choice(SIDES)
        left, right = f"the {plural(n, c, s)}", f"the {plural(m, d, r)}"
        verb, brev = "is" if n == 1 else "are", "is" if m == 1 else "are"
        sentences.append(
            capitalise(
                rng.choice(
                    (
                        f"{left} {verb} {one} {right}.",
                        f"{right} {brev} {other} {left}.",
                        f"{other} {left} you see {right}.",
                    )
                )
            )
        )
        if n == m and rng.random() < 0.4:
            sentences.append(f"There are as many {plural(2, c, s)} as {plural(2, d, r)}.")
        elif n != m and rng.random() < 0.4:
            (big, bc, bs), (_, sc, ss) = sorted((groups[i], groups[i + 1]), reverse=True)
            sentences.append(f"There are more {plural(2, bc, bs)} than {plural(2, sc, ss)}.")
    total = sum(n for n, _, _ in groups)
    if rng.random() < 0.35:
        sentences.append(f"Together there are {total} shapes.")
    if rng.random() < 0.3:
        sentences.append(rng.choice(PICTURE_CLOSINGS))
    return " ".join(sentences)


# --- the mixture ------------------------------------------------------------

WRITERS = {
    "biography": biography,
    "story": story,
    "school": school,
    "market": market,
    "picture": image,
}


def documents(world, split="train", approx_bytes=None, n_documents=None, seed=0):
    """Distinct (kind, text) pairs of one split, until so many bytes or documents are written."""
    if split not in ("train", "val"):
        raise ValueError(f"the corpus has the splits train and val, not {split!r}")
    if approx_bytes is None and n_documents is None:
        raise ValueError("say how much corpus: approx_bytes or n_documents")
    rng = random.Random(f"corpus-{split}-{world.seed}-{seed}")
    written, seen, repeats = dict.fromkeys(WRITERS, 0), set(), 0
    while (approx_bytes is None or sum(written.values()) < approx_bytes) and (
        n_documents is None or len(seen) < n_documents
    ):
        kind = min(WRITERS, key=lambda k: written[k] / SHARES[k])  # the kind most behind its share
        text = WRITERS[kind](world, rng)
        if (zlib.crc32(text.encode()) % VAL_ONE_IN == 0) != (split == "val"):
            continue
        if text in seen:
            repeats += 1
            if repeats > 1000 + len(seen):
                raise ValueError("the village has run out of new texts: ask for fewer bytes")
            continue
        seen.add(text)
        written[kind] += len(text) + 1
        yield kind, text


def corpus(world, split="train", approx_bytes=None, n_documents=None, seed=0):
    """The texts of `documents`."""
    return (text for _, text in documents(world, split, approx_bytes, n_documents, seed))
