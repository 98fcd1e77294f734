"""The images show what their texts say, the tests are held out, and guessing doesn't pay."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from data.village import images as village_images
from data.village.captions import DESCRIBE, caption, description
from data.village.image_examples import blind_guess, tells
from data.village.image_questions import FAMILIES, LOOKS, STEPS, WORDINGS, is_true, read
from data.village.images import answer_of, prepare, records, split_scenes
from data.village.scenes import (
    CELL,
    COLOURS,
    DRAWN,
    HELD_OUT,
    KINDS,
    PLACES,
    SEASONS,
    UNITS,
    Group,
    Pen,
    Scene,
    draw,
    layout,
    random_scene,
    row_of,
    tinted,
)
from data.village.tasks import user_turns
from nanollm.rewards import check_answer

N_TRAIN = 300
VILLAGE = Scene(
    "autumn",
    "day",
    (
        Group("cup", "red", "big", "left", 1),
        Group("candle", "yellow", "small", "right", 3),
        Group("lantern", "blue", "small", "left", 2),
    ),
    7,
)


@pytest.fixture(scope="module")
def scenes():
    return split_scenes(0, N_TRAIN)


@pytest.fixture(scope="module")
def files(scenes):
    """{split: {name: records}}, and the scene of every image."""
    return {split: records(split, scenes[split], 0) for split in scenes}


@pytest.fixture(scope="module")
def scene_of(scenes):
    return {
        f"{split}/{i:05}.png": scene for split in scenes for i, scene in enumerate(scenes[split])
    }


def turns(example):
    """The (question, answer) pairs of a dialogue, without those that describe the whole image."""
    said = [message["content"].removeprefix("<image>\n") for message in example["messages"]]
    return [pair for pair in zip(said[::2], said[1::2]) if pair[0] not in DESCRIBE]


# --- scenes and drawings ----------------------------------------------------------


def test_the_same_seed_gives_the_same_scenes_and_pixels_and_another_seed_others(scenes):
    assert split_scenes(0, N_TRAIN) == scenes
    assert split_scenes(1, 20)["train"] != split_scenes(0, 20)["train"]
    assert draw(VILLAGE).tobytes() == draw(VILLAGE).tobytes()
    assert draw(VILLAGE, 224).size == (224, 224) and draw(VILLAGE).mode == "RGB"


def test_no_scene_is_in_two_splits_and_the_tests_do_not_depend_on_the_training(scenes):
    truths = [scene.truth for split in scenes.values() for scene in split]
    assert len(set(truths)) == len(truths)
    assert {split: len(drawn) for split, drawn in scenes.items()} == {
        "train": N_TRAIN,
        "val": 200,
        "test": 400,
        "combos": 150,
    }
    assert split_scenes(0, 20)["test"] == scenes["test"]


def test_nothing_overlaps_leaves_the_frame_or_its_third_of_the_image(scenes):
    for scene in scenes["test"] + scenes["combos"]:
        objects = layout(scene)
        assert Counter(group.kind for group, *_ in objects) == {
            group.kind: group.number for group in scene.groups
        }
        for i, (group, x, y, half, _) in enumerate(objects):
            assert half <= y <= UNITS - half
            left = PLACES.index(group.place) * CELL
            assert left <= x - half and x + half <= left + CELL
            assert all(
                max(abs(x - u), abs(y - v)) >= half + other - 1e-9
                for _, u, v, other, _ in objects[:i]
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turn", (1, -1))
def test_an_object_fills_its_square_and_stays_in_it(kind, turn):
    image = Image.new("RGB", (400, 400))
    pen = Pen(image, 1)
    pen.outline = 0.11 * 100
    DRAWN[kind](pen, 200, 200, 100, (255, 255, 255), turn)
    left, top, right, bottom = image.getbbox()
    assert min(left, top) >= 95 and max(right, bottom) <= 305  # half an outline more
    assert right - left >= 140 and bottom - top >= 180


def test_a_small_object_measures_nine_pixels():
    one = Scene("winter", "day", (Group("bell", "blue", "small", "left", 1),), 3)
    white = Scene("winter", "day", (), 3)
    left, top, right, bottom = ImageChops.difference(draw(one), draw(white)).getbbox()
    assert right - left >= 9 and bottom - top >= 9


def test_another_colour_changes_the_pixels_of_the_object_alone():
    cup, *others = VILLAGE.groups
    blue = Scene("autumn", "day", (Group("cup", "blue", "big", "left", 1), *others), 7)
    changed = ImageChops.difference(draw(VILLAGE, 64), draw(blue, 64)).getbbox()
    x, y, half = next(placed[1:4] for placed in layout(VILLAGE) if placed[0] == cup)
    assert changed[0] >= x - half - 1 and changed[2] <= x + half + 1
    assert changed[1] >= y - half - 1 and changed[3] <= y + half + 1
    assert changed[2] - changed[0] > 9


def test_every_season_paints_other_trees_and_another_ground():
    painted = [draw(Scene(season, "day", (), 5), 64) for season in SEASONS]
    grounds = {image.getpixel((32, 60)) for image in painted}
    trees = {image.resize((1, 1), box=(0, 20, 64, 32)).getpixel((0, 0)) for image in painted}
    assert len(grounds) == len(trees) == 4


def test_a_image_too_small_for_its_objects_is_refused():
    with pytest.raises(ValueError, match="at least 32 pixels"):
        draw(VILLAGE, 16)


def test_every_group_has_a_tint_of_its_colour():
    red = [tinted(VILLAGE.groups[0], seed) for seed in range(50)]
    assert len(set(red)) > 40
    for tint in red:
        distances = {name: math.dist(tint, colour) for name, colour in COLOURS.items()}
        assert min(distances, key=distances.get) == "red"


def test_a_scene_comes_back_from_its_record():
    assert Scene.from_dict(json.loads(json.dumps(VILLAGE.as_dict()))) == VILLAGE


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


def test_captions_tell_images_apart_and_vary(files):
    texts = [row["caption"] for row in files["test"]["captions_test"]]
    assert len(set(texts)) >= len(texts) - 2
    rng = random.Random(0)
    assert len({caption(VILLAGE, rng) for _ in range(200)}) > 150


def test_a_description_tells_everything_the_sky_first():
    assert description(VILLAGE) == (
        "It is autumn. In the sky I see small blue lanterns: 2, on the left. On the ground I see "
        "big red cups: 1, on the left; small yellow candles: 3, on the right."
    )


# --- questions --------------------------------------------------------------------


def test_every_answer_in_a_dialogue_is_true(files, scene_of):
    asked = Counter()
    for split in ("train", "val"):
        for example in files[split][f"questions_{split}"]:
            assert example["messages"][0]["content"].startswith("<image>\n")
            for question, answer in turns(example):
                assert is_true(scene_of[example["image"]], question, answer), (question, answer)
                asked[read(question).task] += 1
    assert set(asked) == set(FAMILIES) and min(asked.values()) > 100


def test_every_test_answer_is_the_checkers(files, scene_of):
    for name in ("questions_test", "problems_test", "combos_test"):
        for example in files["combos" if name == "combos_test" else "test"][name]:
            (question,) = user_turns(example)
            assert answer_of(scene_of[example["image"]], question) == example["answer"]
            assert read(question).task == example["task"]
            assert check_answer(example, f"It is {example['answer']}.")


def test_three_of_four_answers_that_need_steps_have_them(files):
    worked = [
        answer.startswith("<think>")
        for example in files["train"]["questions_train"]
        for question, answer in turns(example)
        if read(question).task in STEPS
    ]
    assert 0.68 < sum(worked) / len(worked) < 0.82
    for example in files["train"]["questions_train"]:
        for _, answer in turns(example):
            assert answer.count("<think>") == answer.count("</think>") <= 1


def test_recounting_by_hand_gives_the_same_answers():
    for question, answer in {
        "Are there any red cups?": "yes",
        "Do you see any blue cups?": "no",
        "Are there any baskets?": "no",
        "How many yellow candles are there?": "3",
        "Count the red candles.": "0",
        "What colour is the cup?": "red",
        "Where are the candles?": "right",
        "Where are the lanterns?": "left",
        "Are there more lanterns than candles?": "no",
        "Are there fewer lanterns than candles?": "yes",
        "Is a lantern bigger here than a cup?": "no",
        "Are the cups bigger than the lanterns?": "yes",
        "How many lanterns and candles are there together?": "5",
        "Which are more, lanterns or candles, and by how many?": "1",
        "How many things are there in all, not counting the trees?": "6",
        "Which season is it?": "autumn",
        "<image>\nwhich season is it?": "autumn",
    }.items():
        assert answer_of(VILLAGE, question) == answer, question


def test_what_has_no_answer_or_cannot_be_read_has_none():
    for question in (
        "What colour is the basket?",
        "Where is the green cup?",
        "Who lives here?",
        "Is a lantern bigger here than a candle?",
        "How many dogs are there?",
        "Are there more lanterns than lanterns?",
        "",
    ):
        assert answer_of(VILLAGE, question) is None
        assert not is_true(VILLAGE, question, "Yes, there are 3.")


@pytest.mark.parametrize(
    "question, right, wrong",
    [
        ("Are there any red cups?", "Yes, there is a red cup.", "No, there is no red cup."),
        ("Are there any red cups?", "Yes.", "Yes, there is a blue cup."),
        (
            "Are there any bells?",
            "<think>On the ground: cups 1, candles 3. So bells 0.</think>No.",
            "<think>On the ground: cups 2, candles 3. So bells 0.</think>No.",
        ),
        ("Are there any baskets?", "No.", "No, there is no cup."),
        ("How many lanterns are there?", "There are 2 blue lanterns.", "There are 2 red lanterns."),
        ("How many lanterns are there?", "2", "There are 3 candles and 2 baskets."),
        ("What colour is the cup?", "It is red.", "It isn't red."),
        ("Where are the lanterns?", "They are on the left.", "They are on the left or the right."),
        ("Are there fewer lanterns than candles?", "Yes, there are fewer.", "Yes, there are more."),
        (
            "Are the cups bigger than the lanterns?",
            "Yes, they are bigger.",
            "Yes, they are smaller.",
        ),
        (
            "How many lanterns and candles are there together?",
            "<think>There are 2 lanterns and 3 candles. 2 + 3 = 5.</think>The answer is 5.",
            "<think>There are 1 lanterns and 4 candles. 1 + 4 = 5.</think>The answer is 5.",
        ),
        (
            "How many lanterns and candles are there together?",
            "<think>I see blue lanterns: 2, on the left. 2 + 3 = 5.</think>The answer is 5.",
            "<think>I see red lanterns: 2, on the left. 2 + 3 = 5.</think>The answer is 5.",
        ),
        (
            "How many lanterns and candles are there together?",
            "5 in all.",
            "<think>2 + 2 = 5.</think>The answer is 5.",
        ),
        ("Which season is it?", "It is autumn.", "It is autumn or winter."),
        (
            "Which season is it?",
            f"<think>{LOOKS['autumn']}</think>It is autumn.",
            f"<think>{LOOKS['winter']}</think>It is autumn.",
        ),
        (
            "Where are the lanterns?",
            "In the sky I see blue lanterns: 2, on the left.",
            "In the sky I see big blue lanterns: 2, on the left.",
        ),
        (
            "Where are the lanterns?",
            "In the sky I see small lanterns: 2, on the left.",
            "On the ground I see small lanterns: 2, on the left.",
        ),
        (
            "How many lanterns and candles are there together?",
            "<think>In the sky I see lanterns: 2, on the left. 2 + 3 = 5.</think>The answer is 5.",
            "<think>In the sky I see nothing. 2 + 3 = 5.</think>The answer is 5.",
        ),
        ("Are there any lanterns?", "Yes, on the left.", "Yes, on the right."),
        (
            "Are there any lanterns?",
            "Yes, 2 lanterns in the sky.",
            "Yes, 2 lanterns on the ground.",
        ),
        ("What colour are the lanterns?", "They are blue.", "Anything but blue."),
    ],
)
def test_the_checker_knows_right_from_wrong(question, right, wrong):
    assert is_true(VILLAGE, question, right)
    assert not is_true(VILLAGE, question, wrong)


def test_the_teachers_words_are_checked_in_any_case_and_with_spaces():
    assert is_true(VILLAGE, " How many  Yellow candles are there? ", "There are 3 Yellow Candles.")


def test_every_wording_is_read_as_itself(files):
    texts = [q for example in files["train"]["questions_train"] for q, _ in turns(example)]
    assert {read(text).wording for text in texts} == {w for ws in WORDINGS.values() for w in ws}
    assert len({w for ws in WORDINGS.values() for w in ws}) == sum(map(len, WORDINGS.values()))


def test_nothing_is_asked_twice_in_a_dialogue(files):
    for example in files["train"]["questions_train"]:
        tasks = [read(question).task for question, _ in turns(example)]
        assert len(set(tasks)) == len(tasks) <= 4


# --- what is held out, and what a guess gets -----------------------------------------


def pairs_in(text):
    """The (kind, colour) pairs that a text names."""
    found = re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})", text.lower())
    return {(kind, colour) for colour, kind in found}


def test_the_held_out_pairs_occur_in_no_training_scene_or_text(scenes, files):
    for split in ("train", "val", "test"):
        for scene in scenes[split]:
            assert not any(HELD_OUT.get(g.kind) == g.colour for g in scene.groups)
        named = pairs_in(json.dumps(files[split]))
        assert not named & set(HELD_OUT.items())
        if split == "train":  # every other pair occurs
            assert len(named) == len(KINDS) * len(COLOURS) - len(HELD_OUT)


def test_the_pairs_of_combos_are_all_asked_about(scenes, files, scene_of):
    held_out = Counter()
    for example in files["combos"]["combos_test"]:
        question = read(user_turns(example)[0])
        groups = [
            scene_of[example["image"]].group(kind) for kind in (question.kind, question.other)
        ]
        seen = scene_of[example["image"]].groups
        (pair,) = [g for g in seen if HELD_OUT.get(g.kind) == g.colour]
        # what isn't there is asked for where the pair is
        assert pair in groups or (
            groups == [None, None] and row_of(question.kind) == row_of(pair.kind)
        )
        held_out[pair.kind] += 1
    assert set(held_out) == set(HELD_OUT) and min(held_out.values()) > 60


def test_there_are_at_least_200_test_questions_of_every_task(files):
    counts = Counter(example["task"] for example in files["test"]["questions_test"])
    assert set(counts) == set(FAMILIES) and min(counts.values()) >= 200


def test_a_guess_without_the_image_gets_little(files):
    examples = files["test"]["questions_test"]
    blind = blind_guess(examples)
    assert sum(blind.values()) / len(blind) < 0.4
    assert blind["existence"] < 0.55 and blind["comparison"] < 0.55
    assert (
        max(share for task, share in blind.items() if task not in ("existence", "comparison")) < 0.5
    )
    counts = Counter(example["answer"] for example in examples if example["task"] == "count")
    assert set(counts) == set("0123") and max(counts.values()) < 80


def test_blind_guess_takes_the_most_frequent_answer_of_each_wording():
    def example(question, answer):
        return {
            "messages": [{"role": "user", "content": question}],
            "answer": answer,
            "task": read(question).task,
        }

    examples = [
        example("How many lanterns are there?", "1"),
        example("How many bells are there?", "1"),
        example("Count the lanterns.", "2"),
        example("How many lanterns are there?", "3"),
    ]
    assert blind_guess(examples) == {"count": 0.75}


# --- text alone ----------------------------------------------------------------------


def test_a_reader_is_asked_for_what_the_caption_tells(files, scenes):
    examples = files["val"]["reader_val"]
    assert len(examples) == len(scenes["val"])
    for example, scene in zip(examples, scenes["val"]):
        words, completion = (message["content"] for message in example["messages"])
        text = words.removeprefix("Here is a image in words: ").split("\n")[0]
        question, answer = re.fullmatch("Question: (.*)\nAnswer: (.*)", completion).groups()
        assert is_true(scene, question, answer) and tells(text, scene, read(question))
    assert len(
        {read(example["messages"][1]["content"].split("\n")[0][10:]).task for example in examples}
    ) == len(FAMILIES)


# --- files ---------------------------------------------------------------------------


def test_prepare_writes_everything_once(tmp_path, monkeypatch):
    monkeypatch.setattr(village_images, "SIZES", {"val": 5, "test": 12, "combos": 5})
    folder = prepare(root=tmp_path, n_train=20)
    assert prepare(root=tmp_path, n_train=20) == folder and list(tmp_path.iterdir()) == [folder]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "train",
        "val",
        "test",
        "combos",
        "captions_train.jsonl",
        "captions_val.jsonl",
        "captions_test.jsonl",
        "describe_train.jsonl",
        "describe_val.jsonl",
        "questions_train.jsonl",
        "questions_val.jsonl",
        "questions_test.jsonl",
        "combos_test.jsonl",
        "problems_train.jsonl",
        "problems_test.jsonl",
        "reader_train.jsonl",
        "reader_val.jsonl",
        "scenes_train.json",
        "scenes_val.json",
        "scenes_test.json",
        "scenes_combos.json",
    }
    for path in folder.glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            assert "reader" in path.name or (folder / row["image"]).is_file()
    for record in json.loads((folder / "scenes_test.json").read_text()):
        image = Image.open(folder / record["image"])
        assert image.tobytes() == draw(Scene.from_dict(record)).tobytes()


def test_a_preparation_that_breaks_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left on the device")

    monkeypatch.setattr(village_images, "records", full)
    with pytest.raises(OSError, match="no space left"):
        prepare(root=tmp_path, n_train=5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least one image"):
        prepare(root=tmp_path, n_train=0)


def test_the_script_prints_samples_and_paints_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(village_images, "SIZES", {"val": 5, "test": 60, "combos": 5})
    village_images.show(0, 1)
    shown = capsys.readouterr().out
    assert "== questions_test" in shown and "blind guess" in shown
    rng = random.Random(0)
    sheet = village_images.contact_sheet([random_scene(rng) for _ in range(24)], rng)
    sheet.save(Path(tmp_path) / "sheet.png")
    assert sheet.width > 1000
