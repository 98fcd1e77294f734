"""Pictures of the village: captions, dialogues about pictures, tests and problems, as files.

    village_scenes.py             what is in a picture, and the drawing
    village_picture_questions.py  questions, their answers, and the checker
    village_pictures.py           captions, dialogues, files

Run     python data/village_pictures.py                     # prints samples and counts
        python data/village_pictures.py --sheet sheet.png   # and paints some pictures
"""
import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw

if not __package__:  # run as a file: the repository root holds the package
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.village_picture_questions import (
    FAMILIES,
    STEPS,
    Balance,
    ask,
    blind_guess,
    check_of,
    named,
    number_of,
    reply,
    truth,
    worked,
)
from data.village_scenes import HELD_OUT, PLACES, draw, random_scene
from data.village_world import capitalise

VERSION = 1  # raise it when pictures or texts change, so that no old cache is read
SIZES = {"val": 200, "test": 400, "combos": 150}  # pictures of each split, beside training
PER_FAMILY = {"test": 240, "combos": 100}  # test questions
ABOUT_PAIRS = ("existence", "count", "colour", "place", "comparison", "sum", "more")
COUNTING = ("count", "sum", "all")
TURNS = 5  # questions in a dialogue

# --- captions ----------------------------------------------------------------

WHERE = {"left": ("on the left", "on the left side", "to the left"),
         "middle": ("in the middle", "in the middle of the picture"),
         "right": ("on the right", "on the right side", "to the right")}
DOES = {"house": ("stands", "stand"), "ball": ("lies", "lie"), "flower": ("grows", "grow"),
        "boat": ("rests", "rest"), "mushroom": ("grows", "grow"), "kite": ("flies", "fly"),
        "star": ("shines", "shine")}
LISTS = ("The picture shows {x}.", "You can see {x}.", "There {is_} {x}.", "I see {x}.",
         "This is a picture of {x}.", "Look: {x}.", "In the picture there {is_} {x}.")
SEASON_SAID = ("It is {s}.", "The season is {s}.", "It is {s} in the village.",
               "The trees look like {s}.")
TIME_SAID = {"day": ("The sun is high.", "It is day."),
             "evening": ("It is evening.", "The evening comes.")}
DESCRIBE = ("Describe the picture.", "What do you see?", "What is in the picture?",
            "Tell me what the picture shows.", "Say what is in this picture.",
            "Please describe what you see.", "What does the picture show?",
            "Write a caption for this picture.")


def phrase(group, with_size, rng):
    """"a big red house", "3 yellow flowers"."""
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
        listed = ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]
        is_ = "is" if groups[0].number == 1 else "are"
        said = rng.choice(LISTS).format(x=listed, is_=is_) if style == "list" \
            else capitalise(listed) + "."
    around = [rng.choice(SEASON_SAID).format(s=scene.season)] * (rng.random() < 0.6)
    around += [rng.choice(TIME_SAID[scene.time])] * (rng.random() < 0.25)
    first = rng.random() < 0.3
    return " ".join([*around, said] if first else [said, *around])


def sentence(group, words, place, rng):
    """One group in a sentence of its own."""
    one = group.number == 1
    verb, is_ = DOES[group.kind][0 if one else 1], "is" if one else "are"
    return capitalise(rng.choice((
        f"{words} {verb} {place}.", f"{place} {verb} {words}.", f"{place} there {is_} {words}.",
        f"there {is_} {words} {place}.", f"{place} you see {words}.")))


# --- dialogues and items -----------------------------------------------------


def chat(turns):
    return [{"role": ("user", "assistant")[i % 2], "content": turn}
            for i, turn in enumerate(turns)]


def describe_item(image, text, rng):
    return {"image": image, "messages": chat([f"<image>\n{rng.choice(DESCRIBE)}", text])}


