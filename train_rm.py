"""Reward model: learn to score completions from rankings of them.

    Bradley-Terry   loss = -log sigmoid(r_w - r_l)                         arXiv:1706.03741
    margin          loss = -log sigmoid(r_w - r_l - m)                     2307.09288, eq. 2
    ranking         loss = -1 / C(K, 2) sum_{i<j} log sigmoid(r_i - r_j)   2203.02155, eq. 1
    centering       + eta mean((r_w + r_l)^2)                              2312.09244

r is read from a linear head at the last real token of prompt and completion. All K completions of a
prompt are in one batch: as separate pairs each completion would be seen K - 1 times per epoch, and
the model overfits (InstructGPT, section 3.5). The scores of every exported reward model are shifted
to mean 0 on the reference model's own samples.
Differs from InstructGPT: the head starts at N(0, 1/(C + 1)) (Stiennon et al. 2020, 2009.01325).

Run     python train_rm.py
        python train_rm.py --annotators 3 --out runs/rm_three    # prints how far they agree
        python train_rm.py --judge runs/judge --out runs/rm_ai   # a model ranks (RLAIF); needs
                                                        # python train_sft.py --preset judge
        python train_rm.py --data pairs.jsonl --loss margin --out runs/mine
Needs   runs/sft                                          (python train_sft.py)
Expect  92% of held-out pairs in the order of their gold score (89% with bf16; seed 0), from 49% (a
        randomly initialised head), even though 15% of the labels are flipped. Three annotators:
        93.1% instead of 92.0% (fp32, seed 0). Two of them put 75% of the pairs in the same order
        (Cohen's kappa 0.50), one 85% as the gold does, the mean of three 91%. train_ppo.py makes of
        the one's reward model gold 0.90, better than before in 80%, of the three's 0.94, 86%
Watch   loss, log_loss      per pair, from about log 2 = 0.69 to 0.5, on held-out pairs likewise;
                            log_loss rising while loss falls: the rankings are memorised
        accuracy            share of held-out pairs ordered as the annotators did: 1 - disagreement
                            is the best that can be reached
        gold_accuracy       accuracy against the gold score (village only); exceeds accuracy once
                            the model sees through the label noise
        grad_norm           about 2 at first, then below 0.5
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from data.village import examples as village
from data.village.preferences import rank_completions
from nanollm.batches import Completions, Sampler
from nanollm.config import LARGE, AdapterConfig, NotNegative, TrainConfig, cli
from nanollm.formats import need, place_of
from nanollm.generate import sample_together
from nanollm.hub import load_model, load_scalar, save_model
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.peft.adapters import start_adapter
from nanollm.preferences import (
    PreferenceConfig,
    dialogue_rows,
    finish,
    in_batches,
    load_preferences,
    pair_index,
    scores,
)
from nanollm.rollouts import chat_prompt
from nanollm.run import Run, check_folders, effect
from nanollm.runtime import start


@dataclass
class Config(PreferenceConfig, AdapterConfig, TrainConfig):
    # -- Loss
    # ranking: all pairs of a prompt in one batch element; bradley_terry: shuffled pairs; margin:
    # the same, less the margin that the data states
    loss: Literal["ranking", "bradley_terry", "margin"] = "ranking"
    centering: NotNegative = 0.01  # eta
    # -- Training
    out: str = "runs/rm"
    steps: int = 280
    batch_size: int = 32  # prompts (or pairs) per step, over all processes
    lr: float = 2e-3
    muon_lr: float = 0.02
    warmup: int = 10
    eval_every: int = 140


PRESETS = {
    "smoke": dict(steps=10, prompts=60, batch_size=8, eval_every=5, warmup=2),
    "gpu": dict(batch_size=64, steps=300, lr=1e-4, muon_lr=2e-3, compile=True),
    # rate and schedule of Llama 2's (Touvron et al. 2023, arXiv:2307.09288, section 3.2.2), whose
    # batch was of 512 pairs; batch of InstructGPT's (Ouyang et al. 2022, 2203.02155)
    "downloaded": dict(LARGE, batch_size=64, accumulate=64, lr=1e-5),
}

SCALE = 6  # from the lowest to the highest rating of an annotator


# --- data ----------------------------------------------------------------------------------------


@dataclass
class Rankings:
    """N rankings of up to K completions, the best first, or pairs of them (K = 2)."""

    rows: Completions  # every completion
    index: torch.Tensor  # (N, K): rows of each ranking's completions, padded with -1
    margins: torch.Tensor  # (N,) how much better a pair's first is; 0 where nobody says

    def __len__(self):
        return len(self.index)

    def __getitem__(self, numbers):
        return replace(self, index=self.index[numbers], margins=self.margins[numbers])

    @property
    def completions(self):
        """The rows of these rankings, one after another."""
        return self.rows[self.index[self.index >= 0]]


def open_rankings(records, rows, index, loss):
    """What is trained on, as --loss wants it: whole rankings, or every pair on its own."""
    index = index if loss == "ranking" else pair_index(index)
    margins = margins_of(records) if loss == "margin" else torch.zeros(len(index))
    return Rankings(rows, index, margins)


def margins_of(records):
    """Of every pair, as pair_index has them: the record's margin, or the ratings' difference."""
    margins = []
    for record in records:
        ratings, margin = record.get("ratings"), record.get("margin")
        stated = ratings is not None or margin is not None
        need(stated, place_of(record), '--loss margin needs a "margin"; or use bradley_terry')
        for i, j in itertools.combinations(range(len(record["completions"])), 2):
            rated = max(0.0, ratings[i] - ratings[j]) / SCALE if margin is None else margin
            margins.append(rated)
    return torch.tensor(margins)


# --- algorithm -----------------------------------------------------------------------------------


def bradley_terry_loss(chosen, rejected, margin=0.0):
    """-log sigmoid(chosen - rejected - margin) of each pair, (B,). Margin: Llama 2, eq. 2."""
    return -F.logsigmoid(chosen - rejected - margin)


def ranking_loss(rewards, real, margins):
    """InstructGPT's eq. 1 per prompt: rewards (N, K), best first, real (N, K) bool, margins (N,) ->
    (N,). Of a pair (K = 2) it is the loss above.
    """
    chosen, rejected, pairs = every_pair(rewards, real)
    losses = bradley_terry_loss(chosen, rejected, margins[:, None])
    return (losses * pairs).sum(1) / pairs.sum(1)


def centering_loss(rewards, real):
    """(r_w + r_l)^2, summed over the pairs of each prompt, (N,): keeps the scores around zero,
    which the losses above leave open.
    """
    chosen, rejected, pairs = every_pair(rewards, real)
    return ((chosen + rejected) ** 2 * pairs).sum(1)


def every_pair(rewards, real):
    """(the better's rewards, the worse's, which pairs there are), (N, C(K, 2)) each."""
    i, j = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1, device=rewards.device)
    return rewards[:, i], rewards[:, j], real[:, i] & real[:, j]


def rewards_of(model, rankings, device):
    """(rewards (N, K), which of them are real) of every completion."""
    real = (rankings.index >= 0).to(device)
    flat = scores(model, rankings.completions.to(device))
    return torch.zeros(real.shape, device=device).masked_scatter(real, flat), real


def pair_metrics(rewards, pairs, golds=None):
    """How well rewards (B,) order pairs (P, 2), of which the annotators prefer the first.

    accuracy and log_loss by the annotators; with golds (B,) gold_accuracy, over pairs of unequal
    gold, and the annotators' own.
    """
    delta = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    metrics = {
        "accuracy": (delta > 0).float().mean().item(),
        "log_loss": bradley_terry_loss(delta, 0.0).mean().item(),
    }
    if golds is not None:
        gold = golds[pairs[:, 0]] - golds[pairs[:, 1]]
        hits = ((delta > 0) == (gold > 0))[gold != 0]
        metrics["gold_accuracy"] = hits.float().mean().item()
        metrics["annotators_accuracy"] = (gold > 0)[gold != 0].float().mean().item()
    return metrics


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, cfg.init, cfg.judge)
    model, tokenizer = load_scalar(cfg.init)
    start_adapter(model, cfg, rt)
    ref, _ = load_model(cfg.init)
    rt.prepare(ref, train=False)
    preferences = load_preferences(cfg, ref, tokenizer, rt, village.of_run, rank_completions)
    (records, rows, index), (val_records, val_rows, val_index) = preferences
    train, golds = open_rankings(records, rows, index, cfg.loss), golds_of(val_records)
    rt.print(f"{len(train)} rankings of {len(rows)} completions; held out: {len(val_rows)}")
    own = own_samples(ref, tokenizer, records[:256], cfg.seed, rt)
    del ref  # frees its memory

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler)
    schedule, sampler = SCHEDULES[cfg.schedule], Sampler(len(train), cfg.seed)

    def measure():
        return pair_metrics(in_batches(scores, model, val_rows), pair_index(val_index), golds)

    saved = run.restore(model, optimizer, sampler) or {"before": measure()}

    while run.step < cfg.steps:
        batch = train[sampler.take(cfg.batch_size)[share]]
        num_pairs = rt.sum(len(pair_index(batch.index)))
        num_tokens = rt.sum(batch.completions.real.sum())
        loss = 0.0
        for part in rt.micro_batches(batch, cfg.accumulate, ddp_model):
            rewards, real = rewards_of(ddp_model, part, rt.device)
            losses = ranking_loss(rewards, real, part.margins.to(rt.device))
            centering = centering_loss(rewards, real).sum() / num_pairs
            loss += rt.backward(losses.sum() / cfg.batch_size + cfg.centering * centering)
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        run.advance(num_tokens, loss=rt.sum(loss), grad_norm=grad_norm, lr=optimizer.lr)

        if run.due(cfg.eval_every):
            saved["after"] = measure()
            run.evaluated(**saved["after"])
            model.shift = in_batches(scores, model, own).mean().item()  # to mean 0 on these
            run.export(save_model, model, tokenizer)
            model.shift = 0.0
            run.checkpoint(**saved)
    run.close("loss", "log_loss", y_label="loss per pair")
    key, name = "accuracy", "held-out pairs in the order of the annotators"
    if golds is not None:
        key, name = "gold_accuracy", "held-out pairs in the order of their gold score"
    before, after = saved["before"], saved["after"]
    finish(rt, run, before, after, effect(name, before[key], after[key], "share"))


def own_samples(ref, tokenizer, records, seed, rt):
    """Rows of the reference's own completions, on which a finished reward model's mean is 0."""
    prompts = [chat_prompt(record, tokenizer) for record in records]
    completions = sample_together(rt, ref, tokenizer, prompts, 64, seed=seed)
    return dialogue_rows(prompts, completions, tokenizer, ref.cfg.max_position_embeddings)


def golds_of(records):
    """The gold score of every completion, (B,), where all have one, as the village's do."""
    if all("gold" in record for record in records):
        return torch.tensor([gold for record in records for gold in record["gold"]])


if __name__ == "__main__":
    cli(main, Config, PRESETS)
