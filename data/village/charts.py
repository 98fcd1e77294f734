"""Charts of the village's market: bars on a scaled axis, or a table; and questions that need
reading and arithmetic. Every name and number is small print, drawn with Pillow's own font.

    read      How many apples are there?            more   How many more apples than pears ...?
    most      Which are most? (or fewest)           sum    ... together?
                                                    total  How many things in all?

An answer reads the whole chart, takes out of it what is asked for, and concludes: <think>I see
pears 6, jars 5, nails 2. So pears 6, nails 2. 6 - 2 = 4.</think>The answer is 4. Taking a number
out of a list is a skill of its own: learnt from images alone, charts were read without a fault and
wrong rows taken (`read`, `more`, `sum` 15% to 25%). So it comes first, from the same charts told in
words, with three questions to a dialogue. No two splits have a chart that reads alike.

Run     python -m data.village --charts    # paints them: F=data/cache/charts-0-96px-6000-v5
        python train_sft.py --init runs/sft --steps 300 --batch_size 12 --lr 3e-3 --muon_lr 0.01 \\
            --data $F/text_dialogues_train.jsonl --val_data $F/text_dialogues_val.jsonl \\
            --test_data $F/text_examples_test.jsonl --replay 0.17 --out runs/charts-text
        python train_vlm.py --stage clip --data $F/captions_train.jsonl --hard_negatives 4 \\
            --val_data $F/captions_val.jsonl --steps 160 --out runs/charts-clip
        python train_vlm.py --stage align --init runs/charts-text --vision runs/charts-clip \\
            --data $F/dialogues_train.jsonl --val_data $F/dialogues_val.jsonl --steps 20 \\
            --out runs/charts-align
        python train_vlm.py --stage instruct --init runs/charts-align --train_vision --steps 1200 \\
            --data $F/dialogues_train.jsonl --val_data $F/dialogues_val.jsonl \\
            --test_data $F/examples_test.jsonl --out runs/charts
Expect  seed 0, fp32, one core (AMD EPYC, AVX2) that other runs shared, 45 minutes in all. Test
        charts told in words (64 of each task): 2% -> 96%, total 86%, sum 95%, the others 98% to
        100%. Where steps did not name the larger of two, most and fewest stayed at 21% and 62%
        (validation, seed 7). Charts as images (--test_examples 40): 99.6%, total 97.5%, the others
        100%; 10% without seeing them (--no_images --steps 100). Charts are read late: val_loss
        0.34, 0.19, 0.07, 0.016, 0.007, 0.0006 after each 200 steps. Of the village's questions
        without images 0% are left after the texts, but 97% at the end, as before it all
"""

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.village.scenes import COLOURS
from data.village.sums import GOODS
from data.village.tasks import chat
from data.village.world import capitalise, table
from nanollm.config import atomic_folder
from nanollm.formats import write_jsonl

VERSION = 5  # raise it when charts or questions change, so that no old cache is read
SIZES = {"test": 400, "val": 200, "train": 6000}  # charts of each split
HARD_NEGATIVES = 4
SOLD = [GOODS[ware] for ware in ("apple", "pear", "egg", "bun", "nail", "jar")]
AXIS = (4, 8)  # steps that have their number above the bars
# unit, what a step stands for: the numbers that bars of one to eight steps show; 0: those of tables
NUMBERS = {0: range(1, 20), 1: range(1, 9), 2: range(2, 17, 2)}
ROW, LEFT, STEP = 16, 40, 6  # pixels of an image that is 96 wide
WORDINGS = table("""
read    How many {a} are there? | How many {a} does the chart show? | Read off the number of {a}.
most    Which are most? | Of what does the market have most? | What is there most of?
fewest  Which are fewest? | Of what does the market have fewest? | What is there fewest of?
more    How many more {a} than {b} are there? | By how many are there more {a} than {b}?
sum     How many {a} and {b} are there together? | Add the {a} to the {b}: how many are they?
total   How many things are there in all? | Add all numbers of the chart. What do they make?
""")


@dataclass(frozen=True)
class Chart:
    """`unit`: what a step of the axis stands for; 0: a table, which has none."""

    goods: tuple
    numbers: tuple
    unit: int


def random_chart(rng):
    """Three to five goods; their numbers differ, so one is most and one is fewest."""
    unit, n = rng.choice([*NUMBERS, 0]), rng.randint(3, 5)
    return Chart(tuple(rng.sample(SOLD, n)), tuple(rng.sample(NUMBERS[unit], n)), unit)


def vary(chart, rng):
    """The chart with another number: who tells them apart has to read it."""
    numbers, i = [*chart.numbers], rng.randrange(len(chart.numbers))
    numbers[i] = rng.choice([n for n in NUMBERS[chart.unit] if n not in numbers])
    return replace(chart, numbers=tuple(numbers))


