"""Parameter-efficient fine-tuning: a new domain learnt by few parameters, the model frozen.

    lora        y = W x + s B A x,  s = alpha / r           Hu et al. 2021, arXiv:2106.09685, eq. 3
                --rslora: s = alpha / sqrt(r)               Kalajdzievski 2023, 2312.03732
                --lora_plus 16: B learns 16 times as fast   Hayou et al. 2024, 2402.12354
    dora        y = m * (W + s B A) x / |W + s B A|,        Liu et al. 2024, 2402.09353, eq. 5
                |.| the norm of each output row, m one number for each; the paper has
                columns instead, as it writes W transposed
    qlora       lora on W in four bits (NF4)                Dettmers et al. 2023, 2305.14314, eq. 5
    bottleneck  h + U gelu(D h) behind every branch         Houlsby et al. 2019, 1902.00751
    prefix      softmax(q [K_p; K]) [V_p; V],               Li & Liang 2021, 2101.00190
                K_p, V_p = MLP(P)
    ptuning     the same, K_p and V_p trained themselves    Liu et al. 2021, 2110.07602: P-Tuning v2
    prompt      embeddings [P; E(x)] before the text        Lester et al. 2021, 2104.08691
    lora+prompt two together: virtual tokens before a model with an adapter; so dora, qlora with
                prefix, ptuning. peft has no file for that: they are saved as two of its folders
    none        every parameter is trained, to compare with

The layers behind the equations, and what differs from the papers, are in nanollm/peft/; the loss is
that of train_sft.py. The domain is the village's harbour: sailors speak of what the model knows in
a style of their own, and of ships that are new to it. Two fifths of the dialogues are old ones;
without them every method uses the sailors' style everywhere.

Run     python lora.py                                # LoRA of rank 3 on all matrices of the blocks
        for adapter in none lora dora qlora bottleneck prefix ptuning prompt; do
            python lora.py --adapter $adapter --out runs/few/$adapter; done
        python -m nanollm.compare runs/few/*          # what each costs and gives
        for rank in 1 4 16 64; do python lora.py --steps 120 \\
            --rank $rank --alpha $((2 * rank)) --out runs/ranks/$rank; done
        python -m nanollm.compare runs/ranks/*
        python -m nanollm.chat runs/sft --adapter runs/ranks/1,runs/ranks/16  # /adapter 16, or none
        python -m nanollm.hub export runs/lora --merge --out merged     # a model without an adapter
Needs   runs/sft                                             (python train_sft.py)
Expect  with seed 0 and bf16, from runs/sft. Before, 0% of the answers are right in the
        new domain and 96.0% elsewhere (mean over tasks), and text needs 0.293 bits per byte
                  trained    new domain  elsewhere  bits per byte
        none      1,115,520  91.2%       94.4%      0.300
        lora         30,720  91.7%       95.8%      0.297
        dora         36,352  94.0%       94.6%      0.303
        qlora        30,720  95.8%       94.4%      0.299
        bottleneck    7,192  89.8%       94.2%      0.392    (untuned, as those below)
        prefix      150,656  88.0%       92.0%      0.730
        ptuning      16,384  85.2%       86.6%      0.534
        prompt        2,048  52.8%       71.7%      0.350
        Another seed moves the new domain by up to 2 points
        Ranks, each after 120 steps, in fp32: a style takes little room, facts more
                      trained  new domain  of it, ships  elsewhere  bits per byte
        rank 1         10,240  79.6%       14.6%         89.5%      0.301    (seeds 1, 2: 80%, 81%)
        rank 4         40,960  90.7%       60.4%         94.9%      0.299
        rank 16       163,840  97.7%       89.6%         94.6%      0.299    (seeds 1, 2: 98%, 95%)
        rank 64       655,360  98.1%       91.7%         95.3%      0.302
        lora+prompt    12,288  79.2%       16.7%         81.9%      0.353    (of rank 1)
Memory  to train LoRA on a GPU in bf16, with --preset downloaded (blocks recomputed, one row of T
        tokens at a time), in bytes, computed from the tensors of a step:
            4 N + 16 n + 2 V C + 12 T V
        N parameters; n of the adapter: weight, gradient and two moments; V C of the head, T V
        logits. Rank 16, T = 1024, in GB (1e9 bytes): SmolLM2-360M 2.3, Qwen2.5-0.5B 4.3, Qwen3-0.6B
        4.7, Llama-3.2-1B 7.2, Qwen2.5-1.5B 8.8, Qwen2.5-3B 15.3. With --adapter none 16 N take the
        place of 4 N + 16 n
Watch   loss, val_loss  nats per trained token of the new domain; both fall. A large learning rate
                        also lowers val_loss but forgets more: compare 'elsewhere' in the table
        grad_norm       below 1 after warm-up; rising: lower --lr
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from data.village import examples as village
from nanollm.batches import Sampler, Windows, open_corpus, pack_chats, row_length
from nanollm.config import LARGE, NotNegative, OpenShare, TrainConfig, Whole, cli
from nanollm.formats import need, read_parts
from nanollm.hub import load_model, save_model
from nanollm.logprobs import bits_per_byte
from nanollm.metrics import (
    accuracy_by_task,
    accuracy_table,
    first_of_each_task,
    mean_accuracy,
    sample_by_task,
)
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.peft.adapters import check_method, start_adapter, trainable
from nanollm.peft.method import Settings
from nanollm.records import read_chats, read_examples
from nanollm.rewards import is_right
from nanollm.run import Run, check_folders, effect
from nanollm.runtime import start
from train_sft import packed_logits, sft_loss, validation_loss


@dataclass
class Config(Settings, TrainConfig):
    # -- Adapter
    adapter: str | None = "lora"
    rank: int = 3
    alpha: float = 6.0
    lora_plus: NotNegative = 1.0  # learning rate of B over that of A; LoRA+ takes 16
    # -- Data
    init: str = "runs/sft"  # run folder or model folder to start from
    data: str = "village"  # village: its new domain; or JSONL of dialogues (see data/README.md)
    val_data: str | None = None  # held-out dialogues; default: the last --val_fraction of --data
    val_fraction: OpenShare = 0.05  # share of --data that is held out
    test_data: str | None = None  # test examples of the new domain; the village has its own
    other_data: str = "village"  # test examples that show what is forgotten
    other_text: str = "village"  # text for the same purpose: bits per byte; .txt or .jsonl
    test_examples: Whole[0] = 64  # examples per task of --other_data; 0: all
    # row length T; default: what 99% of the dialogues need, from 256 to 2048 and as far as the
    # model can read
    context: Whole[1] | None = None
    # -- Training
    out: str = "runs/lora"
    steps: int = 240
    batch_size: int = 8
    optimizer: Literal["muon", "adamw"] = "adamw"
    lr: float | None = None  # learning rate of AdamW; default: by method, see RATES
    # on matrices and embeddings; on A and B it pulls the model towards the base. Default: by method
    weight_decay: float | None = None
    warmup: int = 10
    eval_every: int = 60


PRESETS = {
    "smoke": dict(steps=10, context=128, eval_every=5, warmup=2, test_examples=4),
    "gpu": dict(context=1024, batch_size=64, accumulate=2, compile=True),
    # rate and batch of QLoRA (Dettmers et al. 2023, arXiv:2305.14314); --adapter none
    # wants a tenth of the rate
    "downloaded": dict(LARGE, rank=16, alpha=32.0, context=1024, batch_size=16, accumulate=16)
    | dict(lr=2e-4, weight_decay=0.0),
}

# By method. A few parameters tolerate, and need, a larger learning rate than all of them. Decay
# keeps an adapter near its base, and so from forgetting; of all weights it would undo what they
# know. A method that isn't named learns at 1e-2, without decay.
RATES = {
    None: dict(lr=1e-4, weight_decay=0.0),
    **dict.fromkeys(("lora", "dora", "qlora"), dict(lr=5e-3, weight_decay=6.0)),
    "ptuning": dict(lr=5e-2, weight_decay=0.0),
    "prompt": dict(lr=5e-2, weight_decay=0.0),
}


# --- data ----------------------------------------------------------------------------------------


def load_domain(cfg):
    """(training dialogues, held-out dialogues, test examples) of the new domain."""
    if cfg.data == "village":
        folder = village.of_run(cfg.init)
        train, val = (read_chats(folder / f"new_domain_{s}.jsonl") for s in ("train", "val"))
        return train, val, read_examples(cfg.test_data or folder / "new_domain_test.jsonl")
    need(cfg.test_data, f"--data {cfg.data}", "needs --test_data: examples of what was learnt")
    parts = read_parts(read_chats, cfg.data, cfg.val_data, cfg.val_fraction)
    return *parts, read_examples(cfg.test_data)


def load_elsewhere(cfg, tokenizer, T):
    """(test examples, windows of held-out text) of what the model knew before."""

    def file(named, own):
        return village.of_run(cfg.init) / own if named == "village" else named

    examples = read_examples(file(cfg.other_data, "sft_test.jsonl"))
    corpus = open_corpus(tokenizer, file(cfg.other_text, "corpus_val.jsonl"))
    return first_of_each_task(examples, cfg.test_examples), Windows(corpus, T)


# --- measuring -----------------------------------------------------------------------------------


def measure(model, tokenizer, examples, other_examples, windows):
    """(what is known in the new domain and elsewhere, a sample of completions).

    An answer in the new domain is right where its facts and its style are.
    """
    tasks, completions = accuracy_by_task(model, tokenizer, examples)
    other_tasks, _ = accuracy_by_task(model, tokenizer, other_examples)
    metrics = {
        "tasks": tasks,
        "accuracy": sum(map(is_right, examples, completions)) / len(examples),
        "other_tasks": other_tasks,
        "elsewhere": mean_accuracy(other_tasks),
        "bits_per_byte": bits_per_byte(model, tokenizer, windows)[1],
    }
    return metrics, sample_by_task(examples, completions)


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, cfg.init)
    check_method(cfg.adapter)
    method = cfg.adapter and cfg.adapter.partition("+")[0]
    for name, rate in RATES.get(method, dict(lr=1e-2, weight_decay=0.0)).items():
        if getattr(cfg, name) is None:
            cfg = replace(cfg, **{name: rate})
    model, tokenizer = load_model(cfg.init)
    chats, val_chats, examples = load_domain(cfg)
    length = partial(row_length, cfg.context, model)
    train_rows = pack_chats(chats, tokenizer, length, "training", rt)
    T = train_rows.tokens.shape[1]
    val_rows = pack_chats(val_chats, tokenizer, T, "held-out", rt)
    known = examples, *load_elsewhere(cfg, tokenizer, T)

    share = rt.share(cfg.batch_size)
    rt.prepare(model, train=False)  # measured now: virtual tokens change a model at once
    before = None if cfg.resume else measure(model, tokenizer, *known)[0]
    start_adapter(model, cfg, rt)
    run = Run(cfg, rt)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler, lora_plus=cfg.lora_plus)
    schedule, sampler = SCHEDULES[cfg.schedule], Sampler(len(train_rows), cfg.seed)
    before = run.restore(model, optimizer, sampler) or before

    while run.step < cfg.steps:
        rows = train_rows[sampler.take(cfg.batch_size)[share]].to(rt.device)
        num_tokens = rt.sum(rows.mask[:, 1:].sum())  # trained on, in the whole batch
        loss = 0.0
        for part in rt.micro_batches(rows, cfg.accumulate, ddp_model):
            part_loss = sft_loss(packed_logits(ddp_model, part), part.tokens, part.mask)
            loss += rt.backward(part_loss / num_tokens)
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        run.advance(cfg.batch_size * T, loss=rt.sum(loss), grad_norm=grad_norm, lr=optimizer.lr)

        if run.due(cfg.eval_every):
            run.evaluated(val_loss=validation_loss(model, val_rows))
            run.export(save_model, model, tokenizer)
            run.checkpoint(**before)
    run.close("loss", "val_loss", y_label="nats per token")
    after, sample = measure(model, tokenizer, *known)
    run.write_sample(sample)
    finish(rt, run, before, after, trainable(model)[0])


def finish(rt, run, before, after, trained):
    """Print what was gained and what forgotten, and keep it in result.json."""
    columns = {"before": before, "after": after}
    rt.print(accuracy_table({k: c["tasks"] | c["other_tasks"] for k, c in columns.items()}))
    compared = [
        ("right answers in the new domain", "accuracy", "share", True),
        ("right answers elsewhere", "elsewhere", "share", True),
        ("held-out text", "bits_per_byte", "bits per byte", False),
    ]
    effects = [effect(name, before[key], after[key], *unit) for name, key, *unit in compared]
    run.write_result(effects, before=before, after=after, trained_parameters=trained)
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
