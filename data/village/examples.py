"""All examples of the village, as files beside its corpus: for every stage after pretraining."""

import json
import random
from pathlib import Path

from data.village.corpus import prepare_corpus
from data.village.new_domain import new_domain_examples
from data.village.preferences import comparisons, preference_prompts
from data.village.problems import DIFFICULTIES, SHARES_WORKED, lessons, problems, worked
from data.village.sql import sql_examples, sql_lessons, table_of
from data.village.tasks import fact_never_asked, instructions
from data.village.tools import knowledge, newcomers, tool_examples, tool_lessons
from data.village.world import build_world
from nanollm.config import BEGAN_FROM
from nanollm.formats import write_jsonl
from nanollm.records import read_prompts

PROMPTS = {"train": 3000, "test": 400}  # for preferences
PER_DIFFICULTY = {"train": 1500, "val": 40, "test": 200}  # problems
LAST = "comparisons_test"  # file that `records` ends with: where it is, all are


def records(world):
    """Every file of examples: {name: records}."""
    made = {}
    for split, n in PROMPTS.items():
        made[f"prompts_{split}"] = preference_prompts(world, split, n)
    for split in ("train", "val", "test"):
        made[f"sft_{split}"] = chats = instructions(world, split)
        made[f"new_domain_{split}"] = new_domain_examples(world, split, chats)
        made[f"problems_{split}"] = asked = problems(world, split, PER_DIFFICULTY[split])
        if split == "test":
            made["tools_test"] = tool_examples(world, split)
            made["sql_test"] = sql_examples(world, split)
            continue
        calls = tool_lessons(world, split, map(worked, asked), chats)
        made |= {f"tools_{split}": calls, f"sql_{split}": sql_lessons(world, split, calls)}
        all_worked, none = dict.fromkeys(DIFFICULTIES, 1.0), dict.fromkeys(DIFFICULTIES, 0.0)
        for name, shares in ("reasoning", all_worked), ("mixed", SHARES_WORKED), ("answers", none):
            made[f"{name}_{split}"] = lessons(asked, chats, shares, world.seed)
    made |= {"knowledge": knowledge(newcomers(world)), "people": table_of(world)}
    val = preference_prompts(world, "val", 200)
    compared = {"train": made["prompts_train"] * 3, "val": val, "test": made["prompts_test"]}
    for split, asked in compared.items():
        made[f"comparisons_{split}"] = [*comparisons(asked, split, world.seed)]
    return made


def prepare(n_villagers=32, seed=0, megabytes=8.0, root="data/cache"):
    """Folder of the village with its corpus and the files of `records`, each written once;
    data/README.md says what is in them.
    """
    folder = prepare_corpus(n_villagers, seed, megabytes, root)
    if not (folder / f"{LAST}.jsonl").exists():
        for name, rows in records(build_world(n_villagers, seed)).items():
            write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def settings_of(run_folder, **names):
    """{argument: setting} for the names {argument: name of the setting}, as the run says that chose
    the first of them: this one, or one that it began from, as it was then; {} where none did.
    """
    path, first = Path(run_folder) / "train_config.json", next(iter(names.values()))
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    while known and first not in known:
        known = known.get(BEGAN_FROM)
    return {argument: known[name] for argument, name in names.items() if name in (known or ())}


def of_run(run_folder):
    """The village that a run was trained on; the default one where its settings don't say."""
    names = {"n_villagers": "villagers", "seed": "seed", "megabytes": "megabytes"}
    return prepare(**settings_of(run_folder, **names))


def knowledge_of(run_folder, named=None):
    """The files for Toolbox.with_knowledge: the one named, or those of the run's village."""
    names = "knowledge.jsonl", "people.jsonl"
    return [named] if named else [of_run(run_folder) / name for name in names]


def world_of(folder):
    """Who lives in a village, and what is true."""
    known = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    return build_world(len(known["villagers"]), known["seed"])


def prompts_about_people(folder, n_never_asked=1500):
    """The prompts of a village, and questions about the villagers that no dialogue is about, worded
    as no test example is; shuffled. Their answers are for a checker.
    """
    prompts, world = read_prompts(folder / "prompts_train.jsonl"), world_of(folder)
    rng = random.Random(f"prompts-about-people-{world.seed}")
    for _ in range(n_never_asked):
        (question, _), check = fact_never_asked(world, "train", rng)
        turns = [{"role": "user", "content": question}]
        prompts.append({"messages": turns, "task": "fact_never_asked", **check})
    rng.shuffle(prompts)
    return prompts
