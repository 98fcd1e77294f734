"""The embedded default data: a village, generated from a seed, whose truth is known.

What is pretrained on it can be questioned: half of the villagers are asked about in instruction
tuning, and the other half measures what pretraining alone stored. The parts are

    village_world.py    who lives there, and what is true
    village_facts.py    how a fact is told; cloze items
    village_stories.py  small stories
    village_school.py   word games
    village_sums.py     arithmetic: written steps, stories of goods, operands of each split
    village_corpus.py   the mixture of documents
    village_tasks.py    chat items, test items and their checks
    village_manners.py  courteous, rude and long-winded answers
    village_preferences.py  prompts, composed replies, the gold score, and annotators
    village_problems.py  problems in six grades, and their worked solutions
    village_harbour.py  sailors with a manner of their own, and ships: a domain to fine-tune on
    village_tools.py    large numbers, newcomers and what a search finds about them

Run     python -m data.village    # prints samples of everything, and the counts
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from data.village.corpus import corpus, documents
from data.village.facts import cloze
from data.village.files import whole_folder, write_lines
from data.village.new_domain import harbour_examples
from data.village.preferences import preference_prompts
from data.village.problems import GRADES, SHARES_WORKED, lessons, problems, worked
from data.village.tasks import fact_never_asked, instructions
from data.village.tools import knowledge, newcomers, tool_examples, tool_lessons
from data.village.world import POOLS, Villager, World, build_world
from nanollm.formats import read_prompts
from nanollm.rewards import check_answer

__all__ = [
    "POOLS",
    "Villager",
    "World",
    "build_world",
    "check_answer",
    "cloze",
    "corpus",
    "documents",
    "instructions",
    "prepare",
]

VERSION = 20  # raise it when the generated text changes, so that no old cache is read
VAL_SHARE = 0.02
PROMPTS = {"train": 3000, "test": 400}  # for preferences
PER_GRADE = {"train": 1500, "val": 40, "test": 200}  # problems of each grade


def dialogues(world, seed):
    """Every file of chat items, test items and problems: {name: records}."""
    made = {}
    for split in ("train", "val", "test"):
        made[f"harbour_{split}"] = harbour_examples(world, split, seed)
        made[f"sft_{split}"] = chats = instructions(world, split, seed)
        made[f"problems_{split}"] = asked = problems(world, split, PER_GRADE[split], seed)
        if split == "test":
            made["tools_test"] = tool_examples(world, split, seed)
        else:
            all_worked, none = dict.fromkeys(GRADES, 1.0), dict.fromkeys(GRADES, 0.0)
            made[f"reasoning_{split}"] = lessons(asked, chats, all_worked, seed)
            made[f"mixed_{split}"] = lessons(asked, chats, SHARES_WORKED, seed)
            made[f"answers_{split}"] = lessons(asked, chats, none, seed)
            made[f"tools_{split}"] = tool_lessons(world, split, map(worked, asked), chats, seed)
    return made


def prepare(n_villagers=32, seed=0, megabytes=8.0, root="data/cache"):
    """Write the village once and return its folder; later calls find it there.

    The folder holds corpus_train.jsonl and corpus_val.jsonl ({"text"}), cloze.jsonl,
    sft_train.jsonl, sft_val.jsonl and sft_test.jsonl, prompts_train.jsonl and prompts_test.jsonl
    for preferences, problems_train.jsonl and problems_test.jsonl, dialogues with worked solutions
    (reasoning_*.jsonl), with the answers alone (answers_*.jsonl), with some of each
    (mixed_*.jsonl), with calls of tools (tools_*.jsonl) and about the harbour (harbour_*.jsonl),
    the knowledge base of the search tool (knowledge.jsonl), and world.json.
    """
    folder = Path(root) / f"village-{n_villagers}-{seed}-{megabytes:g}mb-v{VERSION}"
    if folder.is_dir():
        return folder
    if megabytes <= 0:
        raise ValueError(f"the corpus needs a positive size in megabytes, got {megabytes}")
    world = build_world(n_villagers, seed)
    with whole_folder(folder) as new:
        size = int(megabytes * 1e6)
        for split, n_bytes in ("train", size), ("val", max(int(size * VAL_SHARE), 50_000)):
            texts = corpus(world, split, approx_bytes=n_bytes, seed=seed)
            write_lines(new / f"corpus_{split}.jsonl", ({"text": text} for text in texts))
        write_lines(new / "cloze.jsonl", cloze(world))
        for name, rows in dialogues(world, seed).items():
            write_lines(new / f"{name}.jsonl", rows)
        write_lines(new / "knowledge.jsonl", knowledge(newcomers(world)))
        for split, n in PROMPTS.items():
            prompts = preference_prompts(world, split, n, seed)
            write_lines(new / f"prompts_{split}.jsonl", prompts)
        (new / "world.json").write_text(json.dumps(world.as_dict(), indent=1), encoding="utf-8")
    return folder


def of_run(run_folder):
    """Folder of the village that a run was trained on; the default one where its settings don't
    say.
    """
    known = settings_with("villagers", run_folder)
    return prepare(known.get("villagers", 32), known.get("seed", 0), known.get("megabytes", 8.0))


def settings_with(name, run_folder):
    """Settings of the run that chose `name`: this one, or one that it began from; {} for none."""
    path = Path(run_folder) / "train_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name not in known and known.get("init"):
        return settings_with(name, known["init"])
    return known if name in known else {}


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


def show(world, n_samples):
    """Print the village, samples of every kind, and how many of each there are."""
    for v in world.villagers:
        print(f"{v.name:9} {'asked ' if v.asked else 'never '} {', '.join(v.facts.values())}")
    rng, by_kind = random.Random(0), {}
    for kind, text in documents(world, approx_bytes=1_000_000):
        by_kind.setdefault(kind, []).append(text)
    for kind, texts in by_kind.items():
        print(f"\n== {kind}: {len(texts)} documents in 1 MB, {sum(map(len, texts)):,} bytes")
        print("\n".join("* " + text for text in rng.sample(texts, n_samples)))
    examples = cloze(world)
    print(f"\n== cloze: {len(examples)} items")
    print("\n".join(i["prompt"] + " |" + i["answer"] for i in rng.sample(examples, n_samples)))
    test, train = instructions(world, "test"), instructions(world, "train")
    print("\n== chat items, train:", dict(Counter(i["task"] for i in train)))
    print("== chat items, test:", dict(Counter(i["task"] for i in test)))
    for task in dict.fromkeys(i["task"] for i in test):
        for examples in (train, test):
            chosen = [i for i in examples if i["task"] == task][:n_samples]
            for example in chosen:
                said = "  ".join(f"[{m['role']}] {m['content']}" for m in example["messages"])
                print(
                    f"{task}: {said}" + (f"  -> {example['answer']}" if "answer" in example else "")
                )


def main():
    parser = argparse.ArgumentParser(description="Print samples of the village and the counts.")
    parser.add_argument("--villagers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=6, help="samples of each kind")
    args = parser.parse_args()
    show(build_world(args.villagers, args.seed), args.samples)
