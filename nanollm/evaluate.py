"""What a model knows and can do: accuracy by task task, and bits per byte of held-out text.

Run     python -m nanollm.evaluate runs/sft                      # the village's held-out items
        python -m nanollm.evaluate runs/sft --data problems.jsonl
        python -m nanollm.evaluate runs/grpo --data reasoning --samples 8     # pass@8 and maj@8
        python -m nanollm.evaluate runs/zero --data reasoning    # asked as R1-Zero was trained
        python -m nanollm.evaluate runs/tools --data tools --tools
        python -m nanollm.evaluate runs/vlm --data images      # combos: pairs never seen together
        python -m nanollm.evaluate runs/vlm --data images --images grey    # how a blind model
                                                         # does; shuffled: a misled one
        python -m nanollm.evaluate runs/vlm-grpo --data counting --samples 8
        python -m nanollm.evaluate runs/ppo --data preferences --against runs/sft
        python -m nanollm.evaluate runs/sft --data preferences --reward_model runs/rm --best_of 4
Prints a table and writes it as JSON to <run>/evaluation.json, or preferences.json. Items are
JSONL, one per line: {"messages": [..., a user's turn], "answer": "...", "check": "contains" |
"exact" | "number" | "unknown", "task": "..."}, or {"prompt", "answer"}, or GSM8K's, with an
"image" where the question is about one; see data/README.md.
Answers are greedy unless --temperature says else; with --samples it speaks of the sampled ones.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data import village
from data.village import images as village_images
from nanollm.batches import Windows, load_shards
from nanollm.config import UserError, atomic_write, cli
from nanollm.formats import identity, read_documents, read_examples, read_jsonl
from nanollm.hub import load_model
from nanollm.metrics import (
    accuracy_by_task,
    bits_per_byte,
    first_of_each_task,
    metrics_table,
    sampled_metrics,
    table,
    token_lengths,
)
from nanollm.rewards import is_right
from nanollm.rollouts import template_of
from nanollm.run import check_file
from nanollm.runtime import start
from nanollm.tools import Toolbox, check_knowledge

LONGEST_COMPLETION = 128  # tokens; the village's longest worked solution has 108


@dataclass
class Config:
    model: str = field(
        default="runs/sft", metadata={"positional": True}
    )  # run folder or model folder
    adapter: str | None = None  # folder of an adapter to put on it
    # village; its problems (reasoning) or questions for tools (tools); about its images questions
    # (images), those on combinations held out (combos) or problems (counting); a JSONL file of
    # test examples; or preferences: what sampled completions to the village's held-out prompts are worth
    data: str = "village"
    tools: bool = False  # run the calls that the model writes
    knowledge: str | None = None  # with tools: JSONL of {"title", "text"}; default: the village's
    # k: beside a greedy answer per item, so many sampled ones, for pass@k and maj@k; 1: none
    samples: int = 1
    reward_model: str | None = (
        None  # with preferences: run folder of train_rm.py, to score completions
    )
    best_of: int = (
        1  # with a reward model: keep the best of so many completions (rejection sampling)
    )
    against: str | None = None  # with preferences: the model to compare with
    # JSON file to write; default: evaluation.json in the folder of the adapter or the model
    out: str | None = None
    limit: int = 0  # items per task; 0: all
    max_new_tokens: int = LONGEST_COMPLETION  # longest answer
    # how questions are put: see train_grpo.py; default: as the run was trained, else chat
    template: Literal["chat", "zero", "think"] | None = None
    # how every answer begins: "<think>" makes the model think, "The answer is" keeps it from that
    begin: str = ""
    # where items have images: right; grey: a grey one instead; shuffled: another item's
    images: Literal["right", "grey", "shuffled"] = "right"
    # of the answers; default: 0, greedy. With --samples: of the sampled ones alone (default: 1.0);
    # the answer beside them stays greedy
    temperature: float | None = None
    batch_size: int = 256  # answers written side by side
    seed: int = 0  # of the sampling
    show: int = 0  # wrong answers to print per task
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


# --data by name: where its folder is, and its file there
VILLAGE = {
    "reasoning": (village.of_run, "problems_test.jsonl"),
    "tools": (village.of_run, "tools_test.jsonl"),
    "images": (village_images.of_run, "questions_test.jsonl"),
    "combos": (village_images.of_run, "combos_test.jsonl"),
    "counting": (village_images.of_run, "problems_test.jsonl"),
}


WITHOUT_ANSWERS = "samples temperature template tools begin images show".split()


def check_flags(cfg):
    """Refuse flags that would change nothing."""
    check_knowledge(cfg)
    if cfg.out:
        check_file(cfg.out)
    if cfg.best_of > 1 and not cfg.reward_model:
        raise UserError("--best_of needs a --reward_model that says which completion is best")
    for name in ("reward_model", "against"):
        if getattr(cfg, name) and cfg.data != "preferences":
            raise UserError(f"--{name} goes with --data preferences alone")
    for name in WITHOUT_ANSWERS if cfg.data == "preferences" else ():
        if getattr(cfg, name) != getattr(Config, name):
            raise UserError(
                f"--{name} goes with questions that have an answer, not with --data preferences"
            )
    if cfg.images != "right" and cfg.data in ("village", "reasoning", "tools"):
        raise UserError(f"--images goes with questions about images, not --data {cfg.data}")
    if cfg.samples > 1 and cfg.temperature == 0:
        raise UserError("--temperature 0 makes all --samples alike; use 1")
    if cfg.data == "tools" and not cfg.tools:
        print("without --tools: the calls that the model writes aren't run")


def load_examples(cfg, model):
    """Test items as --data and --limit say."""
    if cfg.data == "village":
        folder = village.of_run(cfg.model)
        examples = [example for _, example in read_jsonl(folder / "cloze.jsonl")]
        examples += read_examples(folder / "sft_test.jsonl")
    elif cfg.data in VILLAGE:
        folder_of, name = VILLAGE[cfg.data]
        if folder_of is village_images.of_run:
            model.image_store()  # refuses a model without eyes before images are painted
        examples = read_examples(folder_of(cfg.model) / name)
    else:
        examples = read_examples(cfg.data)
    return first_of_each_task(examples, cfg.limit)


def held_out_text(cfg, model, tokenizer):
    """Loss on the village's held-out text."""
    path = village.of_run(cfg.model) / "corpus_val.jsonl"
    shards = load_shards(lambda: read_documents(path), identity(path), tokenizer)
    windows = Windows(shards, min(256, model.cfg.max_position_embeddings))
    lengths = token_lengths(tokenizer, model.cfg.vocab_size)
    nats, bpb = bits_per_byte(model, windows, lengths, tokenizer.eot_id)
    return {"nats_per_token": nats, "bits_per_byte": bpb}


