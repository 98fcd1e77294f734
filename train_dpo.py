r"""DPO and its relatives: learn from preferred and rejected completions, without a reward model.

With w the chosen and l the rejected completion of a pair, r = log pi(y|x) - log ref(y|x) of each,
h = r_w - r_l, p = log pi(y|x), and n the lengths in tokens:

    sigmoid   -log sigmoid(beta h)                                        arXiv:2305.18290, eq. 7
    cdpo      -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)         Mitchell 2023
    robust    [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e)  2403.00409, eq. 12
    hinge     relu(1 - beta h)                                            2305.10425, 2309.06657
    ipo       (r_w/n_w - r_l/n_l - 1/(2 beta))^2                          2310.12036, eq. 17
    simpo     -log sigmoid(beta (p_w/n_w - p_l/n_l) - gamma)              2405.14734, eq. 6
    orpo      -p_w/n_w - lambda log sigmoid(log odds_w - log odds_l)      2403.07691, eq. 6
    kto       d (1 - sigmoid(beta (r_w - z))) + u (1 - sigmoid(beta (z - r_l)))   2402.01306, eq. 8

where e is --label_smoothing, gamma --gamma, lambda --orpo_lambda, d --desirable_weight, u
--undesirable_weight, log odds = p/n - log(1 - exp(p/n)) and z the KL to the reference, estimated on
the batch. nll_coef * NLL, NLL = -p_w/n_w, adds to each.

The reference is the model before training, and its log-probabilities are computed once; simpo and
orpo use none. Of a ranking, the best and the worst completion form a pair. Differs from the papers:
ipo averages over tokens, as most implementations now do; kto's desirable and undesirable examples
are the two sides of a pair, of records with a label one of each, where the rarer label's are
repeated instead of weighing more.

These losses push down the rejected completions and, with them, what the chosen ones share with
them: right answers, on the village. --nll_coef counters it (Pang et al. 2024, arXiv:2404.19733).

Run     python train_dpo.py --nll_coef 0.3
        python train_dpo.py --loss simpo --beta 2 --data pairs.jsonl --out runs/mine
        python train_sft.py --preset judge && python train_dpo.py --nll_coef 0.3 --prompts 300 \
            --steps 40 --eval_every 40 --judge runs/judge --out runs/dpo_ai           # RLAIF
Needs   runs/sft                                          (python train_sft.py)
Expect  gold score 0.68 -> 0.89 on held-out prompts, better than the SFT model in 80% of them, with
        bf16; in fp32 0.69 -> 0.92, 84% (seed 0, with --nll_coef 0.3, as README.md has it)
        RLAIF: 0.69 -> 0.80, 0.78, 0.80, better in 65%, 60%, 65%; the same without --judge 0.77,
        0.77, 0.84, and 65%, 60%, 70% (fp32, seeds 0, 1, 2 of judge and policy). The judge puts 70%
        of two completions in the gold's order, the annotators 86%
Watch   loss, val_loss   per pair; sigmoid: starts at log 2 = 0.69 (plus nll_coef x NLL)
        reward_chosen, reward_rejected   beta r, DPO's implicit rewards; all falling far below 0:
                         lower the learning rate, raise beta
        margin           beta h, their difference: rises
        accuracy         share of pairs with the larger reward for the chosen completion, to 0.9;
                         1 in training and less in val_accuracy: memorised
        logp_chosen, logp_rejected   log pi of whole completions. The rejected one's falls; where
                         the chosen one's falls as fast, set --nll_coef
        kl               nats per completion to the reference: a few; tens: it has gone too far
        gold, win_rate   on the village: worth of sampled completions; falling while accuracy
                         rises: over-optimised. correct, polite, concise are its parts
        length, ended    tokens of a sampled completion, and the share that ends its turn: near 1
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from data.village import examples as village
from data.village.preferences import gold_of, rank_completions
from nanollm.batches import Completions, Sampler, pad_completions
from nanollm.config import (
    LARGE,
    AdapterConfig,
    ErrorRate,
    NotNegative,
    Positive,
    TrainConfig,
    Whole,
    cli,
)
from nanollm.formats import need
from nanollm.hub import load_model, save_model
from nanollm.logprobs import completion_logprobs
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.peft.adapters import reference, start_adapter
from nanollm.preferences import (
    PreferenceConfig,
    finish,
    in_batches,
    load_preferences,
    measure_completions,
    sample_text,
    win_rate,
)
from nanollm.run import Run, check_folders, effect
from nanollm.runtime import start


@dataclass
class Config(PreferenceConfig, AdapterConfig, TrainConfig):
    # -- Loss
    # of the log-probabilities of both completions; the formulas stand above
    loss: Literal["sigmoid", "cdpo", "robust", "hinge", "ipo", "simpo", "orpo", "kto"] = "sigmoid"
    beta: Positive = 0.1  # how closely to stay at the reference; simpo wants about 2
    label_smoothing: ErrorRate = 0.15  # e: share of flipped labels that cdpo and robust assume
    gamma: NotNegative = 0.5  # simpo: the margin aimed at
    orpo_lambda: NotNegative = 0.1  # orpo: weight of the odds ratio
    desirable_weight: NotNegative = 1.0  # kto: of chosen completions
    undesirable_weight: NotNegative = 1.0  # kto: of rejected ones
    # weight of the chosen completion's negative log-likelihood per token, beside any of the losses
    nll_coef: NotNegative = 0.0
    # -- Training
    out: str = "runs/dpo"
    steps: int = 120
    batch_size: int = 64  # pairs per step, over all processes
    optimizer: str = "adamw"
    lr: float = 7e-4
    muon_lr: float = 1e-3
    warmup: int = 10
    eval_every: int = 60
    eval_prompts: Whole[1] = 200  # held-out prompts that are answered at every evaluation


PRESETS = {
    "smoke": dict(steps=10, prompts=60, batch_size=8, eval_every=5, warmup=2, eval_prompts=20),
    "gpu": dict(batch_size=128, steps=200, lr=2e-5, compile=True),
    # rate, batch and warm-up of Zephyr (Tunstall et al. 2023, arXiv:2310.16944); an
    # adapter wants about ten times the rate, --lr 5e-6
    "downloaded": dict(LARGE, batch_size=32, accumulate=32, steps=500, lr=5e-7, warmup=50),
}


# --- data ----------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """P pairs of completions, and what the reference says of each completion."""

    rows: Completions  # every completion
    index: torch.Tensor  # (P, 2): the rows of the chosen and the rejected one
    ref_logps: torch.Tensor  # of each row; zeros where the loss has no reference
    # kto: each prompt with the completions of another prompt (for z)
    mismatched: Completions | None = None
    mismatched_ref_logps: torch.Tensor | None = None

    def __len__(self):
        return len(self.index)

    def __getitem__(self, numbers):
        return replace(self, index=self.index[numbers])

    @property
    def flat(self):
        """The rows of all chosen, then of all rejected completions, (2P,)."""
        return self.index.T.reshape(-1)


def open_pairs(cfg, ref, records, rows, index):
    """The pairs of these rankings (preferences.completion_rows), with what the reference says."""
    K = index.shape[1]
    alone = any(len(record["completions"]) == 1 for record in records)
    pairs = pairs_by_label(records) if alone else best_and_worst(index)
    if ref is None:
        return Pairs(rows, pairs, torch.zeros(len(rows)))
    pairs = Pairs(rows, pairs, in_batches(summed_logps, ref, rows))
    if cfg.loss == "kto":
        pairs.mismatched = mismatched_rows(rows, K, ref.cfg.max_position_embeddings)
        pairs.mismatched_ref_logps = in_batches(summed_logps, ref, pairs.mismatched)
    return pairs


def best_and_worst(index):
    """Rows (P, 2) of each ranking's best and worst completion; index (N, K), -1 where none is."""
    worst = (index >= 0).sum(1, keepdim=True) - 1
    return torch.cat([index[:, :1], index.gather(1, worst)], 1)


