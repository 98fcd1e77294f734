"""The embedded default data: a village, generated from a seed, whose truth is known.

What is pretrained on it can be questioned: half of the villagers are asked about in instruction
tuning, and the other half measures what pretraining alone stored. The parts are

    world.py        who lives there, and what is true
    facts.py        how a fact is told; cloze examples
    stories.py      small stories
    school.py       word games
    sums.py         arithmetic: written steps, stories of goods, operands of each split
    corpus.py       the mixture of documents
    tasks.py        chat and test examples and their checks; courteous, rude, long-winded styles
    preferences.py  prompts, composed completions, the gold score, and annotators
    problems.py     problems in six difficulties, and their worked solutions
    new_domain.py   sailors with a style of their own, and ships: a domain to fine-tune on
    tools.py        large numbers, newcomers and what a search finds about them
    images.py       the village painted: scenes.py and image_questions.py belong to it

Run     python -m data.village    # prints samples of everything, and the counts
"""

import argparse
import json
import random
from pathlib import Path

from data.village.corpus import documents
from data.village.facts import cloze
from data.village.files import settings_with, show, write_lines
from data.village.new_domain import new_domain_examples
from data.village.preferences import preference_prompts
from data.village.problems import DIFFICULTIES, SHARES_WORKED, lessons, problems, worked
from data.village.tasks import fact_never_asked, instructions
from data.village.tools import knowledge, newcomers, tool_examples, tool_lessons
from data.village.world import build_world
from nanollm.config import atomic_folder
from nanollm.formats import read_prompts

VERSION = 22  # raise it when the generated text changes, so that no old cache is read
VAL_SHARE = 0.02
PROMPTS = {"train": 3000, "test": 400}  # for preferences
PER_DIFFICULTY = {"train": 1500, "val": 40, "test": 200}  # problems


def records(world, seed=0):
    """Every file of examples: {name: records}."""
    made = {"cloze": cloze(world), "knowledge": knowledge(newcomers(world))}
    for split, n in PROMPTS.items():
        made[f"prompts_{split}"] = preference_prompts(world, split, n, seed)
    for split in ("train", "val", "test"):
        made[f"new_domain_{split}"] = new_domain_examples(world, split, seed)
        made[f"sft_{split}"] = chats = instructions(world, split, seed)
        made[f"problems_{split}"] = asked = problems(world, split, PER_DIFFICULTY[split], seed)
        if split == "test":
            made["tools_test"] = tool_examples(world, split, seed)
            continue
        made[f"tools_{split}"] = tool_lessons(world, split, map(worked, asked), chats, seed)
        all_worked, none = dict.fromkeys(DIFFICULTIES, 1.0), dict.fromkeys(DIFFICULTIES, 0.0)
        for name, shares in ("reasoning", all_worked), ("mixed", SHARES_WORKED), ("answers", none):
            made[f"{name}_{split}"] = lessons(asked, chats, shares, seed)
    return made


def prepare(n_villagers=32, seed=0, megabytes=8.0, root="data/cache"):
    """Write the village once and return its folder; later calls find it there.

    The folder holds corpus_train.jsonl and corpus_val.jsonl ({"text"}), the files of `records`, and
    world.json; data/README.md says what is in each.
    """
    folder = Path(root) / f"village-{n_villagers}-{seed}-{megabytes:g}mb-v{VERSION}"
    if folder.is_dir():
        return folder
    if megabytes <= 0:
        raise ValueError(f"the corpus needs a positive size in megabytes, got {megabytes}")
    world, size = build_world(n_villagers, seed), int(megabytes * 1e6)
    with atomic_folder(folder) as new:
        for split, n_bytes in ("train", size), ("val", max(int(size * VAL_SHARE), 50_000)):
            texts = ({"text": text} for _, text in documents(world, split, n_bytes, seed))
            write_lines(new / f"corpus_{split}.jsonl", texts)
        for name, rows in records(world, seed).items():
            write_lines(new / f"{name}.jsonl", rows)
        (new / "world.json").write_text(json.dumps(world.as_dict(), indent=1), encoding="utf-8")
    return folder


def of_run(run_folder):
    """Folder of the village that a run was trained on; the default one where its settings don't
    say.
    """
    known = settings_with("villagers", run_folder)
    return prepare(known.get("villagers", 32), known.get("seed", 0), known.get("megabytes", 8.0))


def knowledge_of(run_folder, named=None):
    """The file that a search looks in: the one named, or that of the run's village."""
    return named or of_run(run_folder) / "knowledge.jsonl"


def prompts_about_people(folder, n_never_asked=1500):
    """The prompts of a village, and questions about the villagers that no dialogue is about, worded
    as no test example is; shuffled. Their answers are for a checker.
    """
    prompts = read_prompts(folder / "prompts_train.jsonl")
    known = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    world = build_world(len(known["villagers"]), known["seed"])
    rng = random.Random(f"prompts-about-people-{world.seed}")
    for _ in range(n_never_asked):
        (question, _), check = fact_never_asked(world, "train", rng)
        turns = [{"role": "user", "content": question}]
        prompts.append({"messages": turns, "task": "fact_never_asked", **check})
    rng.shuffle(prompts)
    return prompts


def main():
    """Print the village, samples of every kind, and how many of each there are."""
    parser = argparse.ArgumentParser(description="Print samples of the village and the counts.")
    parser.add_argument("--villagers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=3, help="samples of each kind")
    args = parser.parse_args()
    world, rng = build_world(args.villagers, args.seed), random.Random(0)
    for v in world.villagers:
        print(f"{v.name:9} {'asked ' if v.asked else 'never '} {', '.join(v.facts.values())}")
    by_kind = {}
    for kind, text in documents(world):
        by_kind.setdefault(kind, []).append(text)
    for kind, texts in by_kind.items():
        print(f"\n== {kind}: {len(texts)} documents in 1 MB, {sum(map(len, texts)):,} bytes")
        print(*(f"* {text}" for text in rng.sample(texts, args.samples)), sep="\n")
    for name, rows in records(world, args.seed).items():
        show(name, rows, args.samples, rng)