def dialogue(image, scene, balance, rng):
    """Up to TURNS questions about one picture, of different families; half of the answers that
    need steps have them.
    """
    turns = []
    for family in rng.sample(FAMILIES, len(FAMILIES)):
        question = balance.choose(scene, family, rng)
        if question is not None and len(turns) < 2 * TURNS:
            with_steps = family in STEPS and rng.random() < 0.5
            turns += [ask(question, scene), (worked if with_steps else reply)(scene, question)]
    turns[0] = f"<image>\n{turns[0]}"
    return {"image": image, "messages": chat(turns)}


def test_item(image, scene, question):
    return {"image": image, "messages": chat([f"<image>\n{ask(question, scene)}"]),
            **check_of(question, truth(scene, question)), "family": question.family}


def test_items(pictures, families, per_family, rng, held_out=False):
    """Up to `per_family` questions of each family, one to a picture; if `held_out`, each about the
    object whose colour and kind were never together in training.
    """
    items, balance = [], Balance()
    for family in families:
        made = []
        for image, scene in rng.sample(pictures, len(pictures)):
            limits = {"about": pair_of(scene), "held_out": True} if held_out else {}
            question = balance.choose(scene, family, rng, **limits)
            if question is not None:
                made.append(test_item(image, scene, question))
        items += made[:per_family]
    rng.shuffle(items)
    return items


def pair_of(scene):
    """The kind that has its held-out colour here."""
    return next(g.kind for g in scene.groups if HELD_OUT.get(g.kind) == g.colour)


def problems(pictures, rng):
    """A counting question about each picture, for reinforcement learning."""
    balance, items = Balance(), []
    for i, (image, scene) in enumerate(pictures):
        family = COUNTING[i % len(COUNTING)]
        question = balance.choose(scene, family, rng) or balance.choose(scene, "all", rng)
        items.append(test_item(image, scene, question))
    return items


def reader_dialogues(scenes, captions, rng):
    """Text alone: a caption, then a question that it answers, and the answer. So a text model
    learns to write questions about pictures it never sees (Liu et al. 2023, 2304.08485).
    """
    balance, items = Balance(), []
    for scene, text in zip(scenes, captions, strict=True):
        for family in rng.sample(FAMILIES, len(FAMILIES)):
            question = balance.choose(scene, family, rng)
            if question is not None and tells(text, scene, question):
                said = f"Question: {ask(question, scene)}\nAnswer: {reply(scene, question)}"
                items.append({"messages": chat([READER.format(c=text), said])})
                break
    return items


READER = "Here is a picture in words: {c}\nAsk a question about it, and answer it."


def tells(text, scene, question):
    """Does the caption say what the question asks for?"""
    if question.family == "season":
        return scene.season in text
    if question.family == "place":
        return any(place in text for place in PLACES)
    return "bigger" not in question.wording or ("small" in text and "big" in text)


# --- files -------------------------------------------------------------------


def split_scenes(seed, n_train):
    """{split: scenes}: no scene, whatever its details, is in two splits or twice in one."""
    rng, seen, splits = random.Random(f"pictures-{seed}"), set(), {}
    for split, n in {**SIZES, "train": n_train}.items():  # the tests don't depend on n_train
        splits[split] = []
        while len(splits[split]) < n:
            scene = random_scene(rng, held_out=split == "combos")
            if scene.truth not in seen:
                seen.add(scene.truth)
                splits[split].append(scene)
    return splits


def records(split, scenes, seed):
    """{name of the file: its records} for one split."""
    rng = random.Random(f"pictures-{split}-{seed}")
    pictures = [(f"{split}/{i:05}.png", scene) for i, scene in enumerate(scenes)]
    if split == "combos":
        return {"combos_test": test_items(pictures, ABOUT_PAIRS, PER_FAMILY[split], rng, True)}
    phrasings = 2 if split == "train" else 1
    told = [[caption(scene, rng) for _ in range(phrasings)] for scene in scenes]
    made = {f"captions_{split}": [{"image": image, "caption": text}
                                  for (image, _), texts in zip(pictures, told) for text in texts]}
    if split != "val":
        made[f"problems_{split}"] = problems(pictures, rng)
    if split == "test":
        made["questions_test"] = test_items(pictures, FAMILIES, PER_FAMILY[split], rng)
        return made
    firsts, balance = [texts[0] for texts in told], Balance()
    made[f"describe_{split}"] = [describe_item(image, text, rng)
                                 for (image, _), text in zip(pictures, firsts)]
    made[f"questions_{split}"] = [dialogue(image, scene, balance, rng) for image, scene in pictures]
    made[f"reader_{split}"] = reader_dialogues(scenes, firsts, rng)
    return made