def pairs_by_label(records):
    """Rows (P, 2) of pairs of a wanted and an unwanted completion, whatever their prompts."""
    kinds = [[n for n, r in enumerate(records) if r.get("label") is flag] for flag in (True, False)]
    fine = all(kinds) and all(len(record["completions"]) == 1 for record in records)
    need(fine, "--loss kto", "it wants pairs, or completions with a label, both true and false")
    return torch.tensor([[k[n % len(k)] for k in kinds] for n in range(max(map(len, kinds)))])


def mismatched_rows(rows, K, context):
    """Each row's prompt with the completion of the row K before, which is another prompt's."""
    begins = rows.mask.long().argmax(1).tolist()
    prompts = [tokens[:n].tolist() for tokens, n in zip(rows.tokens, begins)]
    completions = [tokens[mask].tolist() for tokens, mask in zip(rows.tokens, rows.mask)]
    others = zip(prompts, completions[-K:] + completions[:-K])
    return pad_completions(prompts, [ids[: context - len(prompt)] for prompt, ids in others], 0)


# --- algorithm -----------------------------------------------------------------------------------


@dataclass
class Logps:
    """log pi and log ref of the completions of P pairs, summed over their tokens; (P,) each."""

    policy_chosen_logps: torch.Tensor
    policy_rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor  # in tokens
    rejected_lengths: torch.Tensor
    z: float = 0.0  # kto's KL to the reference, of the whole batch

    @property
    def chosen_logratios(self):
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self):
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def h(self):
        """r_w - r_l: how much more the policy prefers the chosen one than the reference does."""
        return self.chosen_logratios - self.rejected_logratios


