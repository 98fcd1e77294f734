"""Reward model: learn to score completions from rankings of them.

    Bradley-Terry   loss = -log sigmoid(r_w - r_l)                         arXiv:1706.03741
    margin          loss = -log sigmoid(r_w - r_l - m)                     2307.09288, eq. 2
    ranking         loss = -1 / C(K, 2) sum_{i<j} log sigmoid(r_i - r_j)   2203.02155, eq. 1
    centering       + eta mean((r_w + r_l)^2)                              2312.09244

r is read from a linear head at the last real token of prompt and completion. All K completions of a prompt
are in one batch: as separate pairs each completion would be seen K - 1 times per epoch, and the model
overfits (InstructGPT, section 3.5). After training the scores are shifted to mean 0 on the
reference model's own samples.
Differs from InstructGPT: the head starts at N(0, 1/(C + 1)) (Stiennon et al. 2020, 2009.01325).

Run     python train_rm.py
        python train_rm.py --data pairs.jsonl --loss margin --out runs/mine
Needs   runs/sft                                          (python train_sft.py)
Expect  see README.md: held-out pairs ordered as the gold orders them, though labels are noisy
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from nanollm.batches import Sampler, pad_completions
from nanollm.config import UserError, atomic_write, cli
from nanollm.generate import sample_completions
from nanollm.hub import load_model, load_scalar
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.peft.adapters import start_adapter
from nanollm.plot import line_chart
from nanollm.preferences import completion_rows, in_batches, load_preferences, prompt_ids, scores
from nanollm.run import Run, check_folders
from nanollm.runtime import start


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Data
    init: str = "runs/sft"  # run folder or model folder to start from; its completions are ranked
    # village, or JSONL of pairs or rankings (see data/README.md)
    data: str = "village"
    val_data: str | None = None  # held-out preferences; default: the last --val_fraction of --data
    val_fraction: float = 0.05  # share of --data that is held out
    prompts: int = 3000  # prompts of the village that are ranked
    # share of the village's pairs that annotators rank against the gold
    disagreement: float = 0.15
    # -- Loss
    # ranking: all pairs of a prompt in one batch element; bradley_terry: shuffled pairs; margin:
    # the same, less the margin that the data states
    loss: Literal["ranking", "bradley_terry", "margin"] = "ranking"
    centering: float = 0.01  # eta
    # -- Adapter
    # freeze the model and train an adapter only: lora, dora, qlora, adapter, prefix, ptuning or
    # prompt (nanollm/peft/adapters.py); default: all weights are trained
    adapter: str | None = None
    rank: int = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: float = 32.0  # lora, dora, qlora: what they learn counts alpha / r
    # -- Training
    out: str = "runs/rm"  # run folder to write
    steps: int = 280  # optimizer steps
    batch_size: int = 32  # prompts (or pairs) per step, over all processes
    accumulate: int = 1  # parts that a process splits its prompts into, to save memory
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    muon_lr: float = 0.02  # learning rate of Muon
    lr: float = 2e-3  # learning rate of AdamW
    weight_decay: float = 0.0  # on matrices and embeddings
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 10  # steps of linear warm-up
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 140  # steps between evaluations, each followed by a checkpoint
    # -- Machine
    seed: int = 0  # of the sampled completions, the annotators and the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    # precision of the layers; weights stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False  # torch.compile: about half a minute to start, then faster
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


PRESETS = {
    "smoke": {"steps": 10, "prompts": 60, "batch_size": 8, "eval_every": 5, "warmup": 2},
    "tiny": {},
    "gpu": {
        "prompts": 3000,
        "batch_size": 64,
        "steps": 300,
        "muon_lr": 2e-3,
        "lr": 1e-4,
        "compile": True,
    },
}


# --- data ----------------------------------------------------------------------------------------


def as_pairs(records, margins):
    """Every pair of every ranking as a record of two completions; with `margins` also "margin".

    The margin is the record's own, or the distance of the annotator's ratings on their scale,
    divided by its length.
    """
    pairs = []
    for number, record in enumerate(records, 1):
        completions, ratings = record["completions"], record.get("ratings")
        for i in range(len(completions)):
            for j in range(i + 1, len(completions)):
                pair = {
                    "messages": record["messages"],
                    "completions": [completions[i], completions[j]],
                }
                if margins:
                    margin = record.get("margin")
                    if margin is None and ratings is not None:
                        margin = max(0.0, (ratings[i] - ratings[j]) / 6)
                    if margin is None:
                        raise UserError(
                            f"--loss margin needs a margin in every record, and record {number} "
                            f'has none; add "margin", or use --loss bradley_terry'
                        )
                    pair["margin"] = float(margin)
                pairs.append(pair)
    return pairs


# --- algorithm -----------------------------------------------------------------------------------


def bradley_terry_loss(chosen, rejected, margin=0.0):
    """-log sigmoid(chosen - rejected - margin), the mean; all (B,). Margin: Llama 2, eq. 2."""
    return -F.logsigmoid(chosen - rejected - margin).mean()


def ranking_loss(rewards, real):
    """InstructGPT's eq. 1 per prompt: rewards (N, K), best first, real (N, K) bool -> (N,)."""
    K = rewards.shape[1]
    i, j = torch.triu_indices(K, K, 1, device=rewards.device)  # every pair i < j
    pairs = real[:, i] & real[:, j]
    losses = -F.logsigmoid(rewards[:, i] - rewards[:, j])
    return (losses * pairs).sum(1) / pairs.sum(1)


