"""What the village reads: biographies, stories, lessons, market arithmetic, images in words.

`documents` mixes the kinds by bytes in the shares of SHARES. A document belongs to the validation
split where the checksum of its text says so, hence no text can be in both splits, however long the
streams are. Outside biographies no pool value is said of anybody whom it does not fit.
"""

import json
import zlib
from dataclasses import asdict
from pathlib import Path

from data.village import sums
from data.village.facts import cloze, tell, tell_two
from data.village.stories import school, story
from data.village.world import (
    ATTRIBUTES,
    POOLS,
    article,
    build_world,
    capitalise,
    split_of,
    wordings,
)
from nanollm.config import atomic_folder
from nanollm.formats import write_jsonl

VERSION = 22  # raise it when the generated text changes, so that no old cache is read
SHARES = {"biography": 0.50, "story": 0.09, "school": 0.19, "market": 0.15, "image": 0.07}
VAL_SHARE = 0.02  # of the bytes
VAL_ONE_IN = 8  # candidates per validation document: costs train an eighth of its documents

# --- biographies ------------------------------------------------------------

OPENINGS = wordings("""
Let me tell you about {n}. | This is {n}. | Do you know {n}? | Everybody knows {n}. | Meet {n}.
There is much to say about {n}. | {n} is one of our neighbours. | Here is what we know about {n}.
Have you met {n}? | One of the villagers is called {n}. | {n} lives in our village.
You will like {n}. | Who is {n}? | A few words about {n}. | The children like {n}.
When you come to the village, you will meet {n}. | Today we speak of {n}. | {n} is well known here.
""")
CLOSINGS = wordings("""
That is {n}. | Such is the life of {n}. | Now you know {n}. | Say hello to {n}! | So much about {n}.
{n} is happy in the village. | Everybody is glad to know {n}. | May {n} live long!
The village would not be the same without {n}. | {n} always has time for a talk.
That is all we know about {n}. | Nobody has a bad word for {n}.
""")
EMBEDDINGS = wordings("""
people say that | everybody knows that | it is well known that | the neighbours say that
it is true that | you may know that | the children will tell you that | I have heard that
we all know that
""")
LINKS = ("by the way,", "besides,", "also,", "of course,", "and", "in truth,")


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
        n = 2 if len(rest) > 1 and rng.random() < 0.25 else 1
        now, rest = rest[:n], rest[n:]
        pronoun = clear and rng.random() < 0.35
        told = (tell_two if n == 2 else tell)(villager, *now, rng, pronoun)
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
    opening = rng.random() < 0.45
    sentences = fact_sentences(villager, attributes, rng, name_first=not opening)
    if "friend" in attributes and rng.random() < 0.3:
        friend = world.by_name[villager.facts["friend"]]
        where = next(i for i, s in enumerate(sentences) if friend.name in s) + 1
        again = rng.sample(ATTRIBUTES[:-1], rng.randint(0, 2))
        told = dress(*tell(friend, rng.choice(ATTRIBUTES[:-1]), rng), rng)
        more = fact_sentences(villager, again, rng, name_first=True)
        sentences = [*sentences[:where], told, *more]
    if opening:
        sentences.insert(0, rng.choice(OPENINGS).format(n=villager.name))
    if rng.random() < 0.25:
        sentences.append(rng.choice(CLOSINGS).format(n=villager.name))
    return " ".join(sentences)


# --- market arithmetic ------------------------------------------------------


def ledger(world, rng, n_stories):
    """Stories of goods with the sum behind every sentence."""
    stories = []
    for _ in range(n_stories):
        said, told, steps = sums.story_of_goods(world, "train", rng, rng.choice((2, 3)))
        for i in range(-len(steps), 0):  # the first sentence may come without
            told[i] = f"{told[i][:-1]}: {sums.equation(*steps[i])}"
        stories.append(" ".join([*told, f"{said['n']} has {sums.result_of(*steps[-1])} now."]))
    return "\n".join(stories)


def equations(rng, n):
    """A page of a copybook: small sums, differences and products, some going on from the last. On
    every other page some have the teacher's question before them, save what tests ask.
    """
    written, last, asked = [], None, rng.random() < 0.5
    while len(written) < n:
        small = rng.random() < 0.8
        a, sign, b = sums.small_sum(rng) if small else (rng.randint(1, 9), "*", rng.randint(1, 9))
        if last and sign != "*" and rng.random() < 0.3 and 0 <= sums.result_of(last, sign, b) <= 20:
            a = last
        sentence = sums.equation(a, sign, b)
        if asked and rng.random() < 0.6 and split_of("easy", *sorted((a, b))) == "train":
            sentence = f"{sums.question_of(a, sign, b, rng)} {sentence}"
        written.append(sentence)
        last = sums.result_of(a, sign, b)
    return " ".join(written)


