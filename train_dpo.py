"""DPO and its relatives: learn from preferred and rejected completions, without a reward model.

With a = log pi(y_w|x) - log ref(y_w|x), b the same of the rejected completion, h = a - b, n lengths:

    sigmoid   -log sigmoid(beta h)                                        arXiv:2305.18290, eq. 7
    cdpo      -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)         Mitchell 2023
    robust    [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e)  2403.00409, eq. 12
    hinge     relu(1 - beta h)                                            2305.10425, 2309.06657
    ipo       (a/n_w - b/n_l - 1/(2 beta))^2                              2310.12036, eq. 17
    simpo     -log sigmoid(beta (c/n_w - j/n_l) - gamma), c, j = log pi   2405.14734, eq. 6
    orpo      -c/n_w - lambda log sigmoid(log odds_w - log odds_l)        2403.07691, eq. 6
    kto       1 - sigmoid(beta (a - z)) and 1 - sigmoid(beta (z - b))     2402.01306, eq. 8

The reference's log-probabilities are computed once, before training, and stored by index.
A ranking gives its best and worst completion as a pair (--pairs extremes) or all its pairs. Differs from
the papers: ipo averages over tokens, as is usual by now; --nll_coef adds the chosen completion's own
likelihood, without which right answers lose probability together with wrong ones that begin alike.

Run     python train_dpo.py
        python train_dpo.py --loss simpo --beta 2 --data pairs.jsonl --out runs/mine
Needs   runs/sft                                          (python train_sft.py)
Expect  see README.md: win rate over the SFT model by gold, on held-out prompts
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from nanollm.batches import Sampler
from nanollm.config import cli
from nanollm.hub import load_model
from nanollm.logprobs import completion_logprobs
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.peft.adapters import reference, start_adapter
from nanollm.preferences import (
    completion_rows,
    gap_closed,
    in_batches,
    judge,
    load_preferences,
    sample_text,
    win_rate,
)
from nanollm.run import Run, check_folders
from nanollm.runtime import start


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Data
    init: str = "runs/sft"  # run folder or model folder to start from; also the reference
    # village, or JSONL of pairs or rankings (see data/README.md)
    data: str = "village"
    val_data: str | None = None  # held-out preferences; default: the last --val_fraction of --data
    val_fraction: float = 0.05  # share of --data that is held out
    prompts: int = 3000  # prompts of the village that are ranked
    # share of the village's pairs that annotators rank against the gold
    disagreement: float = 0.15
    # of a ranking: every pair, or only the best completion with the worst
    pairs: Literal["all", "extremes"] = "extremes"
    # -- Loss
    loss: Literal["sigmoid", "cdpo", "robust", "hinge", "ipo", "simpo", "orpo", "kto"] = "sigmoid"
    beta: float = 0.1  # how closely to stay at the reference; simpo wants about 2
    label_smoothing: float = 0.15  # e: share of flipped labels that cdpo and robust assume
    gamma: float = 0.5  # simpo: the margin aimed at
    # weight of the chosen completion's own negative log-likelihood per token, beside any of the losses:
    # keeps the chosen completions from becoming less likely, too (Pang et al. 2024, arXiv:2404.19733)
    nll_coef: float = 0.3
    orpo_lambda: float = 0.1  # orpo: weight of the odds ratio
    desirable_weight: float = 1.0  # kto: w_D
    undesirable_weight: float = 1.0  # kto: w_U
    # -- Adapter
    # freeze the model and train an adapter only: lora, dora, qlora, adapter, prefix, ptuning or
    # prompt (nanollm/peft/adapters.py); default: all weights are trained
    adapter: str | None = None
    rank: int = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: float = 32.0  # lora, dora, qlora: what they learn counts alpha / r
    # -- Training
    out: str = "runs/dpo"  # run folder to write
    steps: int = 120  # optimizer steps
    batch_size: int = 64  # pairs per step, over all processes
    accumulate: int = 1  # parts that a process splits its pairs into, to save memory
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: matrices by Muon, the rest by AdamW
    muon_lr: float = 1e-3  # learning rate of Muon
    lr: float = 7e-4  # learning rate of AdamW
    weight_decay: float = 0.0  # on matrices and embeddings
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 10  # steps of linear warm-up
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 60  # steps between evaluations, each followed by a checkpoint
    eval_prompts: int = 200  # held-out prompts that are answered at every evaluation
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
    "smoke": {
        "steps": 10,
        "prompts": 60,
        "batch_size": 8,
        "eval_every": 5,
        "warmup": 2,
        "eval_prompts": 20,
    },
    "tiny": {},
    "gpu": {"prompts": 3000, "batch_size": 128, "steps": 200, "lr": 2e-5, "compile": True},
}


# --- data ----------------------------------------------------------------------------------------


def pair_indices(counts, kind="all"):
    """Rows (P, 2) of pairs i < j of every prompt, the better first; counts (N,) of completions.

    kind "extremes": the best with the worst only.
    """
    pairs, start = [], 0
    for K in counts.tolist():
        every = torch.triu_indices(K, K, 1).T
        pairs.append(start + (every if kind == "all" else torch.tensor([[0, K - 1]])))
        start += K
    return torch.cat(pairs)


# --- algorithm: losses per pair, all arguments (P,) ----------------------------------------------


def sigmoid_loss(h, beta):
    return -F.logsigmoid(beta * h)


def cdpo_loss(h, beta, e):
    return -(1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h)


def robust_loss(h, beta, e):
    """Unbiased when a share e of the labels is flipped; may be negative."""
    return (-(1 - e) * F.logsigmoid(beta * h) + e * F.logsigmoid(-beta * h)) / (1 - 2 * e)


def hinge_loss(h, beta):
    return F.relu(1 - beta * h)


def ipo_loss(a, b, n_w, n_l, beta):
    return (a / n_w - b / n_l - 1 / (2 * beta)) ** 2


def simpo_loss(c, j, n_w, n_l, beta, gamma):
    return -F.logsigmoid(beta * (c / n_w - j / n_l) - gamma)


def orpo_loss(c, j, n_w, n_l, weight):
    """NLL of the chosen completion and the odds ratio; odds p / (1 - p) of the mean token's p."""
    p_w, p_l = (c / n_w).clamp(max=-1e-6), (j / n_l).clamp(max=-1e-6)  # logs of them
    log_odds = (p_w - p_l) - (torch.log(-torch.expm1(p_w)) - torch.log(-torch.expm1(p_l)))
    return -c / n_w - weight * F.logsigmoid(log_odds)


