"""What a model knows and can do: accuracy by task, and bits per byte of held-out text.

Run     python -m nanollm.evaluate runs/sft                      # the village's held-out examples
        python -m nanollm.evaluate runs/sft --data problems.jsonl
        python -m nanollm.evaluate runs/grpo --data reasoning --samples 8     # pass@8 and maj@8
        python -m nanollm.evaluate runs/zero --data reasoning    # asked as R1-Zero was trained
        python -m nanollm.evaluate runs/tools --data tools --tools    # or sql, of runs/sql
        python -m nanollm.evaluate runs/vlm --data images        # combos: pairs never seen together
        python -m nanollm.evaluate runs/vlm --data images --images none     # grey ones instead
        python -m nanollm.evaluate runs/ppo --data preferences --against runs/sft
        python -m nanollm.evaluate runs/sft --data preferences --reward_model runs/rm --best_of 4
        python -m nanollm.evaluate runs/sft --adapter runs/lora,runs/pirate     # side by side
Prints a table and writes it as JSON to <run>/evaluation.json, preferences.json, or of several
adapters adapters.json; into a downloaded folder it writes nothing. Examples are JSONL, one per
line: {"messages": [..., a user's turn], "answer": "...", "check": "contains" | "exact" | "number" |
"choice" | "unknown", "task": "..."}, or {"prompt", "answer"}, or GSM8K's, MMLU's or ARC's, with an
"image" where the question is about one; see data/README.md.
Completions are greedy unless --temperature says else; with --samples it speaks of the sampled ones.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data.village import examples as village
from data.village.preferences import gold_of
from nanollm.batches import Windows, open_corpus
from nanollm.config import ModelConfig, NotNegative, UserError, Whole, atomic_write, cli
from nanollm.formats import read_records
from nanollm.hub import load_model
from nanollm.logprobs import bits_per_byte
from nanollm.metrics import (
    LONGEST_COMPLETION,
    accuracy_by_task,
    accuracy_table,
    first_of_each_task,
    question_of,
    sampled_metrics,
    table,
)
from nanollm.peft.lora import use
from nanollm.preferences import load_scorer, measure_completions, win_rate
from nanollm.records import read_examples, read_prompts
from nanollm.rewards import is_right
from nanollm.rollouts import prompt_of, template_of, with_room
from nanollm.run import check_file, effect
from nanollm.runtime import start
from nanollm.tools import Toolbox


@dataclass
class Config(ModelConfig):
    # folder of an adapter to put on it; several with commas: every example is asked of each of them
    # and of the model alone, all in one batch
    adapter: str | None = None
    # village; its problems (reasoning) or questions for tools (tools, sql); about its images
    # questions (images), those on combinations held out (combos) or problems (counting); a JSONL
    # file of test examples; or preferences: what sampled completions of the village's prompts are
    # worth
    data: str = "village"
    tools: bool = False  # run the calls that the model writes
    # with tools: JSONL of {"title", "text"} to search; default: the village's, and SQL about it
    knowledge: str | None = None
    # k: beside a greedy completion of each example so many sampled ones, for pass@k and maj@k
    samples: Whole[1] = 1
    # with preferences: run folder of train_rm.py, to score completions
    reward_model: str | None = None
    # with a reward model: keep the best of so many completions (rejection sampling)
    best_of: Whole[1] = 1
    against: str | None = None  # with preferences: the model to compare with
    # JSON file to write; default: evaluation.json in the run folder of the adapter or the model; a
    # downloaded folder stays as it is
    out: str | None = None
    limit: Whole[0] = 0  # examples per task; 0: all
    max_new_tokens: Whole[1] = LONGEST_COMPLETION  # longest completion
    # how questions are put: see train_grpo.py; default: as the run was trained, else chat
    template: Literal["chat", "zero", "think"] | None = None
    # how completions begin: "<think>" makes the model think, "The answer is" keeps it from that
    begin: str = ""
    images: Literal["right", "none"] = "right"  # examples are asked with; none: with a grey one
    # of the completions; default: 0, greedy. With --samples: of the sampled ones alone (default: 1)
    temperature: NotNegative | None = None
    batch_size: Whole[1] = 256  # completions written side by side
    show: Whole[0] = 0  # wrong completions to print per task


FILES = {  # of the village
    "village": "sft_test.jsonl",
    "reasoning": "problems_test.jsonl",
    "tools": "tools_test.jsonl",
    "sql": "sql_test.jsonl",
}
OF_IMAGES = {  # of its images
    "images": "questions_test.jsonl",
    "combos": "combos_test.jsonl",
    "counting": "problems_test.jsonl",
}


def check_flags(cfg):
    """Refuse what would measure something else than was asked for."""
    if cfg.out:
        check_file(cfg.out)
    if cfg.best_of > 1 and not cfg.reward_model:
        raise UserError("--best_of needs a --reward_model that says which completion is best")
    if (cfg.reward_model or cfg.against) and cfg.data != "preferences":
        raise UserError("--reward_model and --against go with --data preferences alone")
    if "," in (cfg.adapter or "") and cfg.data == "preferences":
        raise UserError("--data preferences takes one --adapter at a time")
    if cfg.data in ("tools", "sql") and not cfg.tools:
        print("without --tools: the calls that the model writes aren't run")


def load_examples(cfg, model):
    """Test examples as --data and --limit say."""
    path, cloze = cfg.data, []
    if cfg.data in OF_IMAGES:
        from data.village import images

        model.image_store()  # refuses a model of text before images are painted
        path = images.of_run(cfg.model) / OF_IMAGES[cfg.data]
    elif cfg.data in FILES:
        path = village.of_run(cfg.model) / FILES[cfg.data]
    if cfg.data == "village":
        cloze = read_records(path.with_name("cloze.jsonl"))
    return first_of_each_task(cloze + read_examples(path), cfg.limit)


def held_out_text(cfg, model, tokenizer, label):
    """Loss on the village's held-out text; prints it, labelled with the adapter that speaks."""
    path = village.of_run(cfg.model) / "corpus_val.jsonl"
    corpus = open_corpus(tokenizer, path)
    windows = Windows(corpus, min(256, model.cfg.max_position_embeddings))
    nats, bpb = bits_per_byte(model, tokenizer, windows)
    print(f"held-out text{label}: {bpb:.4f} bits per byte")
    return {f"nats_per_token{label}": nats, f"bits_per_byte{label}": bpb}


