"""Pretraining: learn to predict the next token of raw text, or with --objective mlm those left out.

    loss = - mean_t log p(x_t | x_<t)           Bengio et al. 2003; Radford et al. 2018 (GPT)
    loss = - mean_{t in M} log p(x_t | x~)      masked language modelling: Devlin et al. 2019
                                                (BERT, arXiv:1810.04805, section 3.1, task 1)
    bits per byte = total nats / (ln 2 * bytes of text)        comparable across tokenizers

x_<t is what comes before in the document (with --no_document_mask: in the row). x~ is the text with
15% of its tokens, M, blanked out; attention then sees both sides. Such a model fills in blanks and
can't write on: the other scripts refuse it. Next sentence prediction, BERT's second task, is left
out (Liu et al. 2019, RoBERTa, 1907.11692, found no use in it).

The text is the village by default (data/village/), or any .txt or .jsonl file, or a folder of .txt
files, or a mixture of several. It is read document by document into a file of tokens, never into
memory. Rows of T tokens tile it; each token is predicted once per epoch, of a mixture once per
epoch of its source. A new model is initialised by init_weights (nanollm/gpt.py); --init continues
from a run folder or a downloaded one.

Run     python train_pretrain.py
        python train_pretrain.py --objective mlm --against runs/pretrain --out runs/mlm
        python train_pretrain.py --data book.txt --vocab_size 1024 --steps 300 --out runs/book
        python train_pretrain.py --data village:0.8,book.txt:0.2 --out runs/both
        torchrun --nproc_per_node 8 train_pretrain.py --preset gpu --data text.jsonl
Needs   nothing
Expect  0.30 bits per byte of held-out text, where `xz -9` that has seen the training text needs
        0.86; all 672 facts about the villagers can be completed (README.md)
        with --data big.txt --val_fraction 1e-4 --steps 2 a text of 999 MB takes at most 681 MiB,
        its first 8 MB 647 MiB (2 cores AMD EPYC, AVX2, fp32)
        --objective mlm: after the same 1500 steps the model fills in 77% of these facts, where the
        causal one completes 100% (seed 0, fp32); with --preset short, --seed 0 and 1, 8% and 6%,
        the causal one 71% and 62% (bf16, seed 0: 10% and 61%)
Watch   loss, val_loss  nats per token, 7.6 at first (ln of the vocabulary), 0.7 at the end;
                        val_loss rising while loss falls: too many epochs, fewer --steps
        bits_per_byte   the same, comparable across tokenizers
        grad_norm       below 1 after warm-up; rising: lower the learning rates
"""

import itertools
import lzma
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data.village.corpus import prepare_corpus
from nanollm.batches import (
    MixedSampler,
    Windows,
    by_share,
    open_corpus,
    pad_completions,
    row_length,
)
from nanollm.checkpoint import load_gpt, save_gpt
from nanollm.config import LARGE, OpenShare, Positive, TrainConfig, Whole, cli, read_json
from nanollm.formats import mixture, read_documents, read_records, stream_pieces
from nanollm.generate import generate
from nanollm.gpt import GPT, GPTConfig, count_parameters, document_mask, shape_of
from nanollm.logprobs import bits_per_byte, next_token_logits, token_lengths, token_logprobs
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.run import Run, check_folders, checkpoint_of, effect
from nanollm.runtime import start
from nanollm.tokenizer import Tokenizer

MASK = "<|mask|>"


@dataclass
class Config(TrainConfig):
    # -- Data
    # village, a .txt file or a folder of them, or records of {"text"}; or several of these, each
    # with its share of the rows: a.jsonl:0.7,b.txt:0.3
    data: str = "village"
    # held-out text in the same formats; default: the last --val_fraction of --data
    val_data: str | None = None
    # share of --data that is held out (the village has held-out text of its own)
    val_fraction: OpenShare = 0.1
    # people in the village, six facts each; more need a larger model and more text
    villagers: Whole[1] = 32
    megabytes: Positive = 8.0  # size of the village's corpus
    # train (byte-level BPE on --data), bytes, gpt2, or a folder
    tokenizer: str = "train"
    vocab_size: Whole[1] = 2048  # size of a trained tokenizer, special tokens included
    # -- Model
    # causal: predict the next token (GPT); mlm: fill in blanks, seeing both sides (BERT)
    objective: Literal["causal", "mlm"] = "causal"
    # run folder or model folder to continue from; its shape and tokenizer are kept
    init: str | None = None
    layers: Whole[1] = 4  # number of blocks
    channels: Whole[1] = 128  # width C of the residual stream
    heads: Whole[1] = 4  # query heads
    # key-value heads that the query heads share; default: as many as heads
    kv_heads: Whole[1] | None = None
    # hidden width of the MLP; default: 8/3 C, rounded up to a multiple of 64
    mlp: Whole[1] | None = None
    context: Whole[1] = 256  # row length T in training, and the longest the model can read
    # a token sees its own document only, not the ones before it in the row
    document_mask: bool = True
    qk_norm: bool = True  # RMSNorm on queries and keys (saved as a Qwen3; without, as a Llama)
    tied: bool = True  # embedding and head share their weights
    # -- Training
    out: str = "runs/pretrain"
    steps: int = 1500
    batch_size: int = 8
    lr: float = 0.01
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    eval_every: int = 150
    eval_tokens: Whole[1] = 65536  # held-out tokens per evaluation
    sample_tokens: Whole[0] = 48  # length of the sample written at each evaluation; 0: none
    compare_xz: bool = False  # print what xz -9 needs for the held-out text after the training text
    # another run, whose results stand before this one's: from other text, or by another objective
    against: str | None = None


