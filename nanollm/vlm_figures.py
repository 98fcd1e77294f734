"""What a vision-language model can do, measured on held-out images: the figures of train_vlm.py.

right     accuracy with the right image                 shuffled  with another item's image
combos    colours and kinds never seen together           blind     of the model trained on grey
with and without steps: answers made to begin with <think>, or with the result
texts     the language model's own test examples, before and after
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nanollm.checkpoint import read_json
from nanollm.config import atomic_write
from nanollm.metrics import accuracy_by_task, first_of_each_task, table
from nanollm.rewards import is_right
from nanollm.vision.clip import retrieval

BEGINS = {"with_steps": "<think>", "without_steps": "The answer is"}
SHOWN = 3  # items of each task whose completions are kept for the report


def mean(tasks):
    """Mean accuracy over tasks of {task: {"accuracy", "n"}}."""
    return sum(f["accuracy"] for f in tasks.values()) / max(1, len(tasks))


@torch.no_grad()
def retrieved(clip, pairs, among=64):
    """Top-1 retrieval among `among` held-out Pairs, and the cosine of the right pair, each the mean
    over as many such groups as there are.
    """
    clip.eval()
    n, groups = min(among, len(pairs)), []
    for i in range(0, len(pairs) - n + 1, n):
        x, y = clip(*pairs.batch(slice(i, i + n), clip.device))
        groups.append(retrieval(x, y) | {"cosine": (x * y).sum(1).mean().item()})
    clip.train()
    return {key: sum(group[key] for group in groups) / len(groups) for key in groups[0]}


def text_figures(model, tokenizer, examples):
    """Accuracy by task of items without images."""
    model.eval()
    tasks = accuracy_by_task(model, tokenizer, examples)[0] if examples else {}
    model.train()
    return tasks


def with_others_images(rows):
    """The packed rows, each image in the place of the one before it."""
    numbers = rows.image_numbers()
    numbers = iter(numbers[1:] + numbers[:1])
    return replace(rows, images=[[next(numbers) for _ in row] for row in rows.images])


def image_figures(model, tokenizer, store, examples, blind=False):
    """({name: {task: {"accuracy", "n"}}}, completions to items["images"]); a blind model sees grey
    only.
    """
    model.eval()
    ask = partial(accuracy_by_task, model, tokenizer, store=store)
    shown, found = "grey" if blind else "right", {}
    found["right"], completions = ask(examples["images"], shown=shown)
    if examples["combos"]:
        found["combos"] = ask(examples["combos"], shown=shown)[0]
    if not blind:
        found["shuffled"] = ask(examples["images"], shown="shuffled")[0]
        steps = [i for i in examples["images"] if i["check"] == "number" and i["task"] != "count"]
        found |= {name: ask(steps, begin=begin)[0] for name, begin in BEGINS.items() if steps}
    model.train()
    return found, completions


def keep_samples(path, examples, completions):
    """Write questions, images and completions as JSON: for the report, beside those of the blind."""
    wanted = {id(example) for example in first_of_each_task(examples, SHOWN)}
    samples = [
        {
            "image": example["images"][0],
            "question": example["messages"][-1]["content"].replace("<image>", "").strip(),
            "answer": example["answer"],
            "completion": completion,
            "right": is_right(example, completion),
        }
        for example, completion in zip(examples, completions)
        if id(example) in wanted and example["images"]
    ]
    atomic_write(path, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def image_table(found, blind=None):
    """Text table of what image_figures gives, a line per task."""
    columns = {"right": found["right"], "shuffled": found.get("shuffled"), "blind": blind}
    columns |= {"new pairs": found.get("combos")}
    columns |= {"steps": found.get("with_steps"), "no steps": found.get("without_steps")}
    return table({name: column for name, column in columns.items() if column})


def blind_figures(out):
    """Accuracy by task of the blind model beside a run, where there is one."""
    path = Path(f"{out}-blind") / "result.json"
    found = read_json(path).get("images") if path.exists() else None
    return found["right"] if found else None


def summary(found, blind=None):
    """One line: the mean over tasks of each figure."""
    parts = [f"right image {mean(found['right']):.1%}"]
    if "shuffled" in found:
        parts.append(f"another item's {mean(found['shuffled']):.1%}")
    if blind:
        parts.append(f"the blind model {mean(blind):.1%}")
    if "combos" in found:
        parts.append(f"pairs never seen together {mean(found['combos']):.1%}")
    if "with_steps" in found:
        with_steps, without = (mean(found[name]) for name in BEGINS)
        parts.append(f"sums with steps {with_steps:.1%}, without {without:.1%}")
    return "accuracy, mean over tasks: " + ", ".join(parts)