def summed_logps(model, rows):
    """log p of each whole completion, (B,)."""
    return completion_logprobs(model, rows).sum(1)


# Every loss: of each pair, (P,), from its Logps and the settings. A new one is a function here, its
# name in LOSSES, and in Config.loss.


def sigmoid_loss(logps, cfg):
    return -F.logsigmoid(cfg.beta * logps.h)


def cdpo_loss(logps, cfg):
    e, beta_h = cfg.label_smoothing, cfg.beta * logps.h
    return -(1 - e) * F.logsigmoid(beta_h) - e * F.logsigmoid(-beta_h)


def robust_loss(logps, cfg):
    """Unbiased when a share e of the labels is flipped; may be negative."""
    e, beta_h = cfg.label_smoothing, cfg.beta * logps.h
    return (-(1 - e) * F.logsigmoid(beta_h) + e * F.logsigmoid(-beta_h)) / (1 - 2 * e)


def hinge_loss(logps, cfg):
    return F.relu(1 - cfg.beta * logps.h)


def ipo_loss(logps, cfg):
    chosen = logps.chosen_logratios / logps.chosen_lengths
    rejected = logps.rejected_logratios / logps.rejected_lengths
    return (chosen - rejected - 1 / (2 * cfg.beta)) ** 2


def simpo_loss(logps, cfg):
    chosen = logps.policy_chosen_logps / logps.chosen_lengths
    rejected = logps.policy_rejected_logps / logps.rejected_lengths
    return -F.logsigmoid(cfg.beta * (chosen - rejected) - cfg.gamma)


def orpo_loss(logps, cfg):
    """NLL of the chosen completion and the odds ratio; odds p / (1 - p) of the mean token's p."""
    chosen = (logps.policy_chosen_logps / logps.chosen_lengths).clamp(max=-1e-6)  # log p
    rejected = (logps.policy_rejected_logps / logps.rejected_lengths).clamp(max=-1e-6)
    log_odds = chosen - torch.log(-torch.expm1(chosen))
    log_odds = log_odds - rejected + torch.log(-torch.expm1(rejected))
    return nll(logps) - cfg.orpo_lambda * F.logsigmoid(log_odds)


def kto_loss(logps, cfg):
    """Chosen completions count as desirable, rejected ones as undesirable."""
    desirable = 1 - torch.sigmoid(cfg.beta * (logps.chosen_logratios - logps.z))
    undesirable = 1 - torch.sigmoid(cfg.beta * (logps.z - logps.rejected_logratios))
    return cfg.desirable_weight * desirable + cfg.undesirable_weight * undesirable


LOSSES = {
    "sigmoid": sigmoid_loss,
    "cdpo": cdpo_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "kto": kto_loss,
}
WITHOUT_REFERENCE = ("simpo", "orpo")


def nll(logps):
    """Negative log-likelihood per token of the chosen completions, (P,)."""
    return -logps.policy_chosen_logps / logps.chosen_lengths


def logps_of(model, pairs, device, z=0.0):
    """The Logps of these pairs; chosen and rejected completions in one forward pass."""
    rows = pairs.rows[pairs.flat].to(device)
    policy, ref = summed_logps(model, rows), pairs.ref_logps[pairs.flat].to(device)
    return Logps(*policy.chunk(2), *ref.chunk(2), *rows.mask.sum(1).chunk(2), z)


