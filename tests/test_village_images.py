"""The images show what their texts say, the tests are held out, and guessing doesn't pay."""

import json
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import asdict

import pytest
from PIL import Image, ImageChops, ImageDraw

from data.village import __main__ as village_command
from data.village import images as village_images
from data.village.image_questions import (
    LOOKS,
    STEPS,
    TASKS,
    WORDINGS,
    answer_of,
    completion,
    is_true,
    names_held_out,
    read,
)
from data.village.images import (
    DESCRIBE,
    caption,
    description,
    prepare,
    records,
    split_scenes,
    tells,
)
from data.village.scenes import (
    CELL,
    COLOURS,
    HELD_OUT,
    KINDS,
    PLACES,
    SEASONS,
    UNITS,
    Group,
    Scene,
    draw,
    draw_object,
    layout,
    row_of,
    tinted,
)
from data.village.tasks import user_turns
from nanollm.rewards import check_answer

N_TRAIN = 300
CUP = Group("cup", "red", "big", "left", 1)
CANDLES = Group("candle", "yellow", "small", "right", 3)
LANTERNS = Group("lantern", "blue", "small", "left", 2)
VILLAGE = Scene("autumn", "day", (CUP, CANDLES, LANTERNS), 7)


@pytest.fixture(scope="module", params=(1, 2), ids=("one group", "two groups"))
def most_groups(request):
    return request.param


@pytest.fixture(scope="module")
def scenes(most_groups):
    return split_scenes(0, N_TRAIN, most_groups)


@pytest.fixture(scope="module")
def files(scenes):
    """{split: {name: records}}."""
    return {split: records(split, scenes[split], 0) for split in scenes}


@pytest.fixture(scope="module")
def scene_of(scenes):
    return {f"{name}/{i:05}.png": s for name in scenes for i, s in enumerate(scenes[name])}


def turns(example):
    """The (question, answer) pairs of a dialogue, without those that describe the whole image."""
    said = [message["content"].removeprefix("<image>\n") for message in example["messages"]]
    return [pair for pair in zip(said[::2], said[1::2]) if pair[0] not in DESCRIBE]


# --- scenes and drawings ----------------------------------------------------------


def test_the_same_seed_gives_the_same_pixels_and_another_seed_other_scenes(scenes):
    assert split_scenes(1, 4)["train"] != scenes["train"][:4]
    assert draw(VILLAGE).tobytes() == draw(VILLAGE).tobytes()
    assert draw(VILLAGE, 224).size == (224, 224) and draw(VILLAGE).mode == "RGB"


def test_no_scene_is_in_two_splits_and_the_tests_do_not_depend_on_the_training(scenes, most_groups):
    truths = [scene.truth for split in scenes.values() for scene in split]
    assert len(set(truths)) == len(truths)
    sizes = {split: len(drawn) for split, drawn in scenes.items()}
    assert sizes == {"train": N_TRAIN, "val": 200, "test": 400, "combos": 150, "combos_val": 80}
    assert split_scenes(0, 20, most_groups)["test"] == scenes["test"]
    crowded = {split: {scene.crowded for scene in drawn} for split, drawn in scenes.items()}
    assert crowded.pop("train") == ({True, False} if most_groups == 2 else {False})
    assert all(each == {most_groups == 2} for each in crowded.values())


def test_four_training_scenes_in_a_row_differ_from_the_first_in_one_thing(scenes):
    changed = Counter()
    for first in range(0, N_TRAIN, 4):
        one, *others = scenes["train"][first : first + 4]
        for other in others:
            assert (one.season, len(one.groups)) == (other.season, len(other.groups))
            pairs = [(a, b) for a, b in zip(one.groups, other.groups) if a != b]
            things = [k for a, b in pairs for k, v in asdict(a).items() if v != asdict(b)[k]]
            assert len(things) == 1 or things == ["colour", "colour"], (one, other)
            changed[" ".join(things)] += 1
    assert min(changed.values()) > 5 and len(changed) == 5


def test_nothing_overlaps_leaves_the_frame_or_its_third_of_the_image(scenes):
    for scene in scenes["test"] + scenes["combos"]:
        objects = layout(scene)
        numbers = Counter(group.kind for group, *_ in objects)
        assert numbers == {group.kind: group.number for group in scene.groups}
        for i, (group, x, y, half, _) in enumerate(objects):
            left = PLACES.index(group.place) * CELL
            assert half <= y <= UNITS - half and left <= x - half and x + half <= left + CELL
            for _, u, v, other, _ in objects[:i]:
                assert max(abs(x - u), abs(y - v)) >= half + other - 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turn", (1, -1))
