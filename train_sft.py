"""Supervised fine-tuning: learn to answer from dialogues, predicting the assistant's tokens only.

    loss = - sum_t m_t log p(x_t | x_<t) / sum_t m_t

with m_t = 1 on the assistant's tokens and its end of turn, 0 elsewhere
(Ouyang et al. 2022, InstructGPT, arXiv:2203.02155).

Dialogues are packed into rows of T tokens; attention stays inside a dialogue and positions start
anew in each (Krell et al. 2021, arXiv:2107.02027). A dialogue longer than T loses its last turns
until it fits, and is dropped when not even its first answer does; both are counted and printed. Two
options work against forgetting: rows of pretraining text in every batch (--replay; Ouyang et al.
mix it in likewise) and smaller learning rates for lower layers (--layer_decay; Howard & Ruder 2018,
arXiv:1801.06146).

Run     python train_sft.py
        python train_sft.py --preset cot             # from runs/sft: think first, then answer;
                                                     # prints accuracy with and without steps
        python train_sft.py --preset tools           # from runs/grpo: call a calculator, or search
        python train_sft.py --preset reader          # from runs/sft: write questions from captions
        python train_sft.py --init path/to/SmolLM2-135M --data chats.jsonl --out runs/mine
Needs   runs/pretrain                                     (python train_pretrain.py)
Expect  see README.md: answers about villagers that it was never asked about, and "I don't know"
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from data import village_pictures
from nanollm.adapter_runs import start_adapter
from nanollm.config import UserError, cli
from nanollm.data import Packed, Sampler, Windows, load_shards, row_length
from nanollm.dialogues import pack_chats
from nanollm.evaluate import (
    accuracy_by_family,
    bits_per_byte,
    read_items,
    token_lengths,
    village_of,
    village_tools,
)
from nanollm.figures import first_of_each_family, table
from nanollm.formats import identity, read_chats, read_documents, split_documents
from nanollm.gpt import document_mask
from nanollm.hub import load_model
from nanollm.logprobs import token_logprobs
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.run import Run, check_folders
from nanollm.runtime import start


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; cot: chain of thought; tools: calls
    # of tools; reader: a teacher about pictures; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Data
    init: str = "runs/pretrain"  # run folder or model folder to start from
    # village; its problems with worked solutions (reasoning), with the answers alone (answers) or
    # some of each (mixed); dialogues with calls (tools); captions of pictures, and a question about
    # each (reader); or JSONL of dialogues (see data/README.md)
    data: str = "village"
    val_data: str | None = None  # held-out dialogues; default: the last --val_fraction of --data
    # share of --data that is held out (the village has held-out dialogues of its own)
    val_fraction: float = 0.05
    # test items to measure accuracy on, before and after; the village has its own
    test_data: str | None = None
    test_items: int = 64  # items per family for that
    # row length T; default: 256, or the model's context where that is shorter
    context: int | None = None
    # -- Against forgetting
    replay: float = 0.33  # share of the rows that are pretraining text, trained on at every token
    replay_data: str = "village"  # that text: village, or a .txt or .jsonl file
    # learning rate factor per layer below the head; 1: the same everywhere
    layer_decay: float = 1.0
    # -- Adapter
    # freeze the model and train an adapter only: lora, dora, qlora, adapter, prefix, ptuning or
    # prompt (nanollm/adapters.py); default: all weights are trained
    adapter: str | None = None
    rank: int = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: float = 32.0  # lora, dora, qlora: what they learn counts alpha / r
    # -- Training
    out: str = "runs/sft"  # run folder to write
    steps: int = 500  # optimizer steps
    batch_size: int = 16  # rows per optimizer step, over all processes
    accumulate: int = 1  # parts that a process splits its rows into, to save memory
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    lr: float = 0.007  # learning rate of Muon
    adam_lr: float = 1e-3  # learning rate of AdamW
    weight_decay: float = 0.0  # on matrices and embeddings
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 20  # steps of linear warm-up
    clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 125  # steps between evaluations, each followed by a checkpoint
    # -- Machine
    seed: int = 0  # of the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    # precision of the layers; weights stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False  # torch.compile: about half a minute to start, then faster
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


PRESETS = {
    "smoke": {
        "steps": 20,
        "context": 128,
        "batch_size": 8,
        "eval_every": 10,
        "warmup": 4,
        "test_items": 4,
    },
    "tiny": {},
    "cot": {
        "init": "runs/sft",
        "data": "mixed",
        "steps": 500,
        "batch_size": 8,
        "lr": 0.008,
        "adam_lr": 3e-3,
        "replay": 0.125,
        "out": "runs/cot",
    },
    "tools": {
        "init": "runs/grpo",
        "data": "tools",
        "steps": 400,
        "lr": 0.01,
        "adam_lr": 3e-3,
        "replay": 0.125,
        "out": "runs/tools",
    },
    "reader": {
        "init": "runs/sft",
        "data": "reader",
        "steps": 400,
        "batch_size": 8,
        "lr": 0.008,
        "adam_lr": 3e-3,
        "replay": 0.0,
        "eval_every": 100,
        "out": "runs/reader",
    },
    "gpu": {
        "context": 1024,
        "batch_size": 128,
        "accumulate": 4,
        "lr": 5e-3,
        "adam_lr": 3e-4,
        "compile": True,
    },
}


# --- data ----------------------------------------------------------------------------------------


# --data: (training and held-out dialogues, test items) among the village's files
VILLAGE = {
    "village": ("sft", "sft_test"),
    "reasoning": ("reasoning", "problems_test"),
    "answers": ("answers", "problems_test"),
    "mixed": ("mixed", "problems_test"),
    "tools": ("tools", "tools_test"),
    "reader": ("reader", None),
}


def load_chats(cfg):
    """(training dialogues, held-out dialogues, test items)."""
    if cfg.data in VILLAGE:
        chats, test = VILLAGE[cfg.data]
        folder = village_pictures.prepare() if cfg.data == "reader" else village_of(cfg.init)
        train, val = (read_chats(folder / f"{chats}_{split}.jsonl") for split in ("train", "val"))
        test = cfg.test_data or (test and folder / f"{test}.jsonl")
        return train, val, read_items(test) if test else []
    train = read_chats(cfg.data)
    if cfg.val_data:
        val = read_chats(cfg.val_data)
    else:
        train, val = (
            split_documents(train, "train", cfg.val_fraction),
            split_documents(train, "val", cfg.val_fraction),
        )
    return train, val, read_items(cfg.test_data) if cfg.test_data else []


def load_replay(cfg, tokenizer):
    """(training shards, held-out shards) of text, for replay and to measure forgetting."""
    if cfg.replay_data == "village":
        folder = village_of(cfg.init)
        paths = [folder / "corpus_train.jsonl", folder / "corpus_val.jsonl"]
        return [load_shards(lambda p=p: read_documents(p), identity(p), tokenizer) for p in paths]
    documents = read_documents(cfg.replay_data)
    return [
        load_shards(
            lambda part=part: split_documents(documents, part),
            [*identity(cfg.replay_data), part],
            tokenizer,
        )
        for part in ("train", "val")
    ]


def replay_rows(windows, numbers, eot_id):
    """Rows of plain text in the form of packed dialogues: documents begin with <|endoftext|>, all
    is trained on.
    """
    tokens = windows.rows(numbers)  # (R, T)
    documents = (tokens == eot_id).cumsum(1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Packed(tokens, mask, documents, torch.arange(tokens.shape[1]).expand_as(tokens))


# --- algorithm -----------------------------------------------------------------------------------


def sft_loss(logits, tokens, mask):
    """Sum of -log p over the trained tokens: logits (B, T, V), tokens and mask (B, T) -> scalar.

    The caller divides by the number of trained tokens of the whole batch, so that each weighs the
    same however the batch is split over parts and processes.
    """
    return -(token_logprobs(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum()


def packed_logits(model, rows):
    """Logits (B, T, V) of packed rows: attention inside documents, positions as they say."""
    return model(rows.tokens, rows.positions, document_mask(rows.documents))


@torch.no_grad()
def validation_loss(model, rows, batch=32, logits_of=packed_logits):
    """Nats per trained token on held-out packed rows."""
    total = 0.0
    for numbers in torch.arange(len(rows)).split(batch):
        part = rows.rows(numbers).to(model.device)
        total += sft_loss(logits_of(model, part), part.tokens, part.mask).item()
    return total / rows.mask[:, 1:].sum().item()


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.init, cfg.out)
    if not 0 <= cfg.replay < 1:
        raise UserError(f"--replay {cfg.replay} is no share: it lies between 0 and 1, 1 excluded")
    model, tokenizer = load_model(cfg.init)
    start_adapter(model, cfg, rt)
    T = row_length(cfg, model)
    chats, val_chats, items = load_chats(cfg)
    train_rows = pack_chats(chats, tokenizer, T, "training", rt)
    val_rows = pack_chats(val_chats, tokenizer, T, "held-out", rt)
    text, val_text = load_replay(cfg, tokenizer)
    windows, val_windows = Windows(text, T - 1), Windows(val_text, T)
    n_replay = round(cfg.replay * cfg.batch_size)
    token_bytes = token_lengths(tokenizer, model.cfg.vocab_size)
    items = first_of_each_family(items, cfg.test_items)

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    called = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizers = build_optimizers(
        model, cfg.optimizer, cfg.lr, cfg.adam_lr, cfg.weight_decay, layer_decay=cfg.layer_decay
    )
    chat_sampler = Sampler(len(train_rows), cfg.seed)
    text_sampler = Sampler(windows.n, cfg.seed + 1)
    scaler, trained = rt.scaler(), [model, optimizers, [chat_sampler, text_sampler]]
    tools = village_tools(cfg.init, tokenizer) if cfg.data == "tools" else None
    measured = partial(measure, model, tokenizer, tools, items, val_windows, token_bytes)
    before = run.restore(*trained, scaler)
    if not before:
        before = measured()
    since = 0

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        chat_rows = train_rows.rows(chat_sampler.take(cfg.batch_size - n_replay))
        text_rows = replay_rows(windows, text_sampler.take(n_replay), tokenizer.eot_id)
        rows = chat_rows.join(text_rows).rows(share).to(rt.device)
        # trained tokens of the whole batch, never zero
        count = rt.sum(rows.mask[:, 1:].sum().item())
        loss = 0.0
        parts = torch.arange(len(rows)).chunk(cfg.accumulate)
        for i, numbers in enumerate(parts):
            part = rows.rows(numbers)
            with rt.accumulating(called, more=i + 1 < len(parts)):
                part_loss = sft_loss(packed_logits(called, part), part.tokens, part.mask) / count
                # times the number of processes, by which DDP's mean divides
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        loss = rt.sum(loss.item())
        run.check_finite(loss)
        if rt.dtype != torch.float16:  # there the scaler skips such steps
            run.check_finite(norm.item(), "gradient")
        optimizers.step(scaler)
        run.advance()

        since += cfg.batch_size * T
        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            run.log(
                since,
                show=("loss",),
                loss=loss,
                grad_norm=norm.item(),
                lr=optimizers.groups()[0]["lr"],
            )
            since = 0
        if run.step % cfg.eval_every == 0 or last:
            model.eval()
            bpb = bits_per_byte(model, val_windows, token_bytes, tokenizer.eot_id, 32768)[1]
            val_loss = validation_loss(model, val_rows)
            run.check_finite(val_loss, "held-out loss")
            run.log(val_loss=val_loss, bits_per_byte=bpb, show=("val_loss", "bits_per_byte"))
            if items and rt.main:
                run.write_sample(sample_dialogues(model, tokenizer, tools, items))
            model.train()
            run.export(model, tokenizer)
            run.checkpoint(*trained, scaler, **before)
    after = measured()
    if cfg.data in ("reasoning", "mixed"):
        after |= with_and_without_steps(model, tokenizer, items)
    finish(cfg, rt, run, before, after)


def measure(model, tokenizer, tools, items, val_windows, token_bytes):
    """Accuracy by family, and bits per byte of held-out text: what fine-tuning gives and takes."""
    model.eval()
    families = accuracy_by_family(model, tokenizer, items, tools=tools)[0] if items else {}
    bpb = bits_per_byte(model, val_windows, token_bytes, tokenizer.eot_id)[1]
    model.train()
    return {"families": families, "bits_per_byte": bpb}


def with_and_without_steps(model, tokenizer, items):
    """Accuracy by family where every answer has to begin with a thought, or with the result."""
    model.eval()
    begins = {"with_steps": "<think>", "without_steps": "The answer is"}
    return {
        name: accuracy_by_family(model, tokenizer, items, begin=begin)[0]
        for name, begin in begins.items()
    }


def sample_dialogues(model, tokenizer, tools, items):
    """The model's answer to one item of each family."""
    chosen = first_of_each_family(items, 1)
    replies = accuracy_by_family(model, tokenizer, chosen, tools=tools)[1]
    return "\n".join(
        f"{i['messages'][-1]['content']}\n    {reply}" for i, reply in zip(chosen, replies)
    )


def finish(cfg, rt, run, before, after):
    """Print what fine-tuning has changed, and keep it in result.json."""
    run.close()
    run.draw_curves("loss", "val_loss")
    if after["families"]:
        columns = {"before": before["families"], "after": after["families"]}
        made_to = {"with steps": after.get("with_steps"), "without": after.get("without_steps")}
        rt.print(table(columns | {name: column for name, column in made_to.items() if column}))
    change = after["bits_per_byte"] - before["bits_per_byte"]
    rt.print(
        f"forgetting: held-out text from {before['bits_per_byte']:.4f} to "
        f"{after['bits_per_byte']:.4f} bits per "
        f"byte ({change:+.4f})"
    )
    run.write_result(before=before, after=after, forgetting_bits_per_byte=change, **run.speed())
    rt.print(
        f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s, median "
        f"{run.speed()['tokens_per_second']:,.0f} tokens/s"
    )
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
