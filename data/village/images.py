"""Pictures of the village, with captions, dialogues, tests and problems, as files.

    village_scenes.py             what is in a picture, and the drawing
    village_captions.py           the picture in words
    village_picture_questions.py  questions, their answers, and the checker
    village_picture_items.py      which questions are asked: dialogues, tests, problems
    village_images.py           the splits, and their files

Run     python -m data.village.images                     # prints samples and counts
        python -m data.village.images --sheet sheet.png   # and paints some pictures
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw

from data.village import settings_with
from data.village.captions import caption
from data.village.files import whole_folder, write_lines
from data.village.image_examples import (
    Balance,
    blind_guess,
    describe_example,
    dialogue,
    problems,
    question_examples,
    reader_dialogues,
)
from data.village.image_questions import FAMILIES, answer_of, is_true
from data.village.scenes import SMALLEST, Scene, draw, random_scene, vary

__all__ = [
    "SMALLEST",
    "Scene",
    "answer_of",
    "blind_guess",
    "caption",
    "draw",
    "is_true",
    "prepare",
    "random_scene",
    "reader_dialogues",
]

VERSION = 25  # raise it when pictures or texts change, so that no old cache is read
SIZES = {"val": 200, "test": 400, "combos": 150}  # pictures of each split, beside training
ALIKE = 4  # training pictures, and then their captions, side by side: they differ in one thing each
PER_FAMILY = {"test": 240, "combos": 100}  # test questions
ABOUT_PAIRS = ("existence", "count", "colour", "place", "comparison", "sum", "more")

# --- files -------------------------------------------------------------------


def split_scenes(seed, n_train):
    """{split: scenes}: no scene, whatever its details, is in two splits or twice in one.

    In training ALIKE scenes in a row differ from the first of them in one thing each.
    """
    rng, seen, splits = random.Random(f"pictures-{seed}"), set(), {}
    for split, n in {**SIZES, "train": n_train}.items():  # the tests don't depend on n_train
        scenes = splits[split] = []
        tries = 0
        while len(scenes) < n:
            first = len(scenes) - len(scenes) % ALIKE  # of the family
            if split == "train" and first < len(scenes) and tries < 50:
                scene = vary(scenes[first], rng)
            else:  # also where all that is like it was there before
                scene = random_scene(rng, held_out=split == "combos")
            tries += 1
            if scene.truth not in seen:
                seen.add(scene.truth)
                scenes.append(scene)
                tries = 0
    return splits


def records(split, scenes, seed):
    """{name of the file: its records} for one split."""
    rng = random.Random(f"pictures-{split}-{seed}")
    images = [(f"{split}/{i:05}.png", scene) for i, scene in enumerate(scenes)]
    if split == "combos":
        return {"combos_test": question_examples(images, ABOUT_PAIRS, PER_FAMILY[split], rng, True)}
    phrasings = 2 if split == "train" else 1
    told = [[caption(scene, rng) for _ in range(phrasings)] for scene in scenes]
    made = {
        f"captions_{split}": [
            {"image": images[i][0], "caption": told[i][phrasing]}
            for first in range(0, len(images), ALIKE)
            for phrasing in range(phrasings)
            for i in range(first, min(first + ALIKE, len(images)))
        ]
    }
    if split != "val":
        made[f"problems_{split}"] = problems(images, rng)
    if split == "test":
        made["questions_test"] = question_examples(images, FAMILIES, PER_FAMILY[split], rng)
        return made
    firsts, balance = [texts[0] for texts in told], Balance()
    made[f"describe_{split}"] = [describe_example(image, scene, rng) for image, scene in images]
    made[f"questions_{split}"] = [dialogue(image, scene, balance, rng) for image, scene in images]
    made[f"reader_{split}"] = reader_dialogues(scenes, firsts, rng)
    return made


def prepare(seed=0, root="data/cache", size=96, n_train=6000):
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
    with whole_folder(folder) as new:
        for split, scenes in split_scenes(seed, n_train).items():
            write_split(new, split, scenes, seed, size)
    return folder


def of_run(run_folder):
    """Folder of the images that a run was trained on; the default one where its settings don't say."""
    known = settings_with("image_size", run_folder)
    names = {"size": "image_size", "n_train": "images"}
    return prepare(**{to: known[name] for to, name in names.items() if name in known})


def write_split(folder, split, scenes, seed, size):
    (folder / split).mkdir()
    for i, scene in enumerate(scenes):
        draw(scene, size).save(folder / split / f"{i:05}.png", compress_level=1)
    for name, rows in records(split, scenes, seed).items():
        write_lines(folder / f"{name}.jsonl", rows)
    truths = [{"image": f"{split}/{i:05}.png", **scene.as_dict()} for i, scene in enumerate(scenes)]
    (folder / f"scenes_{split}.json").write_text(json.dumps(truths), encoding="utf-8")


# --- samples -----------------------------------------------------------------


def contact_sheet(scenes, rng, rows=4, columns=6, pixels=192):
    """Pictures as a model sees them, enlarged, each above its caption."""
    sheet = Image.new("RGB", (columns * (pixels + 12), rows * (pixels + 92)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, scene in enumerate(scenes[: rows * columns]):
        x, y = i % columns * (pixels + 12) + 6, i // columns * (pixels + 92) + 6
        sheet.paste(draw(scene).resize((pixels, pixels), Image.Resampling.NEAREST), (x, y))
        lines = [""]
        for word in caption(scene, rng).split():
            if len(lines[-1]) + len(word) > 36:
                lines.append("")
            lines[-1] += word + " "
        pen.multiline_text((x, y + pixels + 2), "\n".join(lines), "black", spacing=1, font_size=11)
    return sheet


def show(seed, n_samples):
    """Print samples of every file, how many records each has, and what a blind guess gets."""
    for split, scenes in split_scenes(seed, 600).items():
        print(f"\n==== {split}: {len(scenes)} scenes")
        for name, rows in records(split, scenes, seed).items():
            tasks = Counter(row["task"] for row in rows if "task" in row)
            print(f"\n== {name}: {len(rows)} records", dict(tasks) or "")
            for row in random.Random(0).sample(rows, n_samples):
                said = "  ".join(f"[{m['role']}] {m['content']}" for m in row.get("messages", ()))
                print("*", row.get("image", ""), row.get("caption", said), row.get("answer", ""))
            if name in ("questions_test", "combos_test"):
                blind = blind_guess(rows)
                print(
                    "blind guess:",
                    {f: f"{share:.0%}" for f, share in blind.items()},
                    f"mean {sum(blind.values()) / len(blind):.0%}",
                )


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
