"""What is said about images of the village, and the files of it: captions, dialogues, test examples
and problems.

An answer that somebody could guess without looking proves nothing, so answers are balanced: yes and
no, every number, colour and place are about equally often right.
"""

import json
import random
from collections import Counter, defaultdict
from dataclasses import asdict
from itertools import cycle, permutations, product
from pathlib import Path

from data.village import image_questions as questions
from data.village.examples import settings_of
from data.village.image_questions import TASKS, Question, look, named, truth
from data.village.scenes import COLOURS, KINDS, PLACES, ROWS, draw, random_scene, row_of, vary
from data.village.tasks import chat
from data.village.world import capitalise, table, wordings
from nanollm.config import atomic_folder
from nanollm.formats import write_jsonl

VERSION = 29  # raise it when images or texts change, so that no old cache is read
SIZES = {"val": 200, "test": 400, "combos": 150}  # images of each split, beside training
PAIRS_TO_CHOOSE = {"combos_val": 80}  # and of what is painted after those for training
HARD_NEGATIVES = 4  # training images side by side that differ in one thing each
N_TEST = {"test": 240, "combos": 100, "val": 96, "combos_val": 64}  # test questions of each task
ABOUT_PAIRS = ("existence", "count", "colour", "place", "comparison", "sum", "more", "coloured")
COUNTING = ("count", "sum", "total")  # for reinforcement learning
TURNS = 4  # questions in a dialogue: so most fit, with their image, into a row of 256 tokens
READER = "Here is a picture in words: {c}\nAsk a question about it, and answer it."

# --- captions ----------------------------------------------------------------------------------

# the others stand
DOES = {"bell": "lie", "candle": "burn", "lantern": "hang", "star": "shine", "kite": "float"}
LISTS = wordings("""
The picture shows {x}. | You can see {x}. | There {be} {x}. | I see {x}. | Look: {x}. | {x}.
This is a picture of {x}. | In the picture there {be} {x}.
""")
SENTENCES = wordings("""
{x} {does} {place}. | {place} {does} {x}. | {place} there {be} {x}. | there {be} {x} {place}.
""")
SEASON_SAID = wordings("""
It is {s}. | The season is {s}. | It is {s} in the village. | The trees look like {s}.
""")
TIME_SAID = table("""
day      The sun is high. | It is day.
evening  It is evening. | The evening comes.
""")
DESCRIBE = wordings("""
Describe the picture. | What do you see? | What is in the picture? | What does the picture show?
Tell me what the picture shows. | Say what is in this picture. | Please describe what you see.
Write a caption for this picture.
""")


def caption(scene, rng):
    """What is in the image: of each group always the number, colour and kind, mostly the place
    (of all groups or of none), often the size, and perhaps the season and the time.
    """
    with_size, with_place = rng.random() < 0.7, rng.random() < 0.9
    parts = []
    for group in rng.sample(scene.groups, len(scene.groups)):
        one = group.number == 1
        number = "a" if rng.random() < 0.7 and one else group.number
        looks = f"{group.size} {group.colour}" if with_size else group.colour
        slots = {"x": f"{number} {named(group.kind, looks, group.number)}"}
        slots |= {"does": DOES.get(group.kind, "stand") + "s" * one, "be": "is" if one else "are"}
        slots["place"] = rng.choice(questions.WHERE[group.place]) if with_place else ""
        parts.append(slots)
    if with_place and rng.random() < 0.33:
        said = " ".join(capitalise(rng.choice(SENTENCES).format(**slots)) for slots in parts)
    else:
        x = " and ".join(f"{slots['x']} {slots['place']}".strip() for slots in parts)
        said = capitalise(rng.choice(LISTS).format(x=x, be=parts[0]["be"]))
    around = [rng.choice(SEASON_SAID).format(s=scene.season)] * (rng.random() < 0.6)
    around += [rng.choice(TIME_SAID[scene.time])] * (rng.random() < 0.25)
    return " ".join([*around, said] if rng.random() < 0.3 else [said, *around])


def description(scene):
    """Everything but the time, the sky first."""
    seen = [look(scene, row, size=True, colour=True) for row in ROWS if scene.in_row(row)]
    return " ".join([f"It is {scene.season}.", *seen])


# --- which questions to ask --------------------------------------------------------------------


