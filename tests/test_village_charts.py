"""Charts show the numbers that their texts tell, answers follow from them, splits are apart."""

import json
import re
from collections import Counter, defaultdict

import pytest
from PIL import Image

from data.village import charts
from data.village.charts import AXIS, LEFT, ROW, STEP, WORDINGS, Chart, draw, prepare
from nanollm.records import read_captions, read_chats, read_examples, read_image_chats
from nanollm.rewards import accuracy

SPLITS = {"train": 240, "val": 30, "test": 90}
GREY = (170, 170, 170)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "SIZES", {s: SPLITS[s] for s in ("test", "val", "train")})
        yield prepare(root=tmp_path_factory.mktemp("charts"), n_train=240)


def shown(caption):
    return {goods: int(number) for goods, number in re.findall(r"(\w+) (\d+)", caption)}


def test_no_chart_is_in_two_splits_and_of_four_to_train_on_one_number_differs(folder):
    read = {s: read_captions(folder / f"captions_{s}.jsonl") for s in SPLITS}
    assert {s: len(rows) for s, rows in read.items()} == SPLITS
    told = {s: [row["caption"] for row in rows] for s, rows in read.items()}
    for one, other in ("train", "val"), ("train", "test"), ("val", "test"):
        pixels = [{Image.open(r["image"]).tobytes() for r in read[s]} for s in (one, other)]
        assert not pixels[0] & pixels[1] and not {*told[one]} & {*told[other]}
    for first in range(0, 240, 4):
        one, *others = map(shown, told["train"][first : first + 4])
        for other in others:
            assert list(one) == list(other) and sum(one[g] != other[g] for g in one) == 1
            assert len(set(other.values())) == len(other)  # one is most, one is fewest


def solved(asked, count):
    """(task, answer) of a question in words, found in another way than charts.py does."""
    goods = [word for word in re.findall(r"\w+", asked) if word in count]
    ranked = sorted(count, key=count.get)
    if "most" in asked or "fewest" in asked:
        return ("most", ranked[-1]) if "most" in asked else ("fewest", ranked[0])
    if " more " in asked:
        return "more", str(count[goods[0]] - count[goods[1]])
    task = {0: "total", 1: "read", 2: "sum"}[len(goods)]
    return task, str(sum(count[g] for g in goods or count))


def assert_steps_are_right(thought, count):
    for goods, number in re.findall(r"\b([a-z]+) (\d+)", thought):
        assert count[goods] == int(number)
    for a, b, more in re.findall(r"(\w+) \d+, (\w+) \d+: more (\w+)", thought):
        assert more == max(a, b, key=count.get)
    for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", thought):
        assert int(a) + int(sign + b) == int(c)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_what_the_chart_shows(folder, split):
    dialogues = read_image_chats(folder / f"dialogues_{split}.jsonl")
    examples = read_examples(folder / f"examples_{split}.jsonl")
    captions = read_captions(folder / f"captions_{split}.jsonl")
    answers = defaultdict(Counter)
    for dialogue, example, caption in zip(dialogues, examples, captions, strict=True):
        (asked, said), count = dialogue["messages"], shown(caption["caption"])
        assert example["messages"] == [asked] and example["images"] == dialogue["images"]
        assert solved(asked["content"], count) == (example["task"], example["answer"])
        assert accuracy(example, said["content"]) == 1
        assert accuracy(example, "It is 99 plums.") == 0
        thought = re.fullmatch("<think>(.*)</think>.*", said["content"])[1]
        assert thought.startswith(caption["caption"])
        assert_steps_are_right(thought, count)
        answers[example["task"]][example["answer"]] += 1
    assert answers.keys() == WORDINGS.keys()
    if split == "train":  # who always says the same is rarely right
        assert max(max(c.values()) / sum(c.values()) for c in answers.values()) < 0.4


@pytest.mark.parametrize("split", SPLITS)
def test_a_text_tells_the_chart_in_place_of_the_image_and_is_asked_in_the_same_way(folder, split):
    dialogues = read_chats(folder / f"text_dialogues_{split}.jsonl")
    examples = read_examples(folder / f"text_examples_{split}.jsonl")
    captions = read_captions(folder / f"captions_{split}.jsonl")
    for dialogue, example, caption in zip(dialogues, examples, captions, strict=True):
        told, asked = example["messages"][0]["content"].split("\n")
        assert told == caption["caption"] and example["messages"] == dialogue["messages"][:1]
        count, turns = shown(told), [m["content"] for m in dialogue["messages"]]
        assert solved(asked, count) == (example["task"], example["answer"])
        assert accuracy(example, turns[1]) == 1 and accuracy(example, "It is 99 plums.") == 0
        asked = [question.removeprefix(f"{told}\n") for question in turns[::2]]
        tasks, answers = zip(*(solved(each, count) for each in asked))
        assert len({*tasks}) == 3
        for answer, completion in zip(answers, turns[1::2]):
            thought, said = re.fullmatch("<think>So (.*)</think>(.*)", completion).groups()
            assert re.search(rf"\b{answer}\.$", said.lower())
            assert_steps_are_right(thought, count)


@pytest.mark.parametrize("unit", [1, 2])
def test_a_bar_ends_where_the_axis_has_its_number(unit):
    chart = Chart(("jars", "eggs", "pears"), (3 * unit, 8 * unit, unit), unit)
    image = draw(chart, 96, seed=3)
    lines = [x for x in range(96) if image.getpixel((x, ROW * 4 - 2)) == GREY]
    zero, *marks = lines  # of the axis
    assert marks == [zero + STEP * step for step in AXIS] and abs(zero - LEFT) <= 1
    for row, number in enumerate(chart.numbers, 1):
        y = ROW * row + 8
        bar = [
            x
            for x in range(zero, 96)
            if max(image.getpixel((x, y))) - min(image.getpixel((x, y))) > 40
        ]
        assert abs(bar[-1] - zero - STEP * number / unit) <= 1


def test_the_same_chart_is_drawn_alike_and_another_number_or_scale_otherwise():
    chart = Chart(("jars", "eggs", "pears"), (2, 4, 8), 1)
    table = Chart(chart.goods, chart.numbers, 0)
    other = Chart(chart.goods, (2, 4, 7), 0)
    drawn = [draw(each).tobytes() for each in (chart, table, other, Chart(*vars(chart).values()))]
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
    assert draw(chart, 192).size == (192, 192)
    ink = [Image.frombytes("RGB", (96, 96), each).getpixel((95, 8)) for each in drawn]
    assert len(set(ink)) == 1  # nothing leaves the frame


def test_prepare_writes_once_and_paths_are_files(folder):
    assert prepare(root=folder.parent, n_train=240) == folder
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            image = json.loads(line).get("image")
            assert (image is None) == path.name.startswith("text_")
            assert image is None or (folder / image).is_file()
