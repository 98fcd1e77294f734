"""GRPO: sample G answers to each problem and make those better than their group more likely.

    A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)                       DeepSeekMath, 2402.03300
    loss = - 1/G sum_i 1/|o_i| sum_t [min(rho A, clip(rho, 1 - low, 1 + high) A) - beta k3]
    rho = pi(o_t) / pi_old(o_t),   k3 = ref/pi - log(ref/pi) - 1

No critic and no reward model: small functions check the answer (REWARDS below; replace them in
one line). Its relatives differ by --loss: dr_grpo (2503.20783), dapo (2503.14476), rloo
(2402.14740), reinforce_pp (2501.03262), cispo (2506.13585), gspo (2507.18071). std is that of a
sample (G - 1), as in public implementations. pi_old are the logprobs of the first pass over a
batch, so that rho starts at exactly 1. k3's gradient is the forward KL's; rloo and reinforce_pp put
k1 into the reward, which gives the reverse KL's. An answer that doesn't end within
--max_new_tokens gets no reward, or where it would be negative just that.

Run     python train_grpo.py
        python train_grpo.py --preset zero           # R1-Zero: from runs/pretrain, without SFT
        python train_grpo.py --init runs/tools --data tools --tools --out runs/grpo_tools
        python train_grpo.py --preset images       # counting what is in a image, from runs/vlm
Needs   runs/cot                 (python train_sft.py --preset cot)
Expect  held-out problems 49% -> 89% in a minute on 2 cores; R1-Zero 0.5% -> 62% in 20 s (README.md)
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Callable, Literal

import torch
import torch.nn as nn

from nanollm.batches import Completions, Sampler
from nanollm.config import cli
from nanollm.grpo_runs import check_flags, equal_groups, evaluate, figures_of, finish, open_problems
from nanollm.hub import load_model
from nanollm.logprobs import batched_logprobs, completion_logprobs
from nanollm.optim import build_optimizers, trapezoid
from nanollm.peft.adapters import reference, start_adapter
from nanollm.rewards import accuracy, think_format
from nanollm.rollouts import draw_noise
from nanollm.run import Run, check_folders
from nanollm.runtime import start
from nanollm.vision.vlm import VLM


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; zero: R1-Zero, from the base model;
    # images: a vision-language model counts; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Data
    init: str = "runs/cot"  # run folder or model folder to start from; also the reference
    # village: its problems; tools: its questions for tools; images: what to count in its
    # images; or JSONL of problems, GSM8K's too, with an "image" where they are about one
    data: str = "village"
    tasks: str = ""  # only these kinds of problems, separated by commas; default: all
    val_fraction: float = 0.05  # share of --data that is held out
    # chat: a user's question; for base models (R1-Zero) zero: an example, then the problem; think:
    # a description of <think>, as DeepSeek's
    template: Literal["chat", "zero", "think"] = "chat"
    tools: bool = False  # run the calls that the model writes
    knowledge: str | None = None  # with tools: JSONL of {"title", "text"}; default: the village's
    # -- Loss
    loss: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "cispo", "gspo"] = "grpo"
    clip_low: float | None = None  # default: as in the loss's paper
    clip_high: float | None = None  # default: as in the loss's paper
    kl_coef: float = 0.0  # beta, the price of a nat of KL to the reference; 0: no reference
    # -- Sampling
    batch_size: int = 32  # problems per update, over all processes
    samples: int = 8  # G, answers per problem
    max_new_tokens: int = 112  # longest answer
    temperature: float = 1.0  # of sampling and of training
    inner_updates: int = 1  # optimizer steps per batch of answers
    dynamic_sampling: bool = False  # sample on until enough groups have unequal rewards (DAPO)
    overlong_buffer: int = 0  # the last so many tokens cost up to 1 of reward (DAPO); 0: none do
    # -- Adapter
    # freeze the model and train an adapter only: lora, dora, qlora, adapter, prefix, ptuning or
    # prompt (nanollm/peft/adapters.py); default: all weights are trained
    adapter: str | None = None
    rank: int = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: float = 32.0  # lora, dora, qlora: what they learn counts alpha / r
    # -- Training
    out: str = "runs/grpo"  # run folder to write
    steps: int = 30  # batches of answers
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: matrices by Muon, the rest by AdamW
    muon_lr: float = 0.002  # learning rate of Muon
    lr: float = 3e-4  # learning rate of AdamW
    warmup: int = 3  # updates of linear warm-up; the last 60% fall linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    accumulate: int = 4  # parts that a process splits its answers into, short ones beside short
    eval_every: int = 10  # updates between evaluations, each followed by a checkpoint
    eval_examples: int = 40  # held-out problems per kind that are answered at every evaluation
    eval_samples: int = 8  # k of pass@k and maj@k, before and after training; 1: neither
    # -- Machine
    seed: int = 0  # of the sampling and the order of the problems
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    # precision of the layers; weights stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


PRESETS = {
    "smoke": {
        "steps": 4,
        "batch_size": 4,
        "samples": 4,
        "max_new_tokens": 16,
        "accumulate": 1,
        "eval_every": 2,
        "eval_examples": 4,
        "eval_samples": 2,
    },
    "tiny": {},
    "zero": {
        "init": "runs/pretrain",
        "template": "zero",
        "tasks": "easy",
        "max_new_tokens": 24,
        "lr": 1e-4,
        "out": "runs/zero",
    },
    "images": {
        "init": "runs/vlm",
        "data": "images",
        "loss": "dr_grpo",  # or the small reward of the format counts in full where all are wrong
        "max_new_tokens": 64,
        "steps": 24,
        "eval_every": 12,
        "out": "runs/vlm-grpo",
    },
    "gpu": {"batch_size": 128, "samples": 16, "steps": 200, "lr": 1e-6, "accumulate": 16},
}

REWARDS = ((1.0, accuracy), (0.1, think_format))  # (weight, function of problem and answer)


# --- algorithm: N problems, G answers each, B = N G; entry t of (B, T - 1) is tokens[:, t + 1] ---


def group_advantages(rewards):
    """(r - mean) / (std + 1e-4) within each group: (N, G) -> (N, G)."""
    return centred(rewards) / (rewards.std(1, keepdim=True) + 1e-4)


def centred(rewards):
    """r - mean of the group, without the division that favours problems nearly solved or failed
    (Dr. GRPO). Equal rewards give exactly 0: the mean is taken of what exceeds the first.
    """
    rewards = rewards - rewards[:, :1]
    return rewards - rewards.mean(1, keepdim=True)


def leave_one_out(rewards):
    """r - mean of the others in the group (RLOO)."""
    G = rewards.shape[1]
    return centred(rewards) * G / (G - 1)


def whiten(x, mask, total=lambda value: value):
    """(x - mean) / std over the real tokens; `total` sums a number over processes."""
    n = total(mask.sum().item())
    mean = total((x * mask).sum().item()) / n
    variance = total((((x - mean) * mask) ** 2).sum().item()) / n
    return (x - mean) / math.sqrt(variance + 1e-8) * mask


def returns_to_go(rewards, kl, mask, beta):
    """Reward (B,) at the end less beta k1 of each token from t on, (B, T - 1) (REINFORCE++)."""
    to_go = (-beta * kl * mask).flip(1).cumsum(1).flip(1)
    return (rewards[:, None] + to_go) * mask


def kl_k1(logprobs, ref):
    """log pi / ref of each token: the plain estimate of the reverse KL."""
    return logprobs - ref


def kl_k3(logprobs, ref):
    """ref/pi - log(ref/pi) - 1 of each token: never negative (Schulman 2020)."""
    return torch.exp(ref - logprobs) - (ref - logprobs) - 1


def overlong_penalty(length, longest, buffer):
    """0 up to `longest` - `buffer` tokens, then falling to -1 at `longest` (DAPO, eq. 13)."""
    if not buffer:
        return 0.0
    return max(-1.0, min(0.0, (longest - buffer - length) / buffer))


@dataclass
class Counts:
    """What a loss divides by: of the whole batch, over all of its parts and processes."""

    answers: float
    tokens: float
    longest: int  # --max_new_tokens


def clipped(rho, A, clip):
    """max(-A rho, -A clip(rho, 1 - low, 1 + high))."""
    return torch.maximum(-A * rho, -A * rho.clamp(1 - clip[0], 1 + clip[1]))


# Every loss: logprobs, old, A, mask and penalty (beta times KL) are (B, T - 1); A and penalty may
# broadcast; clip is (low, high). Parts of a batch add up to the loss of the whole.


def grpo(logprobs, old, A, mask, counts, clip, penalty=0.0):
    """Mean over answers of the mean over tokens: a token of a short answer weighs more."""
    per_token = clipped(torch.exp(logprobs - old), A, clip) + penalty
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / counts.answers


def dr_grpo(logprobs, old, A, mask, counts, clip, penalty=0.0):
    """Sum over tokens divided by a constant: length doesn't change a token's weight."""
    per_token = clipped(torch.exp(logprobs - old), A, clip) + penalty
    return (per_token * mask).sum() / (counts.answers * counts.longest)


def dapo(logprobs, old, A, mask, counts, clip, penalty=0.0):
    """Mean over all tokens of the batch, so that long answers weigh more."""
    per_token = clipped(torch.exp(logprobs - old), A, clip) + penalty
    return (per_token * mask).sum() / counts.tokens


def rloo(logprobs, old, A, mask, counts, clip, penalty=0.0):
    """An answer is one action: its ratio is that of the whole sequence."""
    rho = torch.exp(((logprobs - old) * mask).sum(1, keepdim=True))
    return clipped(rho, A, clip).sum() / counts.answers


def reinforce_pp(logprobs, old, A, mask, counts, clip, penalty=0.0):
    """PPO's loss with an advantage for each token (`returns_to_go`, whitened over the batch)."""
    return dapo(logprobs, old, A, mask, counts, clip)