def centering_loss(chosen, rejected):
    """mean((r_w + r_l)^2): keeps the scores around zero, which the losses above leave open."""
    return ((chosen + rejected) ** 2).mean()


def calibration_error(p, happened, bins=10):
    """Expected calibration error: in bins of the confidence, how far it is from the share of hits.

    p (n,): predicted probability; happened (n,) bool. Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    confidence = torch.maximum(p, 1 - p)
    hit = (happened == (p > 0.5)).float()
    number = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add(0, number, confidence - hit)
    return (gap.abs().sum() / len(p)).item()


def padded(flat, counts):
    """Values of the prompts' completions, one after another (B,), as (N, K) and which of them exist."""
    real = torch.arange(int(counts.max()), device=flat.device) < counts.to(flat.device)[:, None]
    return torch.zeros(real.shape, device=flat.device).masked_scatter(real, flat), real


def batch_loss(flat, counts, margins, cfg):
    """Sum over prompts of the loss; flat (B,) are the rewards of all their completions in order."""
    rewards, real = padded(flat, counts)
    if margins is not None:
        loss = bradley_terry_loss(rewards[:, 0], rewards[:, 1], margins) * len(rewards)
    else:  # for two completions this is the Bradley-Terry loss
        loss = ranking_loss(rewards, real).sum()
    if cfg.centering:
        i, j = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1, device=flat.device)
        pairs = real[:, i] & real[:, j]
        centre = centering_loss(rewards[:, i][pairs], rewards[:, j][pairs])
        loss = loss + cfg.centering * centre * len(rewards)
    return loss


