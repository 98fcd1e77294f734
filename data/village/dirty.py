"""The village's corpus as the web would hand it over, each fault planted at a known rate and named
in the record: {"text", "planted"}, so that cleaning (data/clean.py) can be measured.

    exact     an earlier document once more          near      the same, some words replaced
    page      menus and notices, nothing else        shuffled  the words in random order
    garbled   one character in 20 is lost            false     wrong values: nobody's truth
    leak      a test question with its answer

Two faults can be mended; these records keep as "was" what the text should become:

    footer    lines of a web site below the text     mojibake  UTF-8 that was read as Windows-1252
"""

import itertools
import re
from pathlib import Path

from data.village.corpus import documents
from data.village.facts import cloze
from data.village.tasks import fact_never_asked
from data.village.world import POOLS, build_world, wordings
from nanollm.formats import write_jsonl

RATES = {"": 0.48, "exact": 0.1, "near": 0.1, "page": 0.05, "shuffled": 0.05, "garbled": 0.05}
RATES |= {"false": 0.05, "leak": 0.02, "footer": 0.05, "mojibake": 0.05}
MADE = ("exact", "near", "page", "leak")  # not of a document's own text
SITE = wordings("""
Home - News - Shop - Contact | Please enable JavaScript to read this page. | Tags: village, baking
We use cookies to make this site better. | Older posts | Share on: Post, Mail, Print
Read our privacy policy and the terms of use. | Lorem ipsum dolor sit amet. | Log in to comment
Click here to subscribe to our letters! | Copyright 2021 Village Online | Back to the top
""")
TYPOGRAPHY = {'"': "”", "'": "’", " - ": " – ", ". ": ". – ", "o": "ö"}  # the first that it has
VALUE = re.compile(rf"\b({'|'.join(value for pool in POOLS.values() for value in pool)})\b")


def other_value(found, rng):
    """Another value of the kind that was found."""
    pool = next(pool for pool in POOLS.values() if found[0] in pool)
    return rng.choice([value for value in pool if value != found[0]])


def damaged(kind, text, earlier, tests, rng):
    """The record of this kind that is made of a document, of an earlier one, or of a test."""
    record, site = {"planted": kind}, "\n".join(rng.sample(SITE, rng.randint(2, 4)))
    if kind in ("exact", "near"):
        text = rng.choice(earlier)
    if kind == "near":  # one word in 25, and at least one, becomes another word of the text
        words = text.split(" ")
        for at in rng.sample(range(len(words)), max(1, len(words) // 25)):
            words[at] = rng.choice(words)
        text = " ".join(words)
    elif kind == "page":
        text = site
    elif kind == "shuffled":
        text = " ".join(rng.sample(text.split(), len(text.split())))
    elif kind == "garbled":
        text = "".join("\ufffd" if rng.random() < 0.05 else c for c in text)
    elif kind == "false":
        text = VALUE.sub(lambda found: other_value(found, rng), text)
    elif kind == "leak":
        text = rng.choice(tests)
    elif kind == "footer":
        record["was"], text = text, f"{text}\n{site}"
    elif kind == "mojibake":
        plain = next(plain for plain in TYPOGRAPHY if plain in text)
        record["was"] = text.replace(plain, TYPOGRAPHY[plain])
        read = record["was"].encode().decode("cp1252", "surrogateescape")
        # browsers read the bytes that Windows-1252 lacks as the characters of their numbers
        text = re.sub("[\udc80-\udcff]", lambda c: chr(ord(c[0]) - 0xDC00), read)
    return {"text": text} | record


def dirty(world, n_bytes):
    """The dirty records, the texts that a perfect cleaning would leave of them (`truth`), held-out
    text (`val`), the texts of a `test`, every other of which has leaked, and as `cloze` facts, and
    the test as questions.
    """
    rng, asked = world.draws("dirty"), {}
    while len(asked) < min(100, 6 * len(world.villagers)):
        (question, answer), check = fact_never_asked(world, "test", rng)
        told, value = f"{question} {answer}", f" {check['answer']}"
        asked[told] = {"prompt": told.removesuffix(f"{value}."), "answer": value}
    tests, records, truth = [*asked], [], []
    for written, text in documents(world, "train", n_bytes):
        kind = rng.choices([*RATES], RATES.values())[0]
        while kind in MADE and truth:  # these use up no document
            records.append(damaged(kind, text, truth, tests[::2], rng))
            kind = rng.choices([*RATES], RATES.values())[0]
        if kind == "false" and written != "biography" or kind in MADE:
            kind = ""  # nothing in it could be false; or there is none to copy yet
        records.append(damaged(kind, text, truth, tests, rng))
        if not kind or "was" in records[-1]:
            truth.append(records[-1].get("was", text))
    val = [text for _, text in documents(world, "val", n_bytes * 0.08)]
    halves = itertools.cycle(["questions that leaked", "other questions"])
    questions = [each | {"task": half} for each, half in zip(asked.values(), halves)]
    made = {"dirty": records, "truth": truth, "val": val}
    return made | {"test": tests, "cloze": cloze(world) + questions}


def write_dirty(out, villagers, megabytes, seed=0):
    """Paths of what `dirty` returns, as files of records in a directory."""
    made = dirty(build_world(villagers, seed), int(megabytes * 1e6))
    for name, texts in made.items():
        records = (text if isinstance(text, dict) else {"text": text} for text in texts)
        write_jsonl(Path(out, f"{name}.jsonl"), records)
    return {name: Path(out, f"{name}.jsonl") for name in made}