def cispo(logprobs, old, A, mask, counts, clip, penalty=0.0):
    """REINFORCE with clipped weights: every token keeps its gradient."""
    weight = torch.exp(logprobs - old).clamp(max=clip[1]).detach()
    return ((-weight * A * logprobs + penalty) * mask).sum() / counts.tokens


def gspo(logprobs, old, A, mask, counts, clip, penalty=0.0):
    """The ratio of an answer is the geometric mean of its tokens'."""
    log_rho = ((logprobs - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    per_token = clipped(torch.exp(log_rho), A, clip) + penalty
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / counts.answers


@dataclass
class Variant:
    loss: Callable
    advantages: Callable  # from rewards (N, G)
    clip: tuple  # (low, high) of its paper
    kl_in_reward: bool = False


VARIANTS = {
    "grpo": Variant(grpo, group_advantages, (0.2, 0.2)),
    "dr_grpo": Variant(dr_grpo, centred, (0.2, 0.2)),
    "dapo": Variant(dapo, group_advantages, (0.2, 0.28)),
    "rloo": Variant(rloo, leave_one_out, (0.2, 0.2), kl_in_reward=True),
    "reinforce_pp": Variant(reinforce_pp, None, (0.2, 0.2), kl_in_reward=True),
    "cispo": Variant(cispo, group_advantages, (math.inf, 5.0)),
    "gspo": Variant(gspo, group_advantages, (3e-4, 4e-4)),
}


# --- sampling ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Answers and their rewards; row n G + g is answer g to problem n."""

    rows: Completions  # their mask leaves out what tools have written
    rewards: torch.Tensor  # (B,)
    right: torch.Tensor  # (B,) accuracy
    ended: torch.Tensor  # (B,) bool

    @property
    def mask(self):
        """True on the tokens to train on, (B, T - 1)."""
        return self.rows.mask[:, 1:]

    def select(self, numbers):
        rows, *rest = vars(self).values()
        return Rollout(rows[numbers], *(x[numbers] for x in rest))

    @classmethod
    def join(cls, parts):
        rows, *rest = zip(*(vars(part).values() for part in parts))
        return cls(Completions.join(rows), *map(torch.cat, rest))


def reward_of(cfg, example, text, length, ended):
    """What an answer is worth: by REWARDS, less the price of its length."""
    reward = sum(weight * function(example, text) for weight, function in REWARDS)
    if not ended:  # nothing; and where rewards may be negative, no way out of them
        reward = min(0.0, reward)
    return reward + overlong_penalty(length, cfg.max_new_tokens, cfg.overlong_buffer)


def sample_rollout(cfg, policy, sampling, examples, noise):
    """Sample G answers to each item with this noise (B, max_new_tokens), and reward them."""
    answers = sampling.answers(policy, examples, noise)
    rewards = [reward_of(cfg, *each) for each in answers.each()]
    right = [
        accuracy(example, text) if ended else 0.0 for example, text, _, ended in answers.each()
    ]
    device = answers.ended.device
    rewards, right = (torch.tensor(x, device=device) for x in (rewards, right))
    return Rollout(answers.rows, rewards, right, answers.ended)


def sample_batch(cfg, rt, policy, sampling, problems, sampler):
    """(rollout of this process, figures of all): with dynamic sampling groups whose rewards are
    equal, which teach nothing, make room for others, in up to four rounds.
    """
    share, G, left, seen = rt.share(cfg.batch_size), cfg.samples, cfg.batch_size, []
    while left > 0 and len(seen) < (4 if cfg.dynamic_sampling else 1):
        examples = [problems[i] for i in sampler.take(cfg.batch_size)[share]]
        seen.append(sample_rollout(cfg, policy, sampling, examples, draw_noise(cfg, rt)))
        left -= rt.sum((~equal_groups(seen[-1].rewards, G)).sum().item())
    rollout = Rollout.join(seen)
    figures = figures_of(rt, rollout, G)
    if cfg.dynamic_sampling:
        unequal = ~equal_groups(rollout.rewards, G)
        unequal[0] |= not unequal[: len(examples)].any()  # no process may be left without any
        rollout = rollout.select(unequal.repeat_interleave(G))
    return rollout, figures


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    check_flags(cfg, REWARDS)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.init, cfg.out)
    policy, tokenizer = load_model(cfg.init)
    start_adapter(policy, cfg, rt)
    if isinstance(policy, VLM) and not cfg.adapter:
        policy.train_parts(language=True)  # and the projector
    ref = reference(policy) if cfg.kl_coef else None
    train, examples, sampling = open_problems(cfg, policy, tokenizer)

    run = Run(cfg, rt, cfg.steps)
    ddp_model = rt.prepare(policy)
    policy.model.checkpoint_activations = cfg.checkpoint_activations
    if ref is not None:
        rt.prepare(ref, train=False)
    optimizers = build_optimizers(
        policy, cfg.optimizer, cfg.muon_lr, cfg.lr, weight_decay=0.0, betas=(0.9, 0.95)
    )
    sampler = Sampler(len(train), cfg.seed)
    scaler, trained = rt.scaler(), [policy, optimizers, [sampler]]
    saved = run.restore(*trained, scaler)
    measure = partial(evaluate, cfg, run, policy, sampling, examples)
    before = saved.get("before") or measure(cfg.eval_samples)
    after = saved.get("after", before)

    while run.step < cfg.steps:
        optimizers.schedule(trapezoid(run.step, cfg.steps, cfg.warmup))
        rollout, sampled = sample_batch(cfg, rt, policy, sampling, train, sampler)
        seen = update(cfg, rt, ddp_model, ref, optimizers, scaler, rollout)
        run.check_finite(seen["loss"])
        run.advance()
        run.log(seen.pop("tokens"), show=("reward", "accuracy"), **sampled, **seen)
        last = run.step == cfg.steps
        if run.step % cfg.eval_every == 0 or last:
            after = measure(cfg.eval_samples if last else 1)
            run.export(policy, tokenizer)
            run.checkpoint(*trained, scaler, before=before, after=after)
    finish(rt, run, before, after)


def update(cfg, rt, ddp_model, ref, optimizers, scaler, rollout):
    """The inner updates on one batch of answers; returns what was seen, as means."""
    variant, rows, mask = VARIANTS[cfg.loss], rollout.rows, rollout.mask
    parts = rows.real.sum(1).argsort().chunk(cfg.accumulate)
    counts = Counts(rt.sum(len(rows)), rt.sum(mask.sum().item()), cfg.max_new_tokens)
    clip = [
        own if x is None else x for x, own in zip((cfg.clip_low, cfg.clip_high), variant.grad_clip)
    ]
    ref_logprobs = batched_logprobs(ref, rows, parts, cfg.temperature) if ref is not None else None
    old = torch.zeros(mask.shape, device=rt.device)
    if variant.kl_in_reward and ref is not None:
        old = batched_logprobs(ddp_model, rows, parts, cfg.temperature)
    A = advantages_of(cfg, variant, rollout, old, ref_logprobs, rt.sum)
    seen = {"loss": 0.0, "grad_norm": 0.0, "clip_fraction": 0.0}
    for inner in range(cfg.inner_updates):
        for i, numbers in enumerate(parts):
            part = rows[numbers]
            width = part.mask.shape[1] - 1  # columns of padding, all on the right, are left out
            with rt.accumulating(ddp_model, more=i + 1 < len(parts)):
                logprobs = completion_logprobs(ddp_model, part, cfg.temperature)
                if inner == 0:
                    old[numbers, :width] = logprobs.detach()
                before, trained = old[numbers, :width], part.mask[:, 1:]
                penalty = 0.0
                if ref is not None and not variant.kl_in_reward:
                    penalty = cfg.kl_coef * kl_k3(logprobs, ref_logprobs[numbers, :width])
                loss = variant.loss(
                    logprobs, before, A[numbers, :width], trained, counts, clip, penalty
                )
                scaler.scale(loss * rt.world).backward()
            seen["loss"] += loss.item()
            outside = beyond_clip(cfg.loss, logprobs.detach() - before, trained, clip)
            seen["clip_fraction"] += outside.sum().item() / counts.tokens
        optimizers.unscale(scaler)
        norm = nn.utils.clip_grad_norm_(ddp_model.parameters(), cfg.grad_clip or math.inf)
        seen["grad_norm"] += norm.item()
        optimizers.step(scaler)
        optimizers.zero_grad()
    seen = {name: value / cfg.inner_updates for name, value in seen.items()}
    seen |= {name: rt.sum(seen[name]) for name in ("loss", "clip_fraction")}
    seen["entropy"] = -rt.sum((old * mask).sum().item()) / counts.tokens  # by the sampled tokens
    if ref is not None:
        seen["kl"] = rt.sum((kl_k1(old, ref_logprobs) * mask).sum().item()) / counts.answers
    return seen | {"tokens": counts.tokens * cfg.inner_updates}


def beyond_clip(loss, log_rho, trained, clip):
    """True for each token whose ratio, or whose answer's, the loss clips; (B, T - 1)."""
    if loss in ("rloo", "gspo"):
        log_rho = (log_rho * trained).sum(1, keepdim=True)
    if loss == "gspo":
        log_rho = log_rho / trained.sum(1, keepdim=True)
    rho = torch.exp(log_rho)
    largest = clip[1] if loss == "cispo" else 1 + clip[1]
    return ((rho < 1 - clip[0]) | (rho > largest)) & trained


def advantages_of(cfg, variant, rollout, old, ref_logprobs, total):
    """A of each answer, (B, 1), or with reinforce_pp of each token, (B, T - 1)."""
    rewards, mask = rollout.rewards, rollout.mask
    kl = torch.zeros(mask.shape, device=mask.device)
    if variant.kl_in_reward and ref_logprobs is not None:
        kl = kl_k1(old, ref_logprobs) * mask
    if cfg.loss == "reinforce_pp":
        return whiten(returns_to_go(rewards, kl, mask, cfg.kl_coef), mask, total)
    rewards = rewards - cfg.kl_coef * kl.sum(1)
    return variant.advantages(rewards.view(-1, cfg.samples)).view(-1, 1)


if __name__ == "__main__":
    cli(main, Config, PRESETS)