SMALL = dict(layers=2, context=160, vocab_size=512, warmup=4, eval_tokens=8192)
PRESETS = {
    "smoke": dict(SMALL, channels=64, heads=2, megabytes=0.3, steps=20, eval_every=10),
    # a small model and village, for comparisons
    "short": dict(SMALL, channels=128, megabytes=2.0, villagers=8, steps=600, eval_every=200),
    # 124M parameters
    "gpu": dict(layers=12, channels=768, heads=12, context=1024, batch_size=512, accumulate=16)
    | dict(tokenizer="gpt2", villagers=512, megabytes=200.0, steps=4000, warmup=200, lr=1e-3)
    | dict(eval_every=250, eval_tokens=2**20, compile=True),
    # To go on with a downloaded model: a tenth of the rate to which Ibrahim et al. (2024,
    # arXiv:2403.08763) re-warm 405M parameters, as nothing of the old text is replayed here
    "downloaded": dict(LARGE, context=1024, batch_size=32, accumulate=32, steps=500, lr=3e-5),
}


# --- data ----------------------------------------------------------------------------------------


def sources(cfg):
    """What stream_pieces reads the training texts from, and the held-out texts: one per source."""
    parts, pairs = ("train", "val"), []
    for name in mixture(cfg.data):
        if name == "village":
            folder = prepare_corpus(cfg.villagers, cfg.seed, cfg.megabytes)
            pairs.append([(folder / f"corpus_{part}.jsonl",) for part in parts])
        elif cfg.val_data:
            pairs.append([(name,), (cfg.val_data,)])
        else:
            pairs.append([(name, part, cfg.val_fraction) for part in parts])
    return list(zip(*pairs))


def get_tokenizer(cfg):
    """The one that --tokenizer names, one trained on the text, or of a resumed run its own."""
    if cfg.resume:
        return Tokenizer.load(checkpoint_of(cfg.out).parent)
    special = [MASK] if cfg.objective == "mlm" else []
    if cfg.tokenizer != "train":
        return Tokenizer.load(cfg.tokenizer).with_tokens(special)
    return Tokenizer.train(sample_of_text(cfg), cfg.vocab_size - len(special)).with_tokens(special)


