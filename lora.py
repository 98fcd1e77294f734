"""Parameter-efficient fine-tuning: a new domain learnt by training few parameters, the rest frozen.

    lora      y = W x + s B A x,  s = alpha / r           Hu et al. 2021, arXiv:2106.09685, eq. 3
              --rslora: s = alpha / sqrt(r)               Kalajdzievski 2023, 2312.03732
              --lora_plus 16: B learns 16 times as fast   Hayou et al. 2024, 2402.12354
    dora      y = m (W + s B A) x / |W + s B A|           Liu et al. 2024, 2402.09353, eq. 5
    qlora     lora on W in four bits (NF4)                Dettmers et al. 2023, 2305.14314, eq. 5
    adapter   h + U gelu(D h) behind every branch         Houlsby et al. 2019, 1902.00751
    prefix    softmax(q [K_p; K]) [V_p; V],               Li & Liang 2021, 2101.00190
              K_p, V_p = MLP(P)
    ptuning   the same, K_p and V_p trained themselves    Liu et al. 2021, 2110.07602
    prompt    embeddings [P; E(x)] in front of the text   Lester et al. 2021, 2104.08691
    full      every parameter, to compare with

The layers behind the equations are in nanollm/peft/lora.py, nanollm/peft/nf4.py, nanollm/peft/adapters.py and
nanollm/peft/soft_prompts.py; the loss is that of train_sft.py. The domain is the village's harbour:
sailors speak of what the model knows in a manner of their own, and of ships that are new to it. Two
fifths of the dialogues are those of before, without which every method puts the manner everywhere.

Run     python lora.py                                # LoRA of rank 3 on all matrices of the blocks
        python lora.py --method prefix --out runs/prefix
        python lora.py --compare full,lora            # one after the other, and a table
        python lora.py --compare all --ranks 1,4,16   # every method
Needs   runs/sft                                             (python train_sft.py)
Expect  see README.md: accuracy in the new domain and elsewhere, parameters, memory, size of file
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data import village
from nanollm.adapter_table import RANKED, compare, state_bytes
from nanollm.batches import Sampler, Windows, load_shards, pack_chats, row_length
from nanollm.config import UserError, cli
from nanollm.formats import identity, read_chats, read_documents, read_examples, split_documents
from nanollm.hub import load_model
from nanollm.metrics import (
    accuracy_by_task,
    bits_per_byte,
    first_of_each_task,
    table,
    token_lengths,
)
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.peft import adapters
from nanollm.rewards import in_style, is_right
from nanollm.run import Run, check_folders
from nanollm.runtime import start
from train_sft import packed_logits, sft_loss, validation_loss


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Method
    method: Literal["lora", "dora", "qlora", "adapter", "prefix", "ptuning", "prompt", "full"] = (
        "lora"
    )
    rank: int = 3  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: float = 6.0  # lora, dora, qlora: s = alpha / r
    # lora, dora, qlora: names of linear layers, separated by commas; all: every one in the blocks
    targets: str = "all"
    rslora: bool = False  # s = alpha / sqrt(r), which keeps high ranks from learning less
    lora_plus: float = 1.0  # learning rate of B over that of A; LoRA+ takes 16
    virtual_tokens: int = 16  # V of prefix, ptuning and prompt
    hidden: int = 128  # prefix: width of the MLP that makes keys and values in training
    # instead of one method: several, separated by commas, or all; each in its own folder of --out
    compare: str = ""
    ranks: str = "3"  # ranks to compare, separated by commas
    # -- Data
    init: str = "runs/sft"  # run folder or model folder to start from
    data: str = "village"  # village: its new domain; or JSONL of dialogues (see data/README.md)
    val_data: str | None = None  # held-out dialogues; default: the last --val_fraction of --data
    val_fraction: float = 0.05  # share of --data that is held out
    test_data: str | None = None  # test examples of the new domain; the village has its own
    other_data: str = "village"  # test examples that show what is forgotten
    other_text: str = "village"  # text for the same purpose: bits per byte; .txt or .jsonl
    test_examples: int = 64  # items per task of --other_data
    # row length T; default: 256, or the model's context where that is shorter
    context: int | None = None
    # -- Training
    out: str = "runs/lora"  # run folder to write
    steps: int = 240  # optimizer steps
    batch_size: int = 8  # rows per optimizer step, over all processes
    accumulate: int = 1  # parts that a process splits its rows into, to save memory
    # adamw, or muon: matrices of the blocks by Muon, A and B too, the rest by AdamW
    optimizer: Literal["muon", "adamw"] = "adamw"
    muon_lr: float | None = None  # learning rate of Muon; default: by method
    lr: float | None = None  # learning rate of AdamW; default: by method
    # on matrices and embeddings; that of A and B pulls the model back to its base. Default: by
    # method
    weight_decay: float | None = None
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 10  # steps of linear warm-up
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 60  # steps between evaluations, each followed by a checkpoint
    # -- Machine
    seed: int = 0  # of new parameters and of the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    # precision of the layers; trained weights stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False  # torch.compile: about half a minute to start, then faster
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


PRESETS = {
    "smoke": {
        "steps": 10,
        "context": 128,
        "batch_size": 8,
        "eval_every": 5,
        "warmup": 2,
        "test_examples": 4,
    },
    "tiny": {},
    "gpu": {"context": 1024, "batch_size": 64, "accumulate": 2, "compile": True},
}

# learning rates of Muon and AdamW, and weight decay. Few parameters take, and want, larger steps
# than all of them. Decay keeps an adapter near its base, and so from forgetting; of all weights it
# would undo what they know.
RATES = {
    "full": (0.002, 1e-4, 0.0),
    "lora": (0.01, 5e-3, 6.0),
    "dora": (0.01, 5e-3, 6.0),
    "qlora": (0.01, 5e-3, 6.0),
    "adapter": (0.01, 1e-2, 0.0),
    "prefix": (0.0, 1e-2, 0.0),
    "ptuning": (0.0, 5e-2, 0.0),
    "prompt": (0.0, 5e-2, 0.0),
}


# --- data ----------------------------------------------------------------------------------------


def load_domain(cfg):
    """(training dialogues, held-out dialogues, test examples) of the new domain."""
    if cfg.data == "village":
        folder = village.of_run(cfg.init)
        train, val = (read_chats(folder / f"new_domain_{part}.jsonl") for part in ("train", "val"))
        return train, val, read_examples(cfg.test_data or folder / "new_domain_test.jsonl")
    if not cfg.test_data:
        raise UserError("--data FILE needs --test_data FILE: items that show what was learnt")
    train = read_chats(cfg.data)
    if cfg.val_data:
        val = read_chats(cfg.val_data)
    else:
        train, val = (split_documents(train, part, cfg.val_fraction) for part in ("train", "val"))
    return train, val, read_examples(cfg.test_data)


def load_elsewhere(cfg, tokenizer, T):
    """(test examples, windows of held-out text) of what the model knew before."""
    folder = village.of_run(cfg.init) if "village" in (cfg.other_data, cfg.other_text) else None
    examples, text = Path(cfg.other_data), Path(cfg.other_text)
    if cfg.other_data == "village":
        examples = folder / "sft_test.jsonl"
    if cfg.other_text == "village":
        text = folder / "corpus_val.jsonl"
    shards = load_shards(lambda: read_documents(text), identity(text), tokenizer)
    return first_of_each_task(read_examples(examples), cfg.test_examples), Windows(shards, T)


# --- measuring -----------------------------------------------------------------------------------


def measure(model, tokenizer, examples, other_examples, windows, token_bytes):
    """Accuracy in the new domain, where the manner counts, its two parts, and what is known
    elsewhere.
    """
    model.eval()
    tasks, completions = accuracy_by_task(model, tokenizer, examples)
    bare = [{k: v for k, v in i.items() if k not in ("begins", "ends")} for i in examples]
    others, _ = accuracy_by_task(model, tokenizer, other_examples)
    figures = {
        "accuracy": mean(is_right(i, r) for i, r in zip(examples, completions)),
        "facts": mean(is_right(i, r) for i, r in zip(bare, completions)),  # in any manner
        "manner": mean(in_style(i, r) for i, r in zip(examples, completions)),
        "tasks": tasks,
        "elsewhere": mean(each["accuracy"] for each in others.values()),
        "other_tasks": others,
        "bits_per_byte": bits_per_byte(model, windows, token_bytes, tokenizer.eot_id)[1],
    }
    model.train()
    return figures, completions


def mean(values):
    values = list(values)
    return sum(values) / max(1, len(values))


# --- training ------------------------------------------------------------------------------------


def attach(cfg, model):
    """The model as the method trains it; the base's own parameters are frozen, but for full."""
    if cfg.method == "full":
        return model
    names = {field.name for field in dataclasses.fields(adapters.Settings)}
    settings = adapters.Settings(**{name: getattr(cfg, name) for name in names})
    return adapters.attach(model, cfg.method, settings, cfg.init)