def test_an_object_fills_its_square_and_stays_in_it(kind, turn):
    image = Image.new("RGB", (400, 400))
    draw_object(ImageDraw.Draw(image), kind, 200, 200, 100, (255, 255, 255), turn)
    left, top, right, bottom = image.getbbox()
    assert min(left, top) >= 95 and max(right, bottom) <= 305  # half an outline more
    assert right - left >= 140 and bottom - top >= 180


def test_another_colour_changes_the_pixels_of_the_object_alone():
    blue = Scene("autumn", "day", (Group("cup", "blue", "big", "left", 1), CANDLES, LANTERNS), 7)
    changed = ImageChops.difference(draw(VILLAGE, 64), draw(blue, 64)).getbbox()
    x, y, half = next(placed[1:4] for placed in layout(VILLAGE) if placed[0] == CUP)
    assert changed[0] >= x - half - 1 and changed[2] <= x + half + 1
    assert changed[1] >= y - half - 1 and changed[3] <= y + half + 1
    assert changed[2] - changed[0] > 9


def test_every_season_paints_other_trees_and_another_ground():
    painted = [draw(Scene(season, "day", (), 5), 64) for season in SEASONS]
    grounds = {image.getpixel((32, 60)) for image in painted}
    trees = {image.resize((1, 1), box=(0, 20, 64, 32)).getpixel((0, 0)) for image in painted}
    assert len(grounds) == len(trees) == 4