def evaluate_answers(cfg, rt, model, tokenizer):
    """Accuracy on the test examples, and on the village bits per byte; prints them."""
    examples = load_examples(cfg, model)
    template = cfg.template or template_of(cfg.adapter or cfg.model)
    if template != "chat":
        print(f"questions are put by the template {template}")
    result = {"data": cfg.data, "template": template}
    if cfg.data == "village":
        result |= held_out_text(cfg, model, tokenizer)
    sampling = {
        "batch_size": cfg.batch_size,
        "generator": torch.Generator(rt.device).manual_seed(cfg.seed),
        "tools": Toolbox.of_village(village.of_run(cfg.model), tokenizer, cfg.knowledge)
        if cfg.tools
        else None,
        "begin": cfg.begin,
        "shown": cfg.images,
        "template": template,
    }
    if any(example.get("images") for example in examples):
        sampling["store"], result["images"] = model.image_store(), cfg.images
    answer = partial(accuracy_by_task, model, tokenizer, max_new_tokens=cfg.max_new_tokens)
    alone = 0.0 if cfg.samples > 1 else cfg.temperature or 0.0
    result["tasks"], completions = answer(examples, temperature=alone, **sampling)
    if cfg.samples > 1:
        repeated = [example for example in examples for _ in range(cfg.samples)]
        sampled = answer(repeated, temperature=cfg.temperature or 1.0, **sampling)[1]
        result["sampled"] = sampled_metrics(examples, completions, sampled)
        print(metrics_table({"": result["sampled"]}))
    else:
        print(table({"accuracy": result["tasks"]}))
    if "bits_per_byte" in result:
        print(f"held-out text: {result['bits_per_byte']:.4f} bits per byte")
    show_wrong(examples, completions, cfg.show)
    return result


def show_wrong(examples, completions, most):
    """Print at most so many wrong answers of each task."""
    wrong = [
        example | {"completion": completion}
        for example, completion in zip(examples, completions)
        if not is_right(example, completion)
    ]
    for example in first_of_each_task(wrong, most) if most else []:
        asked = example.get("prompt") or example["messages"][-1]["content"]
        print(
            f"{example['task']}: {asked!r} -> {example['completion']!r}, expected {example['answer']!r}"
        )


def main(cfg):
    check_flags(cfg)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model, cfg.adapter)
    rt.prepare(model, train=False)
    result = {"model": cfg.model, "adapter": cfg.adapter}
    if cfg.data == "preferences":
        from nanollm.preferences import evaluate_preferences  # which stands on this module

        name = "preferences.json"
        result |= evaluate_preferences(cfg, rt, model, tokenizer)
    else:
        name = "evaluation.json"
        result |= evaluate_answers(cfg, rt, model, tokenizer)
    out = Path(cfg.out or Path(cfg.adapter or cfg.model) / name)
    atomic_write(out, json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")
    rt.close()


if __name__ == "__main__":
    cli(main, Config)