def prepare(seed=0, root="data/cache", size=64, n_train=6000):
    """Paint and write everything once and return the folder; later calls find it there.

    Images are train/00000.png and so on in train, val, test and combos; paths in the files are
    relative to the folder. captions_*.jsonl ({"image", "caption"}), describe_*.jsonl and
    questions_*.jsonl ({"image", "messages"}), questions_test.jsonl, combos_test.jsonl and
    problems_*.jsonl (with "answer", "check", "not", "family"), reader_*.jsonl ({"messages"},
    without pictures), and the truth: scenes_*.json.
    """
    folder = Path(root) / f"pictures-{seed}-{size}px-{n_train}-v{VERSION}"
    if folder.is_dir():
        return folder
    if n_train < 1:
        raise ValueError(f"training needs at least one picture, got {n_train}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        for split, scenes in split_scenes(seed, n_train).items():
            write_split(new, split, scenes, seed, size)
        new.chmod(0o755)
        try:
            os.replace(new, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def write_split(folder, split, scenes, seed, size):
    (folder / split).mkdir()
    for i, scene in enumerate(scenes):
        draw(scene, size).save(folder / split / f"{i:05}.png", compress_level=3)
    for name, rows in records(split, scenes, seed).items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    truths = [{"image": f"{split}/{i:05}.png", **scene.as_dict()} for i, scene in enumerate(scenes)]
    (folder / f"scenes_{split}.json").write_text(json.dumps(truths), encoding="utf-8")


# --- samples -----------------------------------------------------------------


def contact_sheet(scenes, rng, rows=4, columns=6, pixels=192):
    """Pictures as a model sees them, enlarged, each above its caption."""
    sheet = Image.new("RGB", (columns * (pixels + 12), rows * (pixels + 76)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, scene in enumerate(scenes[:rows * columns]):
        x, y = i % columns * (pixels + 12) + 6, i // columns * (pixels + 76) + 6
        sheet.paste(draw(scene).resize((pixels, pixels), Image.Resampling.NEAREST), (x, y))
        lines = [""]
        for word in caption(scene, rng).split():
            if len(lines[-1]) + len(word) > 34:
                lines.append("")
            lines[-1] += word + " "
        pen.multiline_text((x, y + pixels + 2), "\n".join(lines), "black", spacing=1, font_size=11)
    return sheet


def show(seed, n_samples):
    """Print samples of every file, how many records each has, and what a blind guess gets."""
    for split, scenes in split_scenes(seed, 600).items():
        print(f"\n==== {split}: {len(scenes)} scenes")
        for name, rows in records(split, scenes, seed).items():
            families = Counter(row["family"] for row in rows if "family" in row)
            print(f"\n== {name}: {len(rows)} records", dict(families) or "")
            for row in random.Random(0).sample(rows, n_samples):
                said = "  ".join(f"[{m['role']}] {m['content']}" for m in row.get("messages", ()))
                print("*", row.get("image", ""), row.get("caption", said), row.get("answer", ""))
            if name in ("questions_test", "combos_test"):
                blind = blind_guess(rows)
                print("blind guess:", {f: f"{share:.0%}" for f, share in blind.items()},
                      f"mean {sum(blind.values()) / len(blind):.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print samples of the pictures, and the counts.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=4, help="samples of each kind")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a sheet of 24 pictures")
    args = parser.parse_args()
    show(args.seed, args.samples)
    if args.sheet:
        rng = random.Random(f"sheet-{args.seed}")
        contact_sheet([random_scene(rng) for _ in range(24)], rng).save(args.sheet)
