"""What a vision-language model can do, measured on held-out pictures: the figures of train_vlm.py.

right     accuracy with the right picture                 shuffled  with another item's picture
combos    colours and kinds never seen together           blind     of the model trained on grey
with and without steps: answers made to begin with <think>, or with the result
texts     the language model's own test items, before and after
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nanollm.clip import retrieval
from nanollm.config import atomic_write
from nanollm.evaluate import accuracy_by_family
from nanollm.figures import first_of_each_family, table
from nanollm.hub import read_json
from nanollm.rewards import is_right

BEGINS = {"with_steps": "<think>", "without_steps": "The answer is"}
SHOWN = 3  # items of each family whose replies are kept for the report


def mean(families):
    """Mean accuracy over families of {family: {"accuracy", "n"}}."""
    return sum(f["accuracy"] for f in families.values()) / max(1, len(families))


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


def text_figures(model, tokenizer, items):
    """Accuracy by family of items without pictures."""
    model.eval()
    families = accuracy_by_family(model, tokenizer, items)[0] if items else {}
    model.train()
    return families


def with_others_pictures(rows):
    """The packed rows, each picture in the place of the one before it."""
    numbers = rows.picture_numbers()
    numbers = iter(numbers[1:] + numbers[:1])
    return replace(rows, pictures=[[next(numbers) for _ in row] for row in rows.pictures])


def picture_figures(model, tokenizer, store, items, blind=False):
    """({name: {family: {"accuracy", "n"}}}, replies to items["pictures"]); a blind model sees grey
    only.
    """
    model.eval()
    ask = partial(accuracy_by_family, model, tokenizer, store=store)
    shown, found = "grey" if blind else "right", {}
    found["right"], replies = ask(items["pictures"], shown=shown)
    if items["combos"]:
        found["combos"] = ask(items["combos"], shown=shown)[0]
    if not blind:
        found["shuffled"] = ask(items["pictures"], shown="shuffled")[0]
        steps = [i for i in items["pictures"] if i["check"] == "number" and i["family"] != "count"]
        found |= {name: ask(steps, begin=begin)[0] for name, begin in BEGINS.items() if steps}
    model.train()
    return found, replies


def keep_samples(path, items, replies):
    """Write questions, pictures and replies as JSON: for the report, beside those of the blind."""
    wanted = {id(item) for item in first_of_each_family(items, SHOWN)}
    samples = [
        {
            "image": item["images"][0],
            "question": item["messages"][-1]["content"].replace("<image>", "").strip(),
            "answer": item["answer"],
            "reply": reply,
            "right": is_right(item, reply),
        }
        for item, reply in zip(items, replies)
        if id(item) in wanted and item["images"]
    ]
    atomic_write(path, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def picture_table(found, blind=None):
    """Text table of what picture_figures gives, a line per family."""
    columns = {"right": found["right"], "shuffled": found.get("shuffled"), "blind": blind}
    columns |= {"new pairs": found.get("combos")}
    columns |= {"steps": found.get("with_steps"), "no steps": found.get("without_steps")}
    return table({name: column for name, column in columns.items() if column})


def blind_figures(out):
    """Accuracy by family of the blind model beside a run, where there is one."""
    path = Path(f"{out}-blind") / "result.json"
    found = read_json(path).get("pictures") if path.exists() else None
    return found["right"] if found else None


def summary(found, blind=None):
    """One line: the mean over families of each figure."""
    parts = [f"right picture {mean(found['right']):.1%}"]
    if "shuffled" in found:
        parts.append(f"another item's {mean(found['shuffled']):.1%}")
    if blind:
        parts.append(f"the blind model {mean(blind):.1%}")
    if "combos" in found:
        parts.append(f"pairs never seen together {mean(found['combos']):.1%}")
    if "with_steps" in found:
        with_steps, without = (mean(found[name]) for name in BEGINS)
        parts.append(f"sums with steps {with_steps:.1%}, without {without:.1%}")
    return "accuracy, mean over families: " + ", ".join(parts)