def candidates(scene, wording, task, about=None):
    """Questions in this wording that may suit the scene; with `about`, those about that kind, or,
    where what isn't there can be asked for, about what isn't in its row.
    """
    there = [group.kind for group in scene.groups]
    kinds = ROWS[row_of(about)] if about else KINDS
    askable = [kind for kind in kinds if about in (None, kind) or kind not in there]
    if task == "coloured":  # where its kind or its colour is there, "No" takes a look at both
        asked = [
            (kind, colour)
            for group in scene.groups
            for kind, colour in product(ROWS[row_of(group.kind)], COLOURS)
            if about in (None, group.kind) and (kind == group.kind or colour == group.colour)
            if kind in askable
        ]
        asked = [pair for pair in asked if about or not questions.names_held_out(named(*pair))]
        return [Question(task, wording, *pair) for pair in asked]
    if task in ("season", "total"):
        asked = [(None, None)]
    elif task in ("existence", "count"):
        asked = [(kind, None) for kind in askable]
    else:
        alone = task in ("colour", "place")
        asked = [(kind, None) for kind in there] if alone else permutations(there, 2)
        asked = [kinds for kinds in asked if about is None or about in kinds]
    return [Question(task, wording, kind, other=other) for kind, other in asked]


class Balance:
    """Chooses questions so that no answer is more frequent than need be: who guesses, fails."""

    def __init__(self):
        self.used = defaultdict(Counter)

    def choose(self, scene, task, rng, about=None):
        """A Question of the task, or None where the scene has none."""
        for wording in rng.sample(questions.WORDINGS[task], len(questions.WORDINGS[task])):
            by_answer = defaultdict(list)
            for question in candidates(scene, wording, task, about):
                by_answer[truth(scene, question)].append(question)
            by_answer.pop(None, None)
            if by_answer:
                used = self.used[wording]
                rarest = min(rng.sample(sorted(by_answer), len(by_answer)), key=used.__getitem__)
                used[rarest] += 1
                return rng.choice(by_answer[rarest])
        return None


# --- dialogues, test examples, problems --------------------------------------------------------


def about_image(image, turns, **more):
    return {"image": image, "messages": chat([f"<image>\n{turns[0]}", *turns[1:]]), **more}


def dialogue(image, scene, balance, rng):
    """Up to TURNS questions about one image, of different tasks; in every fourth dialogue the
    first asks for a description. Three of four answers that need steps have them.
    """
    turns = [rng.choice(DESCRIBE), description(scene)] if rng.random() < 0.25 else []
    for task in rng.sample(TASKS, len(TASKS)):
        question = balance.choose(scene, task, rng) if len(turns) < 2 * TURNS else None
        if question is not None:
            steps = task in questions.STEPS and rng.random() < 0.75
            turns += [questions.ask(question, scene), questions.completion(scene, question, steps)]
    return about_image(image, turns)


def question_example(image, scene, question):
    check = questions.check_of(truth(scene, question))
    return about_image(image, [questions.ask(question, scene)], **check, task=question.task)


def question_examples(images, tasks, n_each, rng):
    """Up to n_each questions of each task, one to an image; about the object whose colour and kind
    were never together in training, where one is.
    """
    examples, balance = [], Balance()
    for task in tasks:
        made = []
        for image, scene in rng.sample(images, len(images)):
            about = next((group.kind for group in scene.groups if group.held_out), None)
            question = balance.choose(scene, task, rng, about)
            if question is not None:
                made.append(question_example(image, scene, question))
        examples += made[:n_each]
    rng.shuffle(examples)
    return examples


def problems(images, rng):
    """A counting question about each image, for reinforcement learning."""
    balance, examples = Balance(), []
    for (image, scene), task in zip(images, cycle(COUNTING)):
        question = balance.choose(scene, task, rng) or balance.choose(scene, "total", rng)
        examples.append(question_example(image, scene, question))
    return examples


def reader_dialogues(scenes, captions, rng):
    """Text alone: a caption, then a question that it answers, and the answer. So a text model
    learns to write questions about images it never sees (Liu et al. 2023, 2304.08485).
    """
    balance, examples = Balance(), []
    for scene, text in zip(scenes, captions, strict=True):
        for task in rng.sample(TASKS, len(TASKS)):
            question = balance.choose(scene, task, rng)
            if question is not None and tells(text, scene, question):
                answer = questions.completion(scene, question, steps=task in questions.SUMS)
                said = f"Question: {questions.ask(question, scene)}\nAnswer: {answer}"
                examples.append({"messages": chat([READER.format(c=text), said])})
                break
    return examples