def draw(chart, size=96, seed=0):
    """The image, RGB. A row is as high as a patch of the default tower; the colours say nothing,
    and all is shifted by up to a pixel.
    """
    scale, rng = size / 96, random.Random(f"chart-{seed}")
    image = Image.new("RGB", (size, size), (255, 253, 246))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11 * scale)
    dx, dy, grey = rng.randint(-1, 1), rng.randint(-1, 1), (170, 170, 170)

    def at(x, y):
        return (x + dx) * scale, (y + dy) * scale

    bottom = ROW * (len(chart.goods) + 1)
    for step in AXIS if chart.unit else ():
        x = LEFT + STEP * step
        pen.line([at(x, ROW), at(x, bottom)], grey)
        pen.text(at(x, ROW - 2), str(step * chart.unit), "black", font, "ms")
    for i, (goods, number) in enumerate(zip(chart.goods, chart.numbers), 1):
        pen.text(at(2, ROW * i + 12), goods, "black", font, "ls")
        if chart.unit:
            corners = at(LEFT, ROW * i + 3), at(LEFT + STEP * number / chart.unit, ROW * i + 12)
            pen.rectangle(corners, rng.choice([*COLOURS.values()]))
        else:
            pen.rectangle((at(0, ROW * i), at(93, ROW * i + ROW)), outline=grey)
            pen.text(at(66, ROW * i + 12), str(number), "black", font, "ms")
    pen.line([at(LEFT, ROW), at(LEFT, bottom)], grey)
    return image


def reading(chart):
    """All that the chart says. Behind "I see" every good is a word of its own token."""
    return f"I see {', '.join(map('{} {}'.format, chart.goods, chart.numbers))}."


def question(chart, task, rng):
    """(question, the steps to its answer, answer) of a task. `most` compares two at a time, as the
    model does not find it among all numbers at once.
    """
    count = dict(zip(chart.goods, chart.numbers))
    a, b = rng.sample(chart.goods, 2)
    if task == "more" and count[a] < count[b]:
        a, b = b, a
    steps = []
    if task == "read":
        answer = count[a]
        steps = [f"{a} {answer}."]
    elif task in ("most", "fewest"):
        answer, *others = chart.goods
        for other in others:
            fewer, more = sorted((answer, other), key=count.get)
            steps.append(f"{answer} {count[answer]}, {other} {count[other]}: more {more}.")
            answer = more if task == "most" else fewer
        steps.append(f"{answer} {count[answer]}.")
    elif task == "total":
        answer, *others = chart.numbers
        for other in others:
            steps.append(f"{answer} + {other} = {answer + other}.")
            answer += other
    else:
        sign = "-" if task == "more" else "+"
        answer = count[a] - count[b] if task == "more" else count[a] + count[b]
        steps = [f"{a} {count[a]}, {b} {count[b]}. {count[a]} {sign} {count[b]} = {answer}."]
    return rng.choice(WORDINGS[task]).format(a=a, b=b), f"So {' '.join(steps)}", str(answer)


def turns_of(shown, thought, chart, task, rng):
    """([question, completion], what an example checks). `shown` stands before the question, and
    `thought` before the steps.
    """
    asked, steps, answer = question(chart, task, rng)
    said, check = f"The answer is {answer}.", {"answer": answer, "check": "number", "task": task}
    if not answer.isdigit():
        said = f"{capitalise(answer)}."
        check |= {"check": "contains", "not": [goods for goods in SOLD if goods != answer]}
    return [shown + asked, f"<think>{thought}{steps}</think>{said}"], check


def prepare(seed=0, root="data/cache", size=96, n_train=SIZES["train"]):
    """Paint and write everything once and return the folder: captions, dialogues of one question (a
    second could be answered from the first), and examples: `val` to choose settings by, `test`.
    """
    folder, seen = Path(root) / f"charts-{seed}-{size}px-{n_train}-v{VERSION}", set()
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as new:
        for split, n in (SIZES | {"train": n_train}).items():
            rng, text_rng = (
                random.Random(f"{name}-{split}-{seed}") for name in ("charts", "texts")
            )
            files, first = defaultdict(list), None
            (new / split).mkdir()
            for i in range(n):
                # of each HARD_NEGATIVES charts to train on all but the first differ in a number
                like, chart = split == "train" and i % HARD_NEGATIVES, None
                while chart is None or reading(chart) in seen:
                    chart = vary(first, rng) if like else random_chart(rng)
                first = first if like else chart
                seen.add(reading(chart))
                image, task = f"{split}/{i:05}.png", [*WORDINGS][i % len(WORDINGS)]
                draw(chart, size, f"{split}-{i}").save(new / image, compress_level=1)
                told, about = reading(chart), {"image": image}
                files["captions"].append(about | {"caption": told})
                turns, check = turns_of("<image>\n", f"{told} ", chart, task, rng)
                files["dialogues"].append(about | {"messages": chat(turns)})
                files["examples"].append(about | {"messages": chat(turns[:1]), **check})
                turns, check = turns_of(f"{told}\n", "", chart, task, text_rng)
                files["text_examples"].append({"messages": chat(turns[:1]), **check})
                for other in text_rng.sample([each for each in WORDINGS if each != task], 2):
                    turns += turns_of("", "", chart, other, text_rng)[0]
                files["text_dialogues"].append({"messages": chat(turns)})
            for name, rows in files.items():
                write_jsonl(new / f"{name}_{split}.jsonl", rows)
    return folder