def kto_z(model, pairs, total=float):
    """KTO's z: the KL to the reference, at least 0, on completions of other prompts."""
    numbers = pairs.flat
    policy = in_batches(summed_logps, model, pairs.mismatched[numbers])
    kl = total((policy - pairs.mismatched_ref_logps[numbers]).sum()) / total(len(numbers))
    return max(0.0, kl)


@torch.no_grad()
def pair_stats(logps, losses, cfg):
    """Sums over these pairs."""
    chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
    if cfg.loss in WITHOUT_REFERENCE:  # the reward is beta log pi per token (SimPO, eq. 3)
        chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
    values = {
        "loss": losses,
        "reward_chosen": cfg.beta * chosen,
        "reward_rejected": cfg.beta * rejected,
        "margin": cfg.beta * chosen - cfg.beta * rejected,
        "accuracy": chosen > rejected,
        "logp_chosen": logps.policy_chosen_logps,
        "logp_rejected": logps.policy_rejected_logps,
    }
    return {name: value.sum().item() for name, value in values.items()}


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, cfg.init, cfg.judge)
    model, tokenizer = load_model(cfg.init)
    start_adapter(model, cfg, rt)
    ref = rt.prepare(reference(model), train=False)
    parts = load_preferences(cfg, ref, tokenizer, rt, village.of_run, rank_completions)
    if cfg.loss in WITHOUT_REFERENCE:
        ref = None
    train, val = (open_pairs(cfg, ref, *part) for part in parts)
    rt.print(f"{len(train)} pairs of {len(parts[0][0])} prompts; held out: {len(val)}")

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler)
    schedule, sampler = SCHEDULES[cfg.schedule], Sampler(len(train), cfg.seed)
    examples = parts[1][0][: cfg.eval_prompts]
    measure = partial(evaluate, cfg, model, tokenizer, ref, val, examples)
    saved = run.restore(model, optimizer, sampler)
    if not saved:
        before, _, golds = measure()
        saved = {"before": before, "golds": golds, "after": before}

    while run.step < cfg.steps:
        batch, sums = train[sampler.take(cfg.batch_size)[share]], Counter()
        num_tokens = rt.sum(batch.rows.mask[batch.flat].sum())
        z = kto_z(model, batch, rt.sum) if cfg.loss == "kto" else 0.0
        for part in rt.micro_batches(batch, cfg.accumulate, ddp_model):
            logps = logps_of(ddp_model, part, rt.device, z)
            losses = LOSSES[cfg.loss](logps, cfg) + cfg.nll_coef * nll(logps)
            rt.backward(losses.sum() / cfg.batch_size)
            sums.update(pair_stats(logps, losses, cfg))
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        means = {name: rt.sum(total) / cfg.batch_size for name, total in sums.items()}
        run.advance(num_tokens, show=("loss", "accuracy"), grad_norm=grad_norm, **means)

        if run.due(cfg.eval_every):
            after, texts, _ = measure(saved["golds"])
            run.evaluated(("val_loss", "gold", "win_rate"), **after)
            run.write_sample(sample_text(examples, texts))
            run.export(save_model, model, tokenizer)
            saved["after"] = after
            run.checkpoint(**saved)
    run.close("loss", "val_loss", y_label="loss per pair")
    name, after = "held-out pairs whose chosen completion gained more", saved["after"]
    gained = effect(name, None, after["val_accuracy"], "share")  # finish shows it without a gold
    finish(rt, run, saved["before"], after, gained)


@torch.no_grad()
def evaluate(cfg, model, tokenizer, ref, val, examples, ref_golds=None):
    """(metrics of held-out pairs and of completions sampled to `examples`, these, their gold)."""
    metrics, texts, golds = measure_completions(
        model, tokenizer, examples, ref, gold=gold_of(examples), seed=cfg.seed
    )
    if golds is not None:
        metrics["win_rate"] = win_rate(golds, ref_golds or golds)
    sums = Counter()
    z = kto_z(model, val) if cfg.loss == "kto" else 0.0
    for numbers in torch.arange(len(val)).split(128):
        logps = logps_of(model, val[numbers], model.device, z)
        losses = LOSSES[cfg.loss](logps, cfg) + cfg.nll_coef * nll(logps)
        sums.update(pair_stats(logps, losses, cfg))
    means = {f"val_{name}": total / len(val) for name, total in sums.items()}
    return means | metrics, texts, golds


if __name__ == "__main__":
    cli(main, Config, PRESETS)
