"""What a model knows and can do: accuracy by task family, and bits per byte of held-out text.

Run     python -m nanollm.evaluate runs/sft                      # the village's held-out items
        python -m nanollm.evaluate runs/sft --data problems.jsonl
        python -m nanollm.evaluate runs/grpo --data reasoning --samples 8     # pass@8 and maj@8
        python -m nanollm.evaluate runs/zero --data reasoning    # asked as R1-Zero was trained
        python -m nanollm.evaluate runs/tools --data tools --tools
        python -m nanollm.evaluate runs/vlm --data pictures      # combos: pairs never seen together
        python -m nanollm.evaluate runs/vlm --data pictures --pictures grey    # how a blind model
                                                         # does; shuffled: a misled one
        python -m nanollm.evaluate runs/vlm-grpo --data counting --samples 8
        python -m nanollm.evaluate runs/ppo --data preferences --against runs/sft
        python -m nanollm.evaluate runs/sft --data preferences --reward_model runs/rm --best_of 4
Prints a table and writes it as JSON to <run>/evaluation.json, or preferences.json. Items are
JSONL, one per line: {"messages": [..., a user's turn], "answer": "...", "check": "contains" |
"exact" | "number" | "unknown", "family": "..."}, or {"prompt", "answer"}, or GSM8K's, with an
"image" where the question is about one; see data/README.md.
Answers are greedy unless --temperature says else; with --samples it speaks of the sampled ones.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data import village, village_pictures
from nanollm.config import UserError, atomic_write, cli
from nanollm.data import Windows, load_shards
from nanollm.figures import figures_table, first_of_each_family, sampled_figures, table
from nanollm.formats import identity, read_documents, read_jsonl
from nanollm.generate import check_room, generate
from nanollm.gpt import document_mask
from nanollm.hub import load_model, read_json
from nanollm.logprobs import token_logprobs
from nanollm.picture_data import read_picture_prompts, show_pictures, store_of
from nanollm.rewards import is_right
from nanollm.run import check_file
from nanollm.runtime import start
from nanollm.templates import prompt_of, template_of
from nanollm.tools import Toolbox, check_knowledge

LONGEST_ANSWER = 128  # tokens; the village's longest worked solution has 108


@dataclass
class Config:
    model: str = field(
        default="runs/sft", metadata={"positional": True}
    )  # run folder or model folder
    adapter: str | None = None  # folder of an adapter to put on it
    # village; its problems (reasoning) or questions for tools (tools); about its pictures questions
    # (pictures), those on combinations held out (combos) or problems (counting); a JSONL file of
    # test items; or preferences: what sampled replies to the village's held-out prompts are worth
    data: str = "village"
    tools: bool = False  # run the calls that the model writes
    knowledge: str | None = None  # with tools: JSONL of {"title", "text"}; default: the village's
    # k: beside a greedy answer per item, so many sampled ones, for pass@k and maj@k; 1: none
    samples: int = 1
    reward_model: str | None = None  # with preferences: run folder of train_rm.py, to score replies
    best_of: int = 1  # with a reward model: keep the best of so many replies (rejection sampling)
    against: str | None = None  # with preferences: the model to compare with
    # JSON file to write; default: evaluation.json in the folder of the adapter or the model
    out: str | None = None
    limit: int = 0  # items per family; 0: all
    max_new_tokens: int = LONGEST_ANSWER  # longest answer
    # how questions are put: see train_grpo.py; default: as the run was trained, else chat
    template: Literal["chat", "zero", "think"] | None = None
    # how every answer begins: "<think>" makes the model think, "The answer is" keeps it from that
    begin: str = ""
    # where items have pictures: right; grey: a grey one instead; shuffled: another item's
    pictures: Literal["right", "grey", "shuffled"] = "right"
    # of the answers; default: 0, greedy. With --samples: of the sampled ones alone (default: 1.0);
    # the answer beside them stays greedy
    temperature: float | None = None
    batch_size: int = 256  # answers written side by side
    seed: int = 0  # of the sampling
    show: int = 0  # wrong answers to print per family
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


# --- text ----------------------------------------------------------------------------------------


def token_lengths(tokenizer, vocab_size):
    """UTF-8 bytes of each token's text, (V,) int64; special tokens stand for no text."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for token, i in tokenizer.ranks.items():
        lengths[i] = len(token)
    return lengths


def next_token_logits(model, tokens, eot_id=None):
    """Logits (B, T, V) of plain rows; with eot_id attention stays inside the documents that
    <|endoftext|> begins.
    """
    return model(
        tokens, mask=None if eot_id is None else document_mask((tokens == eot_id).cumsum(1))
    )