def kto_loss(a, b, z, beta, w_desirable=1.0, w_undesirable=1.0):
    """Chosen completions count as desirable, rejected as undesirable; z from kto_reference_point."""
    desirable = w_desirable * (1 - torch.sigmoid(beta * (a - z)))
    return desirable + w_undesirable * (1 - torch.sigmoid(beta * (z - b)))


def kto_reference_point(policy, ref):
    """z: the batch's KL, estimated on completions to other prompts, at least 0; without gradient."""
    return (policy - ref).mean().clamp(min=0).detach()


def preference_loss(cfg, chosen, rejected, ref_chosen, ref_rejected, n_w, n_l, z=None):
    """The loss of each pair by its name; the first four are summed log-probabilities (P,)."""
    a, b = chosen - ref_chosen, rejected - ref_rejected
    match cfg.loss:
        case "sigmoid":
            return sigmoid_loss(a - b, cfg.beta)
        case "cdpo":
            return cdpo_loss(a - b, cfg.beta, cfg.label_smoothing)
        case "robust":
            return robust_loss(a - b, cfg.beta, cfg.label_smoothing)
        case "hinge":
            return hinge_loss(a - b, cfg.beta)
        case "ipo":
            return ipo_loss(a, b, n_w, n_l, cfg.beta)
        case "simpo":
            return simpo_loss(chosen, rejected, n_w, n_l, cfg.beta, cfg.gamma)
        case "orpo":
            return orpo_loss(chosen, rejected, n_w, n_l, cfg.orpo_lambda)
        case "kto":
            return kto_loss(a, b, z, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)


def summed_logprobs(model, rows):
    """log p of each whole completion, (B,)."""
    return completion_logprobs(model, rows).sum(1)


def pair_metrics(a, b, chosen, rejected, beta):
    """Rewards are beta (log pi - log ref), DPO's implicit ones. The raw log-probabilities are shown
    beside them, since those of the chosen completions may fall, too.
    """
    return {
        "reward_chosen": beta * a.mean().item(),
        "reward_rejected": beta * b.mean().item(),
        "margin": beta * (a - b).mean().item(),
        "accuracy": (a > b).float().mean().item(),
        "logp_chosen": chosen.mean().item(),
        "logp_rejected": rejected.mean().item(),
    }


# --- training ------------------------------------------------------------------------------------