def tells(text, scene, question):
    """Does the caption say what the answer tells?"""
    if question.task == "season":
        return scene.season in text
    if question.task in ("existence", "count"):
        return True
    sizes = "bigger" not in question.wording or ("small" in text and "big" in text)
    return sizes and any(place in text for place in PLACES)


# --- splits and files --------------------------------------------------------------------------


def split_scenes(seed, n_train, most_groups=1):
    """{split: scenes}: no scene, whatever its details, is in two splits or twice in one.

    In training HARD_NEGATIVES scenes in a row differ from the first of them in one thing each.
    """
    rng, seen, splits = random.Random(f"pictures-{seed}"), set(), {}
    # the tests don't depend on n_train
    for split, n in {**SIZES, "train": n_train, **PAIRS_TO_CHOOSE}.items():
        scenes, tries = splits.setdefault(split, []), 0
        while len(scenes) < n:
            nth = len(scenes) % HARD_NEGATIVES
            if split == "train" and nth and tries < 50:
                scene = vary(scenes[-nth], rng)
            else:  # also where all that is like it was there before
                scene = random_scene(rng, split.startswith("combos"), most_groups)
            tries += 1
            # tests of more groups are apart from the images of one in each half, too
            fits = split == "train" or scene.crowded == (most_groups > 1)
            if fits and scene.truth not in seen:
                seen.add(scene.truth)
                scenes.append(scene)
                tries = 0
    return splits


def records(split, scenes, seed):
    """{name of the file: its records} for one split."""
    rng = random.Random(f"pictures-{split}-{seed}")
    images = [(f"{split}/{i:05}.png", scene) for i, scene in enumerate(scenes)]
    if split.startswith("combos"):
        name = "combos_test" if split == "combos" else split
        return {name: question_examples(images, ABOUT_PAIRS, N_TEST[split], rng)}
    phrasings = range(2 if split == "train" else 1)
    said = [[caption(scene, rng) for _ in phrasings] for scene in scenes]
    captions = [
        {"image": images[i][0], "caption": said[i][phrasing]}
        for first in range(0, len(images), HARD_NEGATIVES)  # their captions are neighbours, too
        for phrasing in phrasings
        for i in range(len(images))[first : first + HARD_NEGATIVES]
    ]
    made = {f"captions_{split}": captions, f"problems_{split}": problems(images, rng)}
    if split == "test":
        return made | {"questions_test": question_examples(images, TASKS, N_TEST[split], rng)}
    balance = Balance()
    made[f"describe_{split}"] = [
        about_image(image, [rng.choice(DESCRIBE), description(scene)]) for image, scene in images
    ]
    made[f"questions_{split}"] = [dialogue(*each, balance, rng) for each in images]
    made[f"reader_{split}"] = reader_dialogues(scenes, [texts[0] for texts in said], rng)
    if split == "val":
        made["examples_val"] = question_examples(images, TASKS, N_TEST[split], rng)
    return made


def prepare(seed=0, root="data/cache", size=96, n_train=6000, most_groups=1):
    """Paint and write everything once and return the folder; later calls find it there.

    Images are train/00000.png and so on in train, val, test and combos; paths in the files are
    relative to the folder. data/README.md says what is in each file.
    """
    groups = "" if most_groups == 1 else f"-{most_groups}groups"
    folder = Path(root) / f"images-{seed}-{size}px-{n_train}{groups}-v{VERSION}"
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as new:
        for split, scenes in split_scenes(seed, n_train, most_groups).items():
            (new / split).mkdir()
            truths = [{"image": f"{split}/{i:05}.png", **asdict(s)} for i, s in enumerate(scenes)]
            for scene, record in zip(scenes, truths):
                draw(scene, size).save(new / record["image"], compress_level=1)
            for name, rows in records(split, scenes, seed).items():
                write_jsonl(new / f"{name}.jsonl", rows)
            (new / f"scenes_{split}.json").write_text(json.dumps(truths), encoding="utf-8")
    return folder


def of_run(run_folder):
    """The images that a run was trained on; the default ones where its settings don't say."""
    names = {"size": "image_size", "n_train": "images", "most_groups": "most_groups"}
    return prepare(**settings_of(run_folder, **names))