def sample_of_text(cfg, most=4_000_000):
    """About so many characters, of every source its share: every n-th document or piece."""
    for share, source in zip(mixture(cfg.data).values(), sources(cfg)[0]):
        budget = max(1, int(most * share))
        stride = max(1, sum(len(text) for text, _ in stream_pieces(*source)) // budget)
        for text, _ in itertools.islice(stream_pieces(*source), 0, None, stride):
            yield text[:budget]


def xz_bits_per_byte(train_texts, val_texts):
    """Bits per byte that `xz -9`, which has seen the training texts, needs for the val texts."""
    seen, unseen = (
        "\n".join(texts).encode("utf-8", "surrogatepass") for texts in (train_texts, val_texts)
    )
    before, after = (len(lzma.compress(text, preset=9)) for text in (seen, seen + b"\n" + unseen))
    return 8 * (after - before) / len(unseen)


# --- algorithm -----------------------------------------------------------------------------------


def next_token_loss(model, rows, begin_id):
    """Mean of -log p of each token but the first: rows (B, T + 1) -> scalar, in nats per token."""
    logits = next_token_logits(model, rows[:, :-1], begin_id)  # (B, T, V)
    return -token_logprobs(logits, rows[:, 1:]).mean()


def blank_out(tokens, seed, ordinary, mask_id):
    """BERT's corruption of rows (B, T): (B, 3, T) of what the model is shown, the tokens, and 1
    where it has to predict them.

    15% of each row are chosen; `ordinary`, (V,) bool, is False of special tokens, which are never
    asked for. Of these 80% become <|mask|>, 10% any ordinary token and 10% stay, so that what the
    model makes of a token that it sees is of use, too: later nothing is masked.
    """
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(tokens.shape, generator=generator)
    chance = chance.masked_fill(~ordinary[tokens], 2.0)
    n = max(1, round(0.15 * tokens.shape[1]))
    chosen = (chance <= chance.kthvalue(n, 1, keepdim=True).values) & ordinary[tokens]
    kind = torch.rand(tokens.shape, generator=generator)
    ids = ordinary.nonzero()[:, 0]
    others = ids[torch.randint(len(ids), tokens.shape, generator=generator)]
    shown = tokens.where(~chosen | (kind >= 0.9), others.where(kind >= 0.8, mask_id))
    return torch.stack((shown, tokens, chosen.long()), 1)


def masked_loss(model, rows, begin_id):
    """Mean of -log p over the tokens that blank_out has chosen: rows (B, 3, T) -> scalar."""
    shown, tokens, chosen = rows.unbind(1)
    chosen, seen = chosen.bool(), None
    if begin_id is not None:
        seen = document_mask((tokens == begin_id).cumsum(1), causal=False)
    return -token_logprobs(model(shown, mask=seen, where=chosen), tokens[chosen]).mean()


@torch.no_grad()
def fill_blanks(model, tokens, mask_id, seen=None):
    """Rows (B, T) with each <|mask|> filled in, the most certain first; seen: attention's mask."""
    tokens = tokens.clone()
    while (blank := tokens == mask_id).any():
        logits = model(tokens, mask=seen).float()  # (B, T, V)
        logits[..., mask_id] = -torch.inf
        certain, best = logits.softmax(-1).max(-1)  # (B, T)
        at = certain.masked_fill(~blank, -1.0).argmax(1)
        rows = blank.any(1).nonzero()[:, 0]
        tokens[rows, at[rows]] = best[rows, at[rows]]
    return tokens


@torch.no_grad()
def facts_known(model, tokenizer, examples):
    """Share of the village's facts of which the model knows the value: each of its tokens is the
    likeliest one behind those before it, or is filled in where the value is blanked out.
    """
    prompts = [[*tokenizer.begin, *tokenizer.encode(e["prompt"])] for e in examples]
    values, stop = [tokenizer.encode(e["answer"]) for e in examples], tokenizer.encode(".")
    rows = pad_completions(prompts, [value + stop for value in values], tokenizer.pad_id)
    known, mask_id = 0, tokenizer.special.get(MASK)
    for numbers in torch.arange(len(rows)).split(64):
        part = rows[numbers].to(model.device)
        value = part.mask & part.mask.roll(-len(stop), 1)  # without the full stop
        if model.cfg.is_causal:
            said = model(part.tokens).argmax(-1).roll(1, 1)
        else:
            seen = document_mask(part.real.long(), causal=False)
            said = fill_blanks(model, part.tokens.masked_fill(value, mask_id), mask_id, seen)
        known += ((said == part.tokens) | ~value).all(1).sum().item()
    return known / len(rows)


# --- training ------------------------------------------------------------------------------------


def build_model(cfg):
    """(GPT, Tokenizer): fresh with a tokenizer of its own, or from --init."""
    if cfg.init:
        return load_gpt(cfg.init, cfg.objective == "causal")
    tokenizer = get_tokenizer(cfg)
    shape = GPTConfig(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,  # matrix products like multiples of 64
        max_position_embeddings=cfg.context,
        tie_word_embeddings=cfg.tied,
        qk_norm=cfg.qk_norm,
        is_causal=cfg.objective == "causal",
        **shape_of(cfg),
    )
    torch.manual_seed(cfg.seed)
    return GPT(shape), tokenizer


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, cfg.init, cfg.against)
    other = read_json(Path(cfg.against) / "result.json")["effects"] if cfg.against else []
    model, tokenizer = build_model(cfg)
    T, shares, causal = row_length(cfg.context, model), mixture(cfg.data), model.cfg.is_causal
    train, val = ([open_corpus(tokenizer, *each) for each in part] for part in sources(cfg))
    windows, val_windows = ([Windows(each, T) for each in part] for part in (train, val))
    separate = cfg.document_mask and sum(corpus.documents for corpus in train) > 1
    begin_id = tokenizer.begin[0] if separate else None
    ordinary = token_lengths(tokenizer, model.cfg.vocab_size) > 0
    blanks = partial(blank_out, ordinary=ordinary, mask_id=tokenizer.special.get(MASK))
    measured_on = tokenizer, val_windows, shares, blanks, begin_id
    share, tokens_per_step = rt.share(cfg.batch_size), cfg.batch_size * T
    run = Run(cfg, rt)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler)
    schedule, sampler = SCHEDULES[cfg.schedule], MixedSampler(windows, shares.values(), cfg.seed)
    run.restore(model, optimizer, sampler)
    num_tokens = sum(len(corpus.tokens) for corpus in train)
    rt.print(f"{count_parameters(model)[0]:,} parameters on {rt.device} in {rt.dtype_name}")
    rt.print(f"{num_tokens:,} training tokens, {tokens_per_step:,} per step")

    while run.step < cfg.steps:
        rows = torch.cat(sampler.take(cfg.batch_size))  # (B, T + 1)
        if not causal:
            rows = blanks(rows[:, :T], (cfg.seed << 20) + run.step)  # (B, 3, T)
        loss = 0.0
        for part in rt.micro_batches(rows[share].to(rt.device), cfg.accumulate, ddp_model):
            part_loss = (next_token_loss if causal else masked_loss)(ddp_model, part, begin_id)
            loss += rt.backward(part_loss * len(part) / cfg.batch_size)
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        run.advance(tokens_per_step, loss=rt.sum(loss), grad_norm=grad_norm, lr=optimizer.lr)

        if run.due(cfg.eval_every):
            run.evaluated(**held_out(model, *measured_on, cfg.eval_tokens))
            if cfg.sample_tokens and rt.main:
                row = val_windows[0][[0]][:, : cfg.sample_tokens]
                run.write_sample(sample_text(model, tokenizer, row, blanks, cfg.seed + run.step))
            run.export(save_gpt, model, tokenizer)
            run.checkpoint()
    run.close("loss", "val_loss", y_label="nats per token")
    finish(cfg, run, model, tokenizer, held_out(model, *measured_on), other)