def main(cfg):
    if cfg.compare:
        return compare(cfg, __file__, [*RATES])
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.init, cfg.out)
    model, tokenizer = load_model(cfg.init)
    if getattr(model, "adapter", None):
        held = f"--init {cfg.init} holds an adapter ({model.adapter})"
        raise UserError(f"{held}; start from its base")
    T = row_length(cfg, model)
    chats, val_chats, examples = load_domain(cfg)
    train_rows = pack_chats(chats, tokenizer, T, "training", rt)
    val_rows = pack_chats(val_chats, tokenizer, T, "held-out", rt)
    other_examples, windows = load_elsewhere(cfg, tokenizer, T)
    token_bytes = token_lengths(tokenizer, model.cfg.vocab_size)
    measured = partial(measure, model, tokenizer, examples, other_examples, windows, token_bytes)

    share = rt.share(cfg.batch_size)
    before = None
    if not cfg.resume:
        rt.prepare(model, train=False)
        before, _ = measured()
    attach(cfg, model)
    run = Run(cfg, rt, cfg.steps)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    muon_lr, lr, weight_decay = (
        rate if given is None else given
        for rate, given in zip(RATES[cfg.method], (cfg.muon_lr, cfg.lr, cfg.weight_decay))
    )
    optimizers = build_optimizers(
        model, cfg.optimizer, muon_lr, lr, weight_decay, lora_plus=cfg.lora_plus
    )
    n_trained, trained_share = adapters.trainable(model)
    rt.print(f"{cfg.method}: {n_trained:,} trained parameters, {trained_share:.2%} of the base's")
    sampler = Sampler(len(train_rows), cfg.seed)
    scaler, trained = rt.scaler(), [model, optimizers, [sampler]]
    extra = run.restore(*trained, scaler) or {"before": before}
    since = 0

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        rows = train_rows[sampler.take(cfg.batch_size)[share]].to(rt.device)
        count = rt.sum(rows.mask[:, 1:].sum().item())  # trained tokens of the whole batch
        loss = 0.0
        parts = torch.arange(len(rows)).chunk(cfg.accumulate)
        for i, numbers in enumerate(parts):
            part = rows[numbers]
            with rt.accumulating(ddp_model, more=i + 1 < len(parts)):
                part_loss = sft_loss(packed_logits(ddp_model, part), part.tokens, part.mask) / count
                # times the number of processes, by which DDP's mean divides
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        loss = rt.sum(loss.item())
        run.check_finite(loss)
        optimizers.step(scaler)
        run.advance()

        since += cfg.batch_size * T
        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            run.log(since, show=("loss",), loss=loss, grad_norm=norm.item())
            since = 0
        if run.step % cfg.eval_every == 0 or last:
            extra["state_bytes"] = state_bytes(model, optimizers)
            model.eval()
            val_loss = validation_loss(model, val_rows)
            model.train()
            run.check_finite(val_loss, "held-out loss")
            run.log(val_loss=val_loss, show=("val_loss",))
            run.export(model, tokenizer)
            run.checkpoint(*trained, scaler, **extra)
    finish(cfg, rt, run, model, examples, *measured(), **extra)