def template_for(cfg):
    """The template that --template names, or with which the run, or its adapters, were trained."""
    trained_with = {template_of(folder) for folder in (cfg.adapter or cfg.model).split(",")}
    if len(trained_with) > 1 and not cfg.template:
        raise UserError("the adapters were trained with different templates; name one: --template")
    template = cfg.template or trained_with.pop()
    if template != "chat":
        print(f"questions are put by the template {template}")
    return template


def evaluate_answers(cfg, rt, model, tokenizer):
    """Accuracy on the test examples, and on the village bits per byte; prints them."""
    template, tools = template_for(cfg), None
    if cfg.tools:
        tools = Toolbox.with_knowledge(village.knowledge_of(cfg.model, cfg.knowledge), tokenizer)
    begun = tokenizer.encode(cfg.begin, special=True)

    def ids_of(example):
        return prompt_of(example, model, tokenizer, template) + begun

    examples = with_room(load_examples(cfg, model), ids_of, model, 1, cfg.data)
    names = [None]
    if model.lora:  # several adapters: each example is asked of the model alone, and of each
        names += model.lora.known
        examples = [e | {"task": f"{e['task']}, {name}"} for e in examples for name in names]
        use(model, names * (len(examples) // len(names)))
    answer = partial(
        accuracy_by_task,
        model,
        tokenizer,
        generator=torch.Generator(rt.device).manual_seed(cfg.seed),
        tools=tools,
        begin=cfg.begin,
        shown=cfg.images,
        template=template,
        batch_size=cfg.batch_size,
        max_new_tokens=cfg.max_new_tokens,
    )
    result = {"data": cfg.data, "template": template, "images": cfg.images}
    temperature = 0.0 if cfg.samples > 1 else cfg.temperature or 0.0
    result["tasks"], completions = answer(examples, temperature=temperature)
    if cfg.samples > 1:
        repeated = [example for example in examples for _ in range(cfg.samples)]
        model.select_rows(torch.arange(len(examples)).repeat_interleave(cfg.samples))
        _, sampled = answer(repeated, temperature=cfg.temperature or 1.0)
        result["sampled"] = sampled_metrics(examples, completions, sampled)
        print(f"greedy, one sample, maj@{cfg.samples} and pass@{cfg.samples}")
        print(accuracy_table({"": result["sampled"]}, ("accuracy", "sampled", "maj", "pass")))
    else:
        print(accuracy_table({"accuracy": result["tasks"]}))
    if cfg.data == "village":
        for name in names:
            use(model, name)
            label = f", {name}" if len(names) > 1 else ""
            result |= held_out_text(cfg, model, tokenizer, label)
    result["effects"] = [
        effect(name, None, found["accuracy"], "share") for name, found in result["tasks"].items()
    ]
    if cfg.show:
        wrong = [e | {"said": c} for e, c in zip(examples, completions) if not is_right(e, c)]
        for e in first_of_each_task(wrong, cfg.show):
            print(f"{e['task']}: {question_of(e)!r} -> {e['said']!r}, expected {e['answer']!r}")
    return result


def evaluate_preferences(cfg, rt, model, tokenizer):
    """What sampled completions of held-out prompts are worth, and the completions; prints it."""
    examples = read_prompts(village.of_run(cfg.model) / "prompts_test.jsonl")
    examples = examples[: cfg.limit or None]
    how = {"gold": gold_of(examples), "seed": cfg.seed, "max_new_tokens": cfg.max_new_tokens}
    if cfg.reward_model:
        how["reward_model"] = load_scorer(cfg.reward_model, tokenizer, cfg.model, rt)
    ref = rt.prepare(load_model(cfg.against)[0], train=False) if cfg.against else None
    stats, completions, golds = measure_completions(
        model, tokenizer, examples, ref, best_of=cfg.best_of, **how
    )
    result = {"prompts": list(map(question_of, examples)), "completions": completions}
    other = {}
    if ref is not None:
        other, result["completions_against"], other_golds = measure_completions(
            ref, tokenizer, examples, **how
        )
        stats["win_rate"] = win_rate(golds, other_golds)
    columns = [stats, other] if other else [stats]  # both may be of one model
    shown = [[f"{c[name]:.3f}" if name in c else "-" for c in columns] for name in stats]
    head = ["", cfg.model, cfg.against][: 1 + len(columns)]
    print(table(head, [[name, *cells] for name, cells in zip(stats, shown)]))
    worth = effect("gold score", other.get("gold"), stats["gold"])
    return {"stats": stats, "against": other, "effects": [worth]} | result


def main(cfg):
    check_flags(cfg)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model, cfg.adapter)
    rt.prepare(model, train=False)
    preferences = cfg.data == "preferences"
    measure = evaluate_preferences if preferences else evaluate_answers
    result = {"model": cfg.model, "adapter": cfg.adapter} | measure(cfg, rt, model, tokenizer)
    several = "," in (cfg.adapter or "")
    folder = Path(cfg.model if several else cfg.adapter or cfg.model)
    if cfg.out or (folder / "train_config.json").exists():
        name = "preferences.json" if preferences else "evaluation.json"
        name = "adapters.json" if several else name
        out = Path(cfg.out or folder / name)
        atomic_write(out, json.dumps(result, indent=2) + "\n")
        print(f"written to {out}")
    else:
        print(f"{folder} is no run folder and stays as it is; --out FILE keeps the result")
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