def market(world, rng):
    """Columns of written steps, a page of small sums, or stories with their sums."""
    draw = rng.random()
    if draw < 0.4:  # columns of one kind, two digits mostly
        n_lines = rng.randint(2, 4)
        kind = rng.choices(("two_digits", "three_digits", "products"), (2, 1, 1))[0]
        lines = (sums.written_steps(*sums.drawn(kind, "train", rng)) for _ in range(n_lines))
        return "\n".join(lines)
    if draw < 0.7:
        return equations(rng, rng.randint(5, 12))
    return ledger(world, rng, rng.randint(1, 3))


# --- images -----------------------------------------------------------------

COLOURS = ("red", "blue", "green", "yellow", "black", "purple", "orange", "pink")
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIDES = (("to the left of", "to the right of"), ("above", "below"))
IMAGE_OPENINGS = wordings("""
In the picture there {be} {x}. | The picture shows {x}. | You can see {x}. | Look: {x}.
There {be} {x} in the picture. | This is a picture of {x}. | Somebody has drawn {x}.
On the paper there {be} {x}.
""")


def image(world, rng):
    """Two or three groups of shapes, and where they are."""
    kinds = rng.sample([f"{c} {s}" for c in COLOURS for s in SHAPES], rng.choice((2, 2, 3)))
    numbers = [rng.choice((1, 1, 2, 3, 4, 5)) for _ in kinds]
    kinds = [rng.choice(("", "", "small ", "large ")) + kind for kind in kinds]
    nouns = [kind + "s" * (n > 1) for n, kind in zip(numbers, kinds)]
    be = ["is" if n == 1 else "are" for n in numbers]
    named = []
    for n, noun in zip(numbers, nouns):
        one = n == 1 and rng.random() < 0.7
        named.append(f"{article(noun) if one else NUMBERS[n]} {noun}")
    x = ", ".join(named[:-1]) + " and " + named[-1]
    sentences = [rng.choice(IMAGE_OPENINGS).format(x=x, be=be[0])]
    for i in range(len(nouns) - 1):
        side, opposite = rng.choice(SIDES)
        if rng.random() < 0.5:
            sentences.append(f"The {nouns[i]} {be[i]} {side} the {nouns[i + 1]}.")
        else:
            sentences.append(f"{capitalise(opposite)} the {nouns[i]} you see the {nouns[i + 1]}.")
        if numbers[i] > numbers[i + 1]:
            sentences.append(f"There are more {nouns[i]} than {kinds[i + 1]}s.")
    if rng.random() < 0.35:
        sentences.append(f"Together there are {sum(numbers)} shapes.")
    return " ".join(sentences)


# --- the mixture ------------------------------------------------------------

WRITERS = {write.__name__: write for write in (biography, story, school, market, image)}


def documents(world, split="train", approx_bytes=1_000_000):
    """Distinct (kind, text) pairs of one split, until so many bytes are written."""
    rng = world.draws(f"corpus-{split}")
    written, seen = dict.fromkeys(WRITERS, 0), set()
    while sum(written.values()) < approx_bytes:
        kind = min(WRITERS, key=lambda k: written[k] / SHARES[k])  # the kind most behind its share
        text = WRITERS[kind](world, rng)
        is_val = zlib.crc32(text.encode()) % VAL_ONE_IN == 0
        if text not in seen and is_val == (split == "val"):
            seen.add(text)
            written[kind] += len(text) + 1
            yield kind, text


def prepare_corpus(n_villagers=32, seed=0, megabytes=8.0, root="data/cache"):
    """Write what pretraining reads once and return the folder; later calls find it there.

    It holds corpus_train.jsonl and corpus_val.jsonl ({"text"}), cloze.jsonl, which tests what was
    learnt of them, and world.json, the truth.
    """
    folder = Path(root) / f"village-{n_villagers}-{seed}-{megabytes:g}mb-v{VERSION}"
    if folder.is_dir():
        return folder
    world, size = build_world(n_villagers, seed), int(megabytes * 1e6)
    with atomic_folder(folder) as new:
        for split, n_bytes in ("train", size), ("val", max(int(size * VAL_SHARE), 50_000)):
            texts = ({"text": text} for _, text in documents(world, split, n_bytes))
            write_jsonl(new / f"corpus_{split}.jsonl", texts)
        write_jsonl(new / "cloze.jsonl", cloze(world))
        truth = json.dumps(asdict(world) | {"pools": POOLS}, indent=1)
        (new / "world.json").write_text(truth, encoding="utf-8")
    return folder
