"""Images of the village, with captions, dialogues, tests and problems, as files.

    scenes.py           what is in an image, and the drawing
    image_questions.py  questions, their answers, and the checker
    image_examples.py   captions, and which questions are asked: dialogues, tests, problems
    images.py           the splits, and their files

Run     python -m data.village.images                     # prints samples and counts
        python -m data.village.images --sheet sheet.png   # and paints some images
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from data.village.files import settings_with, show
from data.village.image_examples import (
    Balance,
    caption,
    describe_example,
    dialogue,
    problems,
    question_examples,
    reader_dialogues,
)
from data.village.image_questions import TASKS
from data.village.scenes import SMALLEST, draw, random_scene, vary
from nanollm.config import atomic_folder
from nanollm.formats import write_jsonl

__all__ = ["SMALLEST", "draw", "of_run", "prepare"]

VERSION = 26  # raise it when images or texts change, so that no old cache is read
SIZES = {"val": 200, "test": 400, "combos": 150}  # images of each split, beside training
HARD_NEGATIVES = 4  # training images side by side that differ in one thing each
N_TEST = {"test": 240, "combos": 100}  # test questions of each task
ABOUT_PAIRS = ("existence", "count", "colour", "place", "comparison", "sum", "more")


def split_scenes(seed, n_train):
    """{split: scenes}: no scene, whatever its details, is in two splits or twice in one.

    In training HARD_NEGATIVES scenes in a row differ from the first of them in one thing each.
    """
    rng, seen, splits = random.Random(f"pictures-{seed}"), set(), {}
    for split, n in {**SIZES, "train": n_train}.items():  # the tests don't depend on n_train
        scenes, tries = splits.setdefault(split, []), 0
        while len(scenes) < n:
            nth = len(scenes) % HARD_NEGATIVES
            if split == "train" and nth and tries < 50:
                scene = vary(scenes[-nth], rng)
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
        return {"combos_test": question_examples(images, ABOUT_PAIRS, N_TEST[split], rng)}
    phrasings = 2 if split == "train" else 1
    said = [[caption(scene, rng) for _ in range(phrasings)] for scene in scenes]
    made = {f"captions_{split}": [], f"problems_{split}": problems(images, rng)}
    for first in range(0, len(images), HARD_NEGATIVES):  # their captions are neighbours, too
        for phrasing in range(phrasings):
            for (image, _), texts in list(zip(images, said))[first : first + HARD_NEGATIVES]:
                made[f"captions_{split}"].append({"image": image, "caption": texts[phrasing]})
    if split == "test":
        made["questions_test"] = question_examples(images, TASKS, N_TEST[split], rng)
        return made
    balance = Balance()
    made[f"describe_{split}"] = [describe_example(image, scene, rng) for image, scene in images]
    made[f"questions_{split}"] = [dialogue(image, scene, balance, rng) for image, scene in images]
    made[f"reader_{split}"] = reader_dialogues(scenes, [texts[0] for texts in said], rng)
    return made


def prepare(seed=0, root="data/cache", size=96, n_train=6000):
    """Paint and write everything once and return the folder; later calls find it there.

    Images are train/00000.png and so on in train, val, test and combos; paths in the files are
    relative to the folder. data/README.md says what is in each file.
    """
    folder = Path(root) / f"images-{seed}-{size}px-{n_train}-v{VERSION}"
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as new:
        for split, scenes in split_scenes(seed, n_train).items():
            (new / split).mkdir()
            truths = []
            for i, scene in enumerate(scenes):
                draw(scene, size).save(new / split / f"{i:05}.png", compress_level=1)
                truths.append({"image": f"{split}/{i:05}.png", **asdict(scene)})
            for name, rows in records(split, scenes, seed).items():
                write_jsonl(new / f"{name}.jsonl", rows)
            (new / f"scenes_{split}.json").write_text(json.dumps(truths), encoding="utf-8")
    return folder


def of_run(run_folder):
    """Folder of the images that a run was trained on; the default one where its settings don't
    say.
    """
    known = settings_with("image_size", run_folder)
    names = {"size": "image_size", "n_train": "images"}
    return prepare(**{to: known[name] for to, name in names.items() if name in known})


def main(argv=None):
    """Print samples of every file, and how many records each has."""
    parser = argparse.ArgumentParser(description="Print samples of the images, and the counts.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=4, help="samples of each kind")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a sheet of 24 images")
    args = parser.parse_args(argv)
    for split, scenes in split_scenes(args.seed, 600).items():
        for name, rows in records(split, scenes, args.seed).items():
            show(name, rows, args.samples, random.Random(0))
    if args.sheet:
        rng, sheet = random.Random(args.seed), Image.new("RGB", (6 * 192, 4 * 192))
        for i in range(24):
            image = draw(random_scene(rng)).resize((192, 192), Image.Resampling.NEAREST)
            sheet.paste(image, (i % 6 * 192, i // 6 * 192))
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