def pair_figures(rewards, counts, golds=None):
    """How well rewards (B,) order the pairs of rankings that are sorted as annotators did.

    accuracy and log_loss and calibration_error against the annotators; with golds (lists, in the
    same order) gold_accuracy, over pairs of unequal gold, and the annotators' own.
    """
    deltas, gold_hits, annotator_hits, start = [], [], [], 0
    for n, count in enumerate(counts.tolist()):
        r = rewards[start : start + count]
        start += count
        for i in range(count):
            for j in range(i + 1, count):
                deltas.append(r[i] - r[j])
                if golds is not None and golds[n][i] != golds[n][j]:
                    annotator_hits.append(golds[n][i] > golds[n][j])
                    gold_hits.append((r[i] > r[j]) == annotator_hits[-1])
    deltas = torch.stack(deltas)
    # each pair in both orders would say the same twice: look at it from a side drawn by its number
    side = torch.arange(len(deltas)) % 2 == 0
    figures = {
        "accuracy": (deltas > 0).float().mean().item(),
        "log_loss": -F.logsigmoid(deltas).mean().item(),
        "calibration_error": calibration_error(
            torch.sigmoid(torch.where(side, deltas, -deltas)), side
        ),
    }
    if gold_hits:
        figures["gold_accuracy"] = sum(map(bool, gold_hits)) / len(gold_hits)
        figures["annotators_accuracy"] = sum(annotator_hits) / len(annotator_hits)
    return figures


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.init, cfg.out)
    policy, _ = load_model(cfg.init)
    model, tokenizer = load_scalar(cfg.init)
    start_adapter(model, cfg, rt)
    rt.prepare(policy, train=False)
    train, val = load_preferences(cfg, policy, tokenizer, rt)
    own_prompts = prompt_ids(train[:256], tokenizer)
    if cfg.loss != "ranking":
        train = as_pairs(train, cfg.loss == "margin")
    margins = torch.tensor([r["margin"] for r in train]) if cfg.loss == "margin" else None
    rows, counts = completion_rows(train, tokenizer, model.cfg.max_position_embeddings)
    val_rows, val_counts = completion_rows(val, tokenizer, model.cfg.max_position_embeddings)
    ends = counts.cumsum(0)
    golds = [r["gold"] for r in val] if all("gold" in r for r in val) else None
    rt.print(
        f"{len(train)} rankings of {len(rows)} completions; held out: {len(val)}, {len(val_rows)}"
    )

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizers = build_optimizers(model, cfg.optimizer, cfg.muon_lr, cfg.lr, cfg.weight_decay)
    sampler = Sampler(len(train), cfg.seed)
    scaler, trained = rt.scaler(), [model, optimizers, [sampler]]
    run.restore(*trained, scaler)
    since = 0

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        numbers = sampler.take(cfg.batch_size)[share]
        loss = 0.0
        parts = numbers.chunk(cfg.accumulate)
        for n, part in enumerate(parts):
            completions = torch.cat([torch.arange(ends[p] - counts[p], ends[p]) for p in part])
            batch = rows[completions].to(rt.device)
            m = None if margins is None else margins[part].to(rt.device)
            with rt.accumulating(ddp_model, more=n + 1 < len(parts)):
                part_loss = (
                    batch_loss(scores(ddp_model, batch), counts[part], m, cfg) / cfg.batch_size
                )
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
            since += batch.real.sum().item() * rt.world
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        loss = rt.sum(loss.item())
        run.check_finite(loss)
        optimizers.step(scaler)
        run.advance()

        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            run.log(since, show=("loss",), loss=loss, grad_norm=norm.item())
            since = 0
        if run.step % cfg.eval_every == 0 or last:
            model.eval()
            rewards = in_batches(lambda part: scores(model, part), val_rows, rt.device)
            figures = pair_figures(rewards, val_counts, golds)
            run.check_finite(figures["log_loss"], "held-out loss")
            run.log(**figures, show=("accuracy", "gold_accuracy", "log_loss"))
            model.shift = mean_reward(model, policy, tokenizer, own_prompts, cfg.seed)
            run.export(model, tokenizer)
            model.shift = 0.0
            model.train()
            run.checkpoint(*trained, scaler)
    finish(cfg, rt, run, model.eval(), val_rows, val_counts, golds)


def mean_reward(model, policy, tokenizer, prompts, seed):
    """Mean score of the reference's own samples."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    completions = sample_completions(policy, tokenizer, prompts, 64, generator=generator)
    rows = pad_completions(prompts, completions, tokenizer.pad_id)
    return in_batches(lambda part: scores(model, part), rows, policy.device).mean().item()


def gold_line(rewards, golds):
    """(a, b, correlation) of gold ~ a + b * score, by least squares."""
    x, y = rewards.double(), torch.tensor(golds, dtype=torch.float64)
    b = ((x - x.mean()) * (y - y.mean())).mean() / x.var(unbiased=False)
    correlation = b * x.std(unbiased=False) / y.std(unbiased=False)
    return (y.mean() - b * x.mean()).item(), b.item(), correlation.item()


def finish(cfg, rt, run, model, val_rows, val_counts, golds):
    """Print how well held-out completions are ordered, and draw score against gold."""
    run.close()
    run.draw_curves("loss", "log_loss", y_label="loss per pair")
    model = load_scalar(cfg.out)[0] if rt.main else model  # with its shift
    rt.prepare(model, train=False)
    rewards = in_batches(lambda part: scores(model, part), val_rows, rt.device)
    figures = pair_figures(rewards, val_counts, golds)
    rt.print("held-out pairs: " + ", ".join(f"{name} {v:.3f}" for name, v in figures.items()))
    if golds is not None:
        flat = [gold for row in golds for gold in row]
        a, b, correlation = gold_line(rewards, flat)
        figures |= {"gold_line": [a, b], "gold_correlation": correlation}
        rt.print(f"gold = {a:.2f} + {b:.3f} score, correlation {correlation:.3f}")
        if rt.main:
            points = {"completion": list(zip(flat, rewards.tolist()))[:600]}
            chart = line_chart(
                points,
                "Held-out completions: score against gold",
                "gold score",
                "reward",
                join=False,
            )
            atomic_write(run.folder / "score_against_gold.svg", chart)
    run.write_result(**figures, **run.speed())
    rt.print(f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s")
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