@torch.no_grad()
def held_out(model, tokenizer, sources, shares, blanks, begin_id, most=math.inf):
    """Means over the held-out tokens of each source, or `most` of them: the same at each call."""
    metrics = []
    for windows in sources:
        if model.cfg.is_causal:
            nats, bits = bits_per_byte(model, tokenizer, windows, most, begin_id is not None)
            metrics.append({"val_loss": nats, "bits_per_byte": bits})
            continue
        n, loss = math.ceil(min(len(windows), most / windows.T)), 0.0
        for numbers in torch.arange(n).split(32):
            rows = blanks(windows[numbers][:, :-1], int(numbers[0])).to(model.device)
            loss += masked_loss(model, rows, begin_id).item() * len(rows) / n
        metrics.append({"val_loss": loss})
    return by_share(shares, metrics)


def sample_text(model, tokenizer, row, blanks, seed):
    """A document from scratch, as long as the row (1, T); with mlm that row, [blanks] filled in."""
    if not model.cfg.is_causal:
        shown = blanks(row, seed)[:, 0].to(model.device)
        filled = fill_blanks(model, shown, tokenizer.special[MASK])
        pairs = zip(map(tokenizer.decode, filled.T.tolist()), shown[0] == filled[0])
        return "".join(text if given else f"[{text}]" for text, given in pairs)
    how = {"generator": torch.Generator(model.device).manual_seed(seed), "temperature": 0.8}
    how["stop_ids"] = {tokenizer.eot_id, tokenizer.begin[0]}
    out = generate(model, [tokenizer.begin], row.shape[1], **how)
    return tokenizer.decode(out.lists()[0])


def finish(cfg, run, model, tokenizer, measured, other):
    """Keep what the run has reached; `other`: the effects of the run to compare with."""
    effects = []
    if "bits_per_byte" in measured:
        name, before = "held-out text", None
        if cfg.compare_xz and run.rt.main:
            texts = ([d for each in part for d in read_documents(*each)] for part in sources(cfg))
            name, before = "held-out text, before: xz -9", xz_bits_per_byte(*texts)
            measured["xz_bits_per_byte"] = before
        effects.append(effect(name, before, measured["bits_per_byte"], "bits per byte", False))
    cloze = Path(sources(cfg)[0][0][0]).with_name("cloze.jsonl")  # a village lies in its folder
    examples = read_records(cloze) if cloze.exists() else []
    for task in dict.fromkeys(e["task"] for e in examples):
        known = facts_known(model, tokenizer, [e for e in examples if e["task"] == task])
        name = task.replace("cloze", "facts about villagers")
        effects.append(effect(name, None, known, "share"))
    reached = {each["name"]: each["after"] for each in other}
    for each in effects:
        if each["name"] in reached:
            each["before"] = reached[each["name"]]
            each["name"] += f", before: {Path(cfg.against).name}"
    run.write_result(effects, **measured)
    run.rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
