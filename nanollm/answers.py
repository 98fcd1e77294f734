"""Sections of the report that put the answers of several models side by side."""

from data import village
from nanollm.formats import read_examples
from nanollm.generate import complete
from nanollm.hub import load_model, read_json
from nanollm.report import Section
from nanollm.tools import Toolbox

# per kind of question: the test file, and how many of each task
QUESTIONS = {
    "chat": (
        "sft_test.jsonl",
        {"fact_never_asked": 2, "unknown": 1, "formatting": 1, "arithmetic": 1},
    ),
    "reasoning": (
        "problems_test.jsonl",
        {"three_digits": 2, "products": 1, "two_steps": 1, "three_steps": 1},
    ),
    "tools": ("tools_test.jsonl", {"large_numbers": 2, "lookup": 1, "lookup_two_hop": 1}),
}
TITLES = {
    "chat": "The same five prompts, before and after",
    "reasoning": "The same five problems",
    "tools": "The same four questions, with tools and without",
}


def answers_section(kind, done, root, rt, known):
    """The same held-out questions, answered by every model so far that is about them.

    `known` keeps the answers, by kind and stage: the report is written after every stage.
    """
    file, wanted = QUESTIONS[kind]
    examples = read_examples(village.of_run(root / "pretrain") / file)
    examples = [
        i for name, n in wanted.items() for i in [i for i in examples if i["task"] == name][:n]
    ]
    answered = [stage for stage in done if stage.speaks == kind]
    if kind != "chat":  # and by the model that they began from
        answered.insert(0, next(stage for stage in done if stage.name == "sft"))
    columns = {}
    for stage in answered:
        if (kind, stage.name) not in known:
            known[kind, stage.name] = answers_of(root / stage.name, examples, stage.speaks, rt)
        acronym = any(letter.isupper() for letter in stage.title[1:])
        title = stage.title if acronym else stage.title.lower()
        columns[f"after {title}"] = known[kind, stage.name]
    section = Section(TITLES[kind])
    asked = [example["messages"][-1]["content"] for example in examples]
    rows = [
        list(row)
        for row in zip(asked, *columns.values(), [example["answer"] for example in examples])
    ]
    section.table(["prompt", *columns, "right"], rows)
    section.text(
        "None of these questions occurs in training. Answers are greedy, and cut after 112 tokens."
    )
    return section


def answers_of(folder, examples, speaks, rt):
    """Greedy completions of the model in a run folder."""
    model, tokenizer = load_model(folder)
    rt.prepare(model, train=False)
    prompts = [
        tokenizer.render(example["messages"], generation_prompt=True)[0] for example in examples
    ]
    toolbox = Toolbox.of_village(village.of_run(folder), tokenizer) if speaks == "tools" else None
    return [
        completion.strip() for completion in complete(model, tokenizer, prompts, 112, tools=toolbox)
    ]


def preferences_section(root):
    """The same prompts, answered by the fine-tuned model, best-of-4, PPO and DPO, side by side."""
    section = Section("Preferences: four ways to answer")
    best = read_json(root / "rm" / "preferences.json")
    found = {name: read_json(root / name / "preferences.json") for name in ("ppo", "dpo")}
    rows = [["fine-tuned", best["figures"]["against"]], ["best of 4", best["figures"]]]
    rows += [[name.upper(), result["figures"]] for name, result in found.items()]
    section.table(
        ["answers", "gold", "wins over fine-tuned", "KL", "tokens"],
        [
            [
                name,
                f"{f['gold']:.3f}",
                f"{f['win_rate']:.1%}" if "win_rate" in f else "-",
                f"{f['kl']:.2f}" if "kl" in f and name != "best of 4" else "-",
                f"{f['length']:.1f}",
            ]
            for name, f in rows
        ],
    )
    section.text(
        "Sampled at temperature 1. A gold score of 1 is right, polite and short; best of 4 takes "
        "the one of four fine-tuned answers that the reward model likes best."
    )
    answers = [
        best["completions_against"],
        best["completions"],
        *(f["completions"] for f in found.values()),
    ]
    samples = zip(best["prompts"], *answers)
    section.table(
        ["prompt", "fine-tuned", "best of 4", "PPO", "DPO"], [list(row) for row in samples][:6]
    )
    return section