@torch.no_grad()
def bits_per_byte(model, windows, token_bytes, eot_id=None, most=None, batch=32):
    """(nats per token, bits per byte) on held-out rows of T + 1 tokens; token_bytes as
    token_lengths gives it.

    With eot_id each document is read on its own, as in training with a document mask. `most` bounds
    the number of tokens. In data-parallel training every process computes the same rows, so that
    all agree on when to stop.
    """
    nats = tokens = text_bytes = 0
    rows_wanted = windows.n if most is None else min(windows.n, -(-most // windows.T))
    for part in torch.arange(rows_wanted).split(batch):
        rows = windows.rows(part).to(model.device)
        targets = rows[:, 1:]
        nats -= (
            token_logprobs(next_token_logits(model, rows[:, :-1], eot_id), targets)
            .double()
            .sum()
            .item()
        )
        tokens += targets.numel()
        text_bytes += token_bytes[targets.cpu()].sum().item()
    return nats / tokens, nats / math.log(2) / max(1, text_bytes)


# --- answers -------------------------------------------------------------------------------------


def read_items(path):
    """Test items of a JSONL file, read as training reads problems: "messages", "answer", "check",
    "family".
    """
    return [{"family": "all", **item} for item in read_picture_prompts(path, answered=True)]


def sample_replies(
    model,
    tokenizer,
    prompts,
    max_new_tokens,
    samples=1,
    temperature=1.0,
    batch_size=256,
    generator=None,
    tools=None,
    pictures=None,
):
    """Continue N prompts (lists of ids) `samples` times each; reply n * samples + g is the list of
    ids of sample g of prompt n, its stop token included. Short prompts run beside short ones.
    `pictures`: a tensor (n, 3, H, W) or None for each prompt, in a list or what is indexed like it.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [None] * len(prompts) * samples
    for first in range(0, len(order), max(1, batch_size // samples)):
        numbers = order[first : first + max(1, batch_size // samples)]
        room = model.cfg.max_position_embeddings - len(
            prompts[numbers[-1]]
        )  # at least one token, or generate refuses
        out = generate(
            model,
            [prompts[i] for i in numbers],
            max(1, min(max_new_tokens, room)),
            samples,
            temperature=temperature,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            generator=generator,
            tools=tools,
            pictures=None if pictures is None else [pictures[i] for i in numbers],
        )
        for row, ids in enumerate(out.lists()):
            replies[numbers[row // samples] * samples + row % samples] = ids
    return replies


def reply_all(model, tokenizer, prompts, max_new_tokens, temperature=0.0, **sampling):
    """As sample_replies, as texts, greedy where nothing else is said."""
    replies = sample_replies(
        model, tokenizer, prompts, max_new_tokens, temperature=temperature, **sampling
    )
    return [as_text(tokenizer, ids) for ids in replies]


def as_text(tokenizer, ids):
    """A reply without its stop token."""
    return tokenizer.decode([t for t in ids if t not in tokenizer.stop_ids])


def accuracy_by_family(
    model,
    tokenizer,
    items,
    max_new_tokens=LONGEST_ANSWER,
    begin="",
    store=None,
    shown="right",
    template="chat",
    **sampling,
):
    """Let the model answer every item; returns ({family: {"accuracy", "n"}}, replies).

    A cloze item is continued as plain text, and right when the text goes on with the answer;
    every other item is asked by the template, and judged by its check. Every reply goes on from
    `begin`.
    Items with "images" are asked with their pictures, or as `shown` says (show_pictures); a
    PictureStore given as `store` keeps those that it has opened.
    """
    begun = tokenizer.encode(begin, special=True)
    pictures = None
    if any(item.get("images") for item in items):
        pictures = show_pictures(items, store or store_of(model), shown)
    prompts = [prompt_of(item, model, tokenizer, template) + begun for item in items]
    check_room(model, prompts, 1, items)
    replies = reply_all(model, tokenizer, prompts, max_new_tokens, pictures=pictures, **sampling)
    replies = [begin + reply for reply in replies]
    right = defaultdict(list)
    for item, reply in zip(items, replies):
        right[item["family"]].append(is_right(item, reply))
    return {name: {"accuracy": sum(r) / len(r), "n": len(r)} for name, r in right.items()}, replies


def village_of(run_folder):
    """Folder of the village that a run was trained on; the default one where its settings don't
    say.
    """
    known = settings_with("villagers", run_folder)
    return village.prepare(
        known.get("villagers", 32), known.get("seed", 0), known.get("megabytes", 8.0)
    )


def pictures_of(run_folder):
    """Folder of the village's pictures that a run was trained on; the default one where its
    settings don't say.
    """
    known = settings_with("picture_size", run_folder)
    names = {"size": "picture_size", "n_train": "pictures"}
    chosen = {to: known[name] for to, name in names.items() if name in known}
    return village_pictures.prepare(**chosen)


def settings_with(name, run_folder):
    """Settings of the run that chose `name`: this one, or one that it began from; {} for none."""
    path = Path(run_folder) / "train_config.json"
    known = read_json(path) if path.exists() else {}
    if name not in known and known.get("init"):
        return settings_with(name, known["init"])
    return known if name in known else {}


# --data by name: where its folder is, and its file there
VILLAGE = {
    "reasoning": (village_of, "problems_test.jsonl"),
    "tools": (village_of, "tools_test.jsonl"),
    "pictures": (pictures_of, "questions_test.jsonl"),
    "combos": (pictures_of, "combos_test.jsonl"),
    "counting": (pictures_of, "problems_test.jsonl"),
}


def village_tools(run_folder, tokenizer, knowledge=None):
    """Calculator and search, in the knowledge base of the village or in another (JSONL)."""
    path = knowledge or village_of(run_folder) / "knowledge.jsonl"
    return Toolbox.with_knowledge(path, tokenizer)


WITHOUT_ANSWERS = "samples temperature template tools begin pictures show".split()


def check_flags(cfg):
    """Refuse flags that would change nothing."""
    check_knowledge(cfg)
    if cfg.out:
        check_file(cfg.out)
    if cfg.best_of > 1 and not cfg.reward_model:
        raise UserError("--best_of needs a --reward_model that says which reply is best")
    for name in ("reward_model", "against"):
        if getattr(cfg, name) and cfg.data != "preferences":
            raise UserError(f"--{name} goes with --data preferences alone")
    for name in WITHOUT_ANSWERS if cfg.data == "preferences" else ():
        if getattr(cfg, name) != getattr(Config, name):
            raise UserError(
                f"--{name} goes with questions that have an answer, not with --data preferences"
            )
    if cfg.pictures != "right" and cfg.data in ("village", "reasoning", "tools"):
        raise UserError(f"--pictures goes with questions about pictures, not --data {cfg.data}")
    if cfg.samples > 1 and cfg.temperature == 0:
        raise UserError("--temperature 0 makes all --samples alike; use 1")
    if cfg.data == "tools" and not cfg.tools:
        print("without --tools: the calls that the model writes aren't run")


def load_items(cfg, model):
    """Test items as --data and --limit say."""
    if cfg.data == "village":
        folder = village_of(cfg.model)
        items = [item for _, item in read_jsonl(folder / "cloze.jsonl")]
        items += read_items(folder / "sft_test.jsonl")
    elif cfg.data in VILLAGE:
        folder_of, name = VILLAGE[cfg.data]
        if folder_of is pictures_of:
            store_of(model)  # refuses a model without eyes before pictures are painted
        items = read_items(folder_of(cfg.model) / name)
    else:
        items = read_items(cfg.data)
    return first_of_each_family(items, cfg.limit)


def held_out_text(cfg, model, tokenizer):
    """Loss on the village's held-out text."""
    path = village_of(cfg.model) / "corpus_val.jsonl"
    shards = load_shards(lambda: read_documents(path), identity(path), tokenizer)
    windows = Windows(shards, min(256, model.cfg.max_position_embeddings))
    lengths = token_lengths(tokenizer, model.cfg.vocab_size)
    nats, bpb = bits_per_byte(model, windows, lengths, tokenizer.eot_id)
    return {"nats_per_token": nats, "bits_per_byte": bpb}


def evaluate_answers(cfg, rt, model, tokenizer):
    """Accuracy on the test items, and on the village bits per byte; prints them."""
    items = load_items(cfg, model)
    template = cfg.template or template_of(cfg.adapter or cfg.model)
    if template != "chat":
        print(f"questions are put by the template {template}")
    result = {"data": cfg.data, "template": template}
    if cfg.data == "village":
        result |= held_out_text(cfg, model, tokenizer)
    sampling = {
        "batch_size": cfg.batch_size,
        "generator": torch.Generator(rt.device).manual_seed(cfg.seed),
        "tools": village_tools(cfg.model, tokenizer, cfg.knowledge) if cfg.tools else None,
        "begin": cfg.begin,
        "shown": cfg.pictures,
        "template": template,
    }
    if any(item.get("images") for item in items):
        sampling["store"], result["pictures"] = store_of(model), cfg.pictures
    answer = partial(accuracy_by_family, model, tokenizer, max_new_tokens=cfg.max_new_tokens)
    alone = 0.0 if cfg.samples > 1 else cfg.temperature or 0.0
    result["families"], replies = answer(items, temperature=alone, **sampling)
    if cfg.samples > 1:
        repeated = [item for item in items for _ in range(cfg.samples)]
        sampled = answer(repeated, temperature=cfg.temperature or 1.0, **sampling)[1]
        result["sampled"] = sampled_figures(items, replies, sampled)
        print(figures_table({"": result["sampled"]}))
    else:
        print(table({"accuracy": result["families"]}))
    if "bits_per_byte" in result:
        print(f"held-out text: {result['bits_per_byte']:.4f} bits per byte")
    show_wrong(items, replies, cfg.show)
    return result


def show_wrong(items, replies, most):
    """Print at most so many wrong answers of each family."""
    wrong = [
        item | {"reply": reply} for item, reply in zip(items, replies) if not is_right(item, reply)
    ]
    for item in first_of_each_family(wrong, most) if most else []:
        asked = item.get("prompt") or item["messages"][-1]["content"]
        print(f"{item['family']}: {asked!r} -> {item['reply']!r}, expected {item['answer']!r}")


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