def finish(cfg, rt, run, model, examples, after, completions, before, state_bytes):
    """Print what was gained and what forgotten, and keep it in result.json."""
    run.close()
    run.draw_curves("loss", "val_loss")
    run.write_sample(
        "\n".join(
            f"{example['messages'][-1]['content']}\n    {completion}"
            for example, completion in list(zip(examples, completions))[:10]
        )
    )
    columns = [each["tasks"] | each["other_tasks"] for each in (before, after)]
    rt.print(table(dict(zip(("before", "after"), columns))))
    for name in ("accuracy", "facts", "manner", "elsewhere", "bits_per_byte"):
        rt.print(f"{name:14} {before[name]:8.4f} -> {after[name]:8.4f}")
    n_trained, trained_share = adapters.trainable(model)
    weights = run.folder / ("model.safetensors" if cfg.method == "full" else adapters.WEIGHTS)
    figures = {
        "method": cfg.method,
        "rank": cfg.rank if cfg.method in RANKED else None,
        "trained_parameters": n_trained,
        "trained_share": trained_share,
        "state_bytes": state_bytes,
        "file_bytes": weights.stat().st_size if rt.main else 0,
        "gain": after["accuracy"] - before["accuracy"],
        "forgetting": before["elsewhere"] - after["elsewhere"],
        "forgetting_bits_per_byte": after["bits_per_byte"] - before["bits_per_byte"],
    }
    run.write_result(before=before, after=after, **figures, **run.speed())
    rt.print(
        f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s; {figures['file_bytes']:,} bytes saved"
    )
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
