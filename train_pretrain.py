"""Pretraining: learn to predict the next token of raw text.

    loss = - mean_t log p(x_t | x_<t)           Bengio et al. 2003; Radford et al. 2018 (GPT)
    bits per byte = total nats / (ln 2 * bytes of text)        comparable across tokenizers

The text is the village by default (data/village.py), or any .txt or .jsonl file, or a folder of
token shards. Rows of T tokens tile the text; each token is predicted once per epoch. A model of
ours starts from init_weights (nanollm/gpt.py); --init continues from a run folder or a downloaded
one.

Run     python train_pretrain.py
        python train_pretrain.py --data book.txt --vocab_size 1024 --steps 300 --out runs/book
        torchrun --nproc_per_node 8 train_pretrain.py --preset gpu --data text.jsonl
Needs   nothing
Expect  see README.md: bits per byte below what xz reaches, and facts that can be completed
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data import village
from nanollm.config import UserError, cli
from nanollm.data import (
    Sampler,
    TokenShards,
    Windows,
    load_shards,
    row_length,
    xz_bits_per_byte,
)
from nanollm.evaluate import bits_per_byte, next_token_logits, token_lengths
from nanollm.formats import identity, read_documents, split_documents
from nanollm.generate import generate
from nanollm.gpt import GPT, GPTConfig, count_parameters
from nanollm.hub import load_model, load_weights
from nanollm.logprobs import token_logprobs
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.run import Run, check_folders, checkpoint_of
from nanollm.runtime import flop_per_token, model_flops_utilisation, start
from nanollm.safetensors import load_folder
from nanollm.tokenizer import Tokenizer


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: 124M parameters, context 1024
    preset: str = "tiny"
    # -- Data
    # village, a .txt file, a .jsonl file of {"text"}, or a folder of token shards
    data: str = "village"
    # held-out text in the same formats; default: the last --val_fraction of --data
    val_data: str | None = None
    # share of --data that is held out (the village has held-out text of its own)
    val_fraction: float = 0.1
    # people in the village, six facts each; more need a larger model and more text
    villagers: int = 32
    megabytes: float = 8.0  # size of the village's corpus
    # train (byte-level BPE on --data), bytes, gpt2, cl100k_base, o200k_base, or a folder
    tokenizer: str = "train"
    vocab_size: int = 2048  # size of a trained tokenizer, special tokens included
    # -- Model
    # run folder or model folder to continue from; its shape and tokenizer are kept
    init: str | None = None
    layers: int = 4  # number of blocks
    channels: int = 128  # width C of the residual stream
    heads: int = 4  # query heads
    # key-value heads that the query heads share; default: as many as heads
    kv_heads: int | None = None
    # hidden width of the MLP; default: 8/3 C, rounded up to a multiple of 64
    mlp: int | None = None
    context: int = 256  # row length T in training, and the longest the model can read
    # a token sees its own document only, not the ones before it in the row
    document_mask: bool = True
    qk_norm: bool = True  # RMSNorm on queries and keys (saved as a Qwen3; without, as a Llama)
    tied: bool = True  # embedding and head share their weights
    # -- Training
    out: str = "runs/pretrain"  # run folder to write
    steps: int = 1500  # optimizer steps
    batch_size: int = 8  # rows per optimizer step, over all processes
    accumulate: int = 1  # parts that a process splits its rows into, to save memory
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    lr: float = 0.02  # learning rate of Muon
    adam_lr: float = 0.01  # learning rate of AdamW
    weight_decay: float = 0.1  # on matrices and embeddings
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 20  # steps of linear warm-up
    clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    # stop after so many evaluations without a better one, and keep the best; 0: never stop early
    patience: int = 0
    eval_every: int = 150  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 65536  # held-out tokens per evaluation; the last one reads all of them
    sample_tokens: int = 48  # length of the sample written at each evaluation; 0: none
    compare_xz: bool = False  # print what xz -9 needs for the held-out text after the training text
    # -- Machine
    seed: int = 0  # of weights, order of data and samples
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
        "layers": 2,
        "channels": 64,
        "heads": 2,
        "context": 160,
        "megabytes": 0.3,
        "vocab_size": 512,
        "eval_every": 10,
        "warmup": 4,
        "eval_tokens": 8192,
    },
    "tiny": {},
    "gpu": {
        "layers": 12,
        "channels": 768,
        "heads": 12,
        "context": 1024,
        "batch_size": 512,
        "accumulate": 16,
        "tokenizer": "gpt2",
        "villagers": 512,
        "megabytes": 200.0,
        "steps": 4000,
        "warmup": 200,
        "adam_lr": 1e-3,
        "eval_every": 250,
        "eval_tokens": 2**20,
        "compile": True,
    },
}


# --- data ----------------------------------------------------------------------------------------


def load_corpus(cfg):
    """(texts, source) of the training and of the held-out part; texts are functions, called only
    when needed.
    """
    if cfg.data == "village":
        folder = village.prepare(cfg.villagers, cfg.seed, cfg.megabytes)
        paths = [folder / "corpus_train.jsonl", folder / "corpus_val.jsonl"]
        return [(lambda p=p: read_documents(p), identity(p)) for p in paths]
    if not Path(cfg.data).exists():
        raise UserError(
            f"--data {cfg.data} does not exist; give a .txt or .jsonl file, a folder of shards, "
            f"or village"
        )
    if cfg.val_data:
        paths = [cfg.data, cfg.val_data]
        return [(lambda p=p: read_documents(p), identity(p)) for p in paths]
    return [
        (
            lambda part=part: split_documents(read_documents(cfg.data), part, cfg.val_fraction),
            [*identity(cfg.data), part, cfg.val_fraction],
        )
        for part in ("train", "val")
    ]


def get_tokenizer(cfg, texts):
    """The tokenizer that --tokenizer names, or one trained on about four million characters of the
    text.
    """
    if cfg.tokenizer != "train":
        return Tokenizer.load(cfg.tokenizer)
    documents, budget = texts(), 4_000_000
    stride = max(1, sum(map(len, documents)) // budget)
    part = (
        [d[:budget] for d in documents[::stride]] if len(documents) > 1 else [documents[0][:budget]]
    )
    return Tokenizer.train(part, cfg.vocab_size)


def load_shards_of(cfg, tokenizer):
    """Training and held-out TokenShards of --data."""
    if Path(cfg.data).is_dir():
        if not cfg.val_data:
            raise UserError(
                "--data names a folder of token shards, so --val_data must name another for the "
                "held-out text"
            )
        return TokenShards.open(cfg.data, tokenizer), TokenShards.open(cfg.val_data, tokenizer)
    return [load_shards(texts, source, tokenizer) for texts, source in load_corpus(cfg)]


# --- algorithm -----------------------------------------------------------------------------------


def next_token_loss(logits, targets):
    """Mean of -log p(target): logits (B, T, V), targets (B, T) -> scalar, in nats per token."""
    return -token_logprobs(logits, targets).mean()


# --- training ------------------------------------------------------------------------------------


def build_model(cfg, rt):
    """(GPT, Tokenizer): fresh with a tokenizer of its own, or from --init."""
    if cfg.init:
        return load_model(cfg.init)
    if cfg.resume:  # the tokenizer of the run itself: the data may have moved since
        tokenizer = Tokenizer.load(checkpoint_of(cfg.out).parent)
    elif Path(cfg.data).is_dir() and cfg.tokenizer == "train":
        raise UserError("token shards need the --tokenizer that they were made with")
    else:
        tokenizer = get_tokenizer(cfg, None if cfg.tokenizer != "train" else load_corpus(cfg)[0][0])
    if cfg.channels % cfg.heads:
        raise UserError(f"--channels {cfg.channels} is no multiple of --heads {cfg.heads}")
    if cfg.heads % (cfg.kv_heads or cfg.heads):
        raise UserError(f"--heads {cfg.heads} is no multiple of --kv_heads {cfg.kv_heads}")
    shape = GPTConfig(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,  # matrix products like multiples of 64
        hidden_size=cfg.channels,
        intermediate_size=cfg.mlp or -(-cfg.channels * 8 // 3 // 64) * 64,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads or cfg.heads,
        head_dim=cfg.channels // cfg.heads,
        max_position_embeddings=cfg.context,
        tie_word_embeddings=cfg.tied,
        qk_norm=cfg.qk_norm,
    )
    torch.manual_seed(cfg.seed)
    return GPT(shape), tokenizer


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    if cfg.init:
        check_folders(cfg.init, cfg.out)
    model, tokenizer = build_model(cfg, rt)
    T = row_length(cfg, model)
    train, val = load_shards_of(cfg, tokenizer)
    windows, val_windows = Windows(train, T), Windows(val, T)
    eot_id = tokenizer.eot_id if cfg.document_mask and train.documents > 1 else None
    token_bytes = token_lengths(tokenizer, model.cfg.vocab_size)

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    called = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.adam_lr, cfg.weight_decay)
    sampler, scaler = Sampler(windows.n, cfg.seed), rt.scaler()
    trained = [model, optimizers, [sampler]]
    best = {"bits_per_byte": math.inf, "misses": 0} | run.restore(*trained, scaler)
    schedule = SCHEDULES[cfg.schedule]
    tokens_per_step = cfg.batch_size * T
    total, matrices = count_parameters(model)
    flop = flop_per_token(model.cfg, matrices, T)
    rt.print(
        f"{total:,} parameters on {rt.device} in {str(rt.dtype)[6:]}; {train.tokens:,} training "
        f"tokens of "
        f"{train.text_bytes / train.tokens:.2f} bytes; {tokens_per_step:,} tokens per step"
    )

    since = 0  # tokens since the last logged line
    while run.step < cfg.steps and not (cfg.patience and best["misses"] >= cfg.patience):
        optimizers.schedule(schedule(run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        rows = windows.rows(sampler.take(cfg.batch_size)[share]).to(rt.device)  # (B, T + 1)
        loss, parts = 0.0, rows.chunk(cfg.accumulate)
        for i, part in enumerate(parts):
            with rt.accumulating(called, more=i + 1 < len(parts)):
                logits = next_token_logits(called, part[:, :-1], eot_id)
                part_loss = next_token_loss(logits, part[:, 1:]) * len(part) / len(rows)
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        loss = rt.sum(loss.item()) / rt.world
        run.check_finite(loss)
        if rt.dtype != torch.float16:  # there the scaler skips such steps
            run.check_finite(norm.item(), "gradient")
        optimizers.step(scaler)
        run.advance()

        since += tokens_per_step
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
            nats, bpb = bits_per_byte(
                model, val_windows, token_bytes, eot_id, None if last else cfg.eval_tokens
            )
            run.check_finite(nats, "held-out loss")
            run.log(val_loss=nats, bits_per_byte=bpb, show=("val_loss", "bits_per_byte"))
            if cfg.sample_tokens and rt.main:
                run.write_sample(sample_text(model, tokenizer, cfg, run.step))
            model.train()
            better = bpb < best["bits_per_byte"]
            best = {
                "bits_per_byte": min(bpb, best["bits_per_byte"]),
                "misses": 0 if better else best["misses"] + 1,
            }
            if better or not cfg.patience:
                run.export(model, tokenizer)
            run.checkpoint(*trained, scaler, **best)
            if cfg.patience and best["misses"] >= cfg.patience:
                rt.print(
                    f"stopped early: no better for {cfg.patience} evaluations; {cfg.out} keeps "
                    f"the best weights"
                )
    finish(cfg, rt, run, model, val_windows, token_bytes, eot_id, flop)


def sample_text(model, tokenizer, cfg, step):
    """A document that the model starts from nothing."""
    generator = torch.Generator(model.device).manual_seed(cfg.seed + step)
    out = generate(
        model,
        [[tokenizer.eot_id]],
        cfg.sample_tokens,
        temperature=0.8,
        stop_ids={tokenizer.eot_id},
        generator=generator,
    )
    return tokenizer.decode(out.lists()[0])


def finish(cfg, rt, run, model, val_windows, token_bytes, eot_id, flop):
    """Draw the curves and print what the run has reached; with early stopping, that of the best
    weights.
    """
    run.close()
    run.draw_curves("loss", "val_loss")
    if cfg.patience:
        load_weights(model, load_folder(cfg.out), cfg.out)
    nats, bpb = bits_per_byte(model.eval(), val_windows, token_bytes, eot_id)
    rt.print(
        f"held-out: {nats:.4f} nats per token, {bpb * math.log(2):.4f} nats per byte, {bpb:.4f} "
        f"bits per byte"
    )
    result = {
        "nats_per_token": nats,
        "nats_per_byte": bpb * math.log(2),
        "bits_per_byte": bpb,
        **run.speed(),
    }
    if cfg.compare_xz and rt.main:
        (train_texts, _), (val_texts, _) = load_corpus(cfg)
        result["xz_bits_per_byte"] = xz_bits_per_byte(train_texts(), val_texts())
        rt.print(f"xz -9 after the training text: {result['xz_bits_per_byte']:.4f} bits per byte")
    speed = result["tokens_per_second"]
    result["mfu"] = mfu = model_flops_utilisation(speed, flop, rt.device, rt.world)
    run.write_result(**result)
    rt.print(
        f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s, median {speed:,.0f} tokens/s"
        + (f", MFU {mfu:.1%}" if mfu else "")
        + f", peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