class Pairs:
    """Pairs of rows, with the reference's log-probabilities of every row."""

    def __init__(self, records, tokenizer, ref, kind, mismatched=False):
        most = ref.cfg.max_position_embeddings
        self.rows, counts = completion_rows(records, tokenizer, most)
        self.index = pair_indices(counts, kind)  # (P, 2)
        self.lengths = self.rows.mask.sum(1)
        self.ref = in_batches(lambda part: summed_logprobs(ref, part), self.rows, ref.device)
        self.other = None
        if mismatched:  # for KTO: every prompt with a completion to the prompt before
            before = [r["completions"] for r in (records[-1], *records[:-1])]
            swapped = [
                r | {"completions": [other[k % len(other)] for k in range(len(r["completions"]))]}
                for r, other in zip(records, before)
            ]
            self.other, _ = completion_rows(swapped, tokenizer, most)
            self.ref_other = in_batches(
                lambda part: summed_logprobs(ref, part), self.other, ref.device
            )

    def __len__(self):
        return len(self.index)

    def loss(self, cfg, model, numbers, device):
        """(loss of each pair, metrics) of these pairs; chosen and rejected in one forward pass."""
        index = self.index[numbers].T.reshape(-1)  # all chosen, then all rejected
        chosen, rejected = summed_logprobs(model, self.rows[index].to(device)).chunk(2)
        ref_w, ref_l = self.ref[index].to(device).chunk(2)
        n_w, n_l = self.lengths[index].to(device).chunk(2)
        z = None
        if self.other is not None:
            with torch.no_grad():
                policy = summed_logprobs(model, self.other[index].to(device))
            z = kto_reference_point(policy, self.ref_other[index].to(device))
        losses = preference_loss(cfg, chosen, rejected, ref_w, ref_l, n_w, n_l, z)
        losses = losses - cfg.nll_coef * chosen / n_w
        with torch.no_grad():
            metrics = pair_metrics(chosen - ref_w, rejected - ref_l, chosen, rejected, cfg.beta)
        return losses, metrics


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.init, cfg.out)
    model, tokenizer = load_model(cfg.init)
    start_adapter(model, cfg, rt)
    ref = reference(model)
    rt.prepare(ref, train=False)
    records, val_records = load_preferences(cfg, ref, tokenizer, rt)
    train, val = (
        Pairs(r, tokenizer, ref, cfg.pairs, cfg.loss == "kto") for r in (records, val_records)
    )
    rt.print(f"{len(train)} pairs from {len(records)} prompts; held out: {len(val)}")
    examples = val_records[: cfg.eval_prompts]

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizers = build_optimizers(model, cfg.optimizer, cfg.muon_lr, cfg.lr, cfg.weight_decay)
    sampler = Sampler(len(train), cfg.seed)
    scaler, trained = rt.scaler(), [model, optimizers, [sampler]]
    ref_golds = judge(ref, tokenizer, examples, seed=cfg.seed)[2]
    measure = partial(evaluate, model, tokenizer, ref, examples, ref_golds, val, cfg, rt)
    saved = run.restore(*trained, scaler)
    before = saved.get("before") or measure()
    after = saved.get("after", before)
    since = 0

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        numbers = sampler.take(cfg.batch_size)[share]
        loss, parts = 0.0, numbers.chunk(cfg.accumulate)
        for n, part in enumerate(parts):
            with rt.accumulating(ddp_model, more=n + 1 < len(parts)):
                losses, metrics = train.loss(cfg, ddp_model, part, rt.device)
                part_loss = losses.sum() / cfg.batch_size
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
            since += train.lengths[train.index[part]].sum().item() * rt.world
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        loss = rt.sum(loss.item())
        run.check_finite(loss)
        optimizers.step(scaler)
        run.advance()

        last = run.step == cfg.steps
        if run.step % 10 == 0 or last or run.step == 1:
            run.log(since, show=("loss", "accuracy"), loss=loss, grad_norm=norm.item(), **metrics)
            since = 0
        if run.step % cfg.eval_every == 0 or last:
            after = measure()
            run.check_finite(after["val_loss"], "held-out loss")
            figures = {k: v for k, v in after.items() if k not in ("completions", "golds")}
            run.log(**figures, show=("val_loss", "gold", "win_rate"))
            run.write_sample(sample_text(examples, after["completions"]))
            run.export(model, tokenizer)
            run.checkpoint(*trained, scaler, before=before, after=after)
    finish(cfg, rt, run, before, after)


@torch.no_grad()
def evaluate(model, tokenizer, ref, examples, ref_golds, val, cfg, rt):
    """Held-out loss and metrics, and what sampled completions are worth beside the reference's."""
    model.eval()
    figures, completions, golds = judge(model, tokenizer, examples, ref, seed=cfg.seed)
    if golds is not None:
        figures["win_rate"] = win_rate(golds, ref_golds)
    total, weighted = 0.0, {}
    for part in torch.arange(len(val)).split(128):
        losses, metrics = val.loss(cfg, model, part, rt.device)
        total += losses.sum().item()
        for name, value in metrics.items():
            weighted[name] = weighted.get(name, 0.0) + value * len(part) / len(val)
    model.train()
    held_out = {f"val_{name}": value for name, value in weighted.items()}
    return {
        "val_loss": total / len(val),
        **held_out,
        **figures,
        "completions": completions,
        "golds": golds,
    }


def finish(cfg, rt, run, before, after):
    """Print what the preferences have changed, and keep it in result.json."""
    run.close()
    run.draw_curves("loss", "val_loss", y_label="loss per pair")
    shown = "val_accuracy val_logp_chosen val_logp_rejected length ended correct polite concise"
    for name in filter(before.__contains__, shown.split()):
        rt.print(f"{name:18} {before[name]:9.3f} -> {after[name]:9.3f}")
    rt.print(f"KL to the reference: {after['kl']:.2f} nats per completion")
    closed = {}
    if after["golds"] is not None:
        closed = {"gap_closed": gap_closed(after["gold"], before["gold"])}
        rt.print(
            f"gold {before['gold']:.3f} -> {after['gold']:.3f}: {closed['gap_closed']:.0%} of the "
            f"way to the best possible; wins over the reference {after['win_rate']:.1%}"
        )
    keep = {k: v for k, v in after.items() if k not in ("completions", "golds")}
    start_figures = {k: v for k, v in before.items() if k not in ("completions", "golds")}
    run.write_result(before=start_figures, after=keep, **closed, **run.speed())
    rt.print(f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s")
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