def test_an_image_too_small_for_its_objects_is_refused():
    with pytest.raises(ValueError, match="at least 32 pixels"):
        draw(VILLAGE, 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_object_looks_like_its_colour_as_every_painter_mixes_it(kind, colour):
    def nearest(pixel):
        return min(COLOURS, key=lambda name: math.dist(pixel, COLOURS[name]))

    tints = {tinted(Group(kind, colour, "small", "left", 1), seed) for seed in range(50)}
    assert len(tints) > 40 and {*map(nearest, tints)} == {colour}
    image = draw(Scene("winter", "day", (Group(kind, colour, "small", "middle", 1),), 3))
    near = Counter(nearest(pixel) for pixel in image.getdata() if max(pixel) - min(pixel) > 90)
    assert near[colour] > 0.6 * sum(near.values()), near


# --- captions ---------------------------------------------------------------------


def test_a_caption_names_number_colour_and_kind_of_every_group(scenes):
    rng = random.Random(0)
    for scene in scenes["test"]:
        text = caption(scene, rng).lower()
        for group in scene.groups:
            number = "(?:a|1)" if group.number == 1 else str(group.number)
            noun = group.kind if group.number == 1 else KINDS[group.kind]
            assert re.search(rf"\b{number} (?:(?:big|small) )?{group.colour} {noun}\b", text)
        assert all(season not in text for season in SEASONS if season != scene.season)


def test_a_description_tells_everything_the_sky_first():
    assert description(VILLAGE) == (
        "It is autumn. In the sky I see small blue lanterns: 2, on the left. On the ground I see "
        "big red cups: 1, on the left; small yellow candles: 3, on the right."
    )


# --- questions --------------------------------------------------------------------


def test_every_answer_in_a_dialogue_is_true_and_nothing_is_asked_twice(files, scene_of):
    asked, steps = Counter(), Counter()
    for split in ("train", "val"):
        for example in files[split][f"questions_{split}"]:
            assert example["messages"][0]["content"].startswith("<image>\n")
            tasks = [read(question).task for question, _ in turns(example)]
            assert len(set(tasks)) == len(tasks) <= 4
            for question, answer in turns(example):
                assert is_true(scene_of[example["image"]], question, answer), (question, answer)
                assert answer.count("<think>") == answer.count("</think>") <= 1
                steps[answer.startswith("<think>")] += read(question).task in STEPS
            asked.update(tasks)
    assert set(asked) == set(TASKS) and min(asked.values()) > 100
    assert 0.68 < steps[True] / sum(steps.values()) < 0.82  # three of four that need steps


@pytest.mark.parametrize(
    "question, said",
    [
        ("Are there more lanterns than candles?", "3: more no, fewer yes. So more no.</think>No."),
        ("Are there any blue cups?", "purple no. So blue no.</think>No."),
        ("Are there any red cups?", "purple no. So red yes.</think>Yes."),
        ("Are there any red stars?", "lanterns 2, stars 0, kites 0. So stars 0.</think>No."),
        (
            "Count everything but the trees. How many things are there?",
            "2 + 1 = 3. 3 + 3 = 6.</think>The answer is 6.",
        ),
    ],
)
def test_what_follows_from_a_look_is_looked_up_or_added_one_by_one(question, said):
    assert completion(VILLAGE, read(question), steps=True).endswith(said)


OF_SPLIT = {"test": ["questions_test", "problems_test"], "combos": ["combos_test"]}
OF_SPLIT |= {"val": ["examples_val"], "combos_val": ["combos_val"]}


@pytest.mark.parametrize("split, name", [(s, n) for s, names in OF_SPLIT.items() for n in names])
def test_every_test_answer_is_the_checkers(files, scene_of, split, name):
    for example in files[split][name]:
        (question,) = user_turns(example)
        assert answer_of(scene_of[example["image"]], question) == example["answer"]
        assert read(question).task == example["task"]
        assert check_answer(example, f"It is {example['answer']}.")


ANSWERS = """
yes: Are there any red cups? | no: Do you see any blue cups? | no: Are there any baskets?
3: How many yellow candles are there? | 0: Count the red candles. | red: What colour is the cup?
right: Where are the candles? | left: Where are the lanterns? | autumn: <image> which season is it?
no: Are there more lanterns than candles? | yes: Are there fewer lanterns than candles?
no: Is a lantern bigger here than a cup? | yes: Are the cups bigger than the lanterns?
5: How many lanterns and candles are there together? | autumn: Which season is it?
1: Which are more, lanterns or candles, and by how many?
6: How many things are there in all, not counting the trees?
none: What colour is the basket? | none: Where is the green cup? | none: How many dogs are there?
none: Is a lantern bigger here than a candle? | none: Are there more cups than cups?
none: Who lives here? | none: What?
"""


@pytest.mark.parametrize("entry", re.split(r" \| |\n", ANSWERS.strip()))
def test_recounting_by_hand_gives_the_same_answers(entry):
    answer, question = entry.split(": ")
    assert (answer_of(VILLAGE, question) or "none") == answer
    assert answer != "none" or not is_true(VILLAGE, question, "Yes, there are 3.")


TOGETHER = "How many lanterns and candles are there together?"
WHERE, SMALL = "Where are the lanterns?", "I see small lanterns: 2, on the left."


@pytest.mark.parametrize(
    "question, right, wrong",
    [
        ("Are there any red cups?", "Yes, there is a red cup.", "No, there is no red cup."),
        ("Are there any red cups?", "Yes.", "Yes, there is a blue cup."),
        ("Are there any baskets?", "No.", "No, there is no cup."),
        ("Are there any lanterns?", "Yes, on the left.", "Yes, on the right."),
        ("Are there any lanterns?", "Yes, in the sky.", "Yes, 2 lanterns on the ground."),
        ("How many lanterns are there?", "There are 2 blue lanterns.", "There are 2 red lanterns."),
        ("How many lanterns are there?", "2", "There are 3 candles and 2 baskets."),
        ("How many  Blue lanterns are there? ", "There are 2 Blue Lanterns.", "1 Blue Lantern."),
        ("What colour is the cup?", "It is red.", "It isn't red."),
        ("What colour are the lanterns?", "They are blue.", "Anything but blue."),
        (WHERE, "They are on the left.", "They are on the left or the right."),
        ("Are there fewer lanterns than candles?", "Yes, there are fewer.", "Yes, there are more."),
        ("Are the cups bigger than the lanterns?", "Yes, bigger.", "Yes, they are smaller."),
        ("Which season is it?", "It is autumn.", "It is autumn or winter."),
        (TOGETHER, "5 in all.", "<think>2 + 2 = 5.</think>The answer is 5."),
    ],
)
def test_the_checker_knows_right_from_wrong(question, right, wrong):
    assert is_true(VILLAGE, question, right)
    assert not is_true(VILLAGE, question, wrong)


@pytest.mark.parametrize(
    "question, thought, wrong, answer",
    [
        ("Are there any bells?", "On the ground: cups 1, candles 3.", "cups 2, candles 3.", "No."),
        (TOGETHER, "There are 2 lanterns and 3 candles.", "There are 1 lanterns, 4 candles.", "5."),
        (TOGETHER, "I see blue lanterns: 2.", "I see red lanterns: 2.", "5."),
        (TOGETHER, "In the sky I see lanterns: 2, on the left.", "In the sky I see nothing.", "5."),
        ("Which season is it?", LOOKS["autumn"], LOOKS["winter"], "It is autumn."),
        (WHERE, f"In the sky {SMALL}", f"On the ground {SMALL}", "They are on the left."),
        (WHERE, f"In the sky {SMALL}", f"In the sky {SMALL.replace('small', 'big')}", "Left."),
    ],
)
def test_what_is_thought_has_to_be_true_too(question, thought, wrong, answer):
    assert is_true(VILLAGE, question, f"<think>{thought}</think>{answer}")
    assert not is_true(VILLAGE, question, f"<think>{wrong}</think>{answer}")


def test_every_wording_is_read_as_itself(files):
    texts = [q for example in files["train"]["questions_train"] for q, _ in turns(example)]
    wordings = {(task, wording) for task in TASKS for wording in WORDINGS[task]}
    assert {read(text)[:2] for text in texts} == wordings


# --- what is held out, and what a guess gets -----------------------------------------


def test_the_held_out_pairs_occur_in_no_training_scene_or_text(scenes, files):
    for split in ("train", "val", "test"):
        assert not any(group.held_out for scene in scenes[split] for group in scene.groups)
        text = json.dumps(files[split]).lower()
        named = set(re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})", text))
        assert not {(kind, colour) for colour, kind in named} & set(HELD_OUT.items())
        if split == "train":  # every other pair occurs
            assert len(named) == len(KINDS) * len(COLOURS) - len(HELD_OUT)
    assert names_held_out("Two red baskets.") and not names_held_out("A lantern, a blue basket.")


def test_the_pairs_of_combos_are_all_asked_about(files, scene_of):
    held_out = Counter()
    for example in files["combos"]["combos_test"]:
        question, scene = read(user_turns(example)[0]), scene_of[example["image"]]
        (pair,) = [group for group in scene.groups if group.held_out]
        groups = [scene.group(kind) for kind in (question.kind, question.other)]
        # what isn't there is asked for where the pair is
        there = groups == [None, None] and row_of(question.kind) == row_of(pair.kind)
        assert pair in groups or there
        held_out[pair.kind] += 1
    assert set(held_out) == set(HELD_OUT) and min(held_out.values()) > 60


def test_a_guess_without_the_image_gets_little(files):
    examples, answers = files["test"]["questions_test"], defaultdict(Counter)
    for example in examples:
        question = read(user_turns(example)[0])
        answers[question.task, question.wording][example["answer"]] += 1
    asked = Counter(example["task"] for example in examples)
    assert set(asked) == set(TASKS) and min(asked.values()) >= 200
    guess = Counter()  # the most frequent answer to each wording
    for (task, _), counts in answers.items():
        guess[task] += max(counts.values()) / asked[task]
    assert sum(guess.values()) / len(guess) < 0.4
    asks_yes_or_no = {"existence", "coloured", "comparison"}
    assert all(guess[task] < (0.55 if task in asks_yes_or_no else 0.5) for task in TASKS)
    counts = Counter(example["answer"] for example in examples if example["task"] == "count")
    assert set(counts) == set("0123") and max(counts.values()) < 80


# --- text alone ----------------------------------------------------------------------


def test_a_reader_is_asked_for_what_the_caption_tells(files, scenes):
    tasks = set()
    for example, scene in zip(files["val"]["reader_val"], scenes["val"], strict=True):
        words, completion = (message["content"] for message in example["messages"])
        text = words.removeprefix("Here is a picture in words: ").split("\n")[0]
        question, answer = re.fullmatch("Question: (.*)\nAnswer: (.*)", completion).groups()
        assert is_true(scene, question, answer) and tells(text, scene, read(question))
        tasks.add(read(question).task)
    assert tasks == set(TASKS)


# --- files ---------------------------------------------------------------------------

FILES = """
captions_test.jsonl captions_train.jsonl captions_val.jsonl combos combos_test.jsonl combos_val
combos_val.jsonl describe_train.jsonl describe_val.jsonl examples_val.jsonl problems_test.jsonl
problems_train.jsonl problems_val.jsonl questions_test.jsonl questions_train.jsonl
questions_val.jsonl reader_train.jsonl reader_val.jsonl scenes_combos.json scenes_combos_val.json
scenes_test.json scenes_train.json scenes_val.json test train val
"""


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(village_images, "SIZES", {"val": 5, "test": 12, "combos": 5})


def test_prepare_writes_everything_once(tmp_path, few):
    folder = prepare(root=tmp_path, n_train=20)
    assert prepare(root=tmp_path, n_train=20) == folder and list(tmp_path.iterdir()) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == FILES.split()
    for path in folder.glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            assert "reader" in path.name or (folder / row["image"]).is_file()
    for record in json.loads((folder / "scenes_test.json").read_text()):
        image = Image.open(folder / record["image"])
        assert image.tobytes() == draw(Scene.from_dict(record)).tobytes()
    crowded = prepare(root=tmp_path, n_train=4, most_groups=2)
    assert crowded != folder and len(list(tmp_path.iterdir())) == 2


def test_a_preparation_that_breaks_leaves_nothing_behind(tmp_path, few, monkeypatch):
    monkeypatch.setattr(village_images, "records", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(root=tmp_path, n_train=5)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_samples_of_what_is_said_about_images(
    tmp_path, few, monkeypatch, capsys
):
    monkeypatch.setattr(village_images, "prepare", lambda seed: prepare(seed, tmp_path, n_train=5))
    monkeypatch.setattr(village_command, "prepare", lambda *settings: tmp_path)
    village_command.main(village_command.Config(images=True, samples=1))
    assert "questions_test.jsonl: " in capsys.readouterr().out
