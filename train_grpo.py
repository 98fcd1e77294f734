"""GRPO: sample G completions of each problem and reinforce those better than their group.

    A_i = (r_i - mean(r_1..r_G)) / (std(r_1..r_G) + 1e-4)              DeepSeekMath, 2402.03300
    loss = - 1/G sum_i 1/|o_i| sum_t [min(rho A, clip(rho, 1 - low, 1 + high) A) - beta k3]
    rho = pi(o_t) / pi_old(o_t),   k3 = ref/pi - log(ref/pi) - 1

No critic and no reward model: small functions check the answer (REWARDS below; replace them in one
line). --loss selects a relative: dr_grpo (2503.20783), dapo (2503.14476), rloo (2402.14740),
reinforce_pp (2501.03262), cispo (2506.13585), gspo (2507.18071). std divides by G - 1, as in public
implementations. pi_old are the logprobs of the first pass over a batch, so that rho starts at
exactly 1. k3's gradient is the forward KL's; rloo and reinforce_pp put k1 = log(pi/ref) into the
reward, which gives the reverse KL's. An unfinished completion gets 0, or its own reward if that is
negative, less the overlong penalty. DeepSeekMath adds no 1e-4, and its beta is 0.04; here 0.

Run     python train_grpo.py
        python train_grpo.py --preset zero           # R1-Zero: from runs/pretrain, without SFT
        python train_grpo.py --init runs/tools --data tools --tools --out runs/grpo_tools
        python train_grpo.py --preset images         # counting what is in an image, from runs/vlm
Needs   runs/cot                 (python train_sft.py --preset cot)
Expect  held-out problems, greedy: 60% -> 93%, 91%, 90% (seeds 0, 1, 2), in 70 s on 2 cores with
        bf16; with seed 0 one sample 51% -> 86%, maj@8 87% -> 93%, pass@8 97% -> 98%. In fp32 62% ->
        85%, 86%, 85%; one sample 48% -> 77%, 75%, 76%. R1-Zero: the easiest problems 2% -> 98% in
        17 s (bf16, seed 0)
Watch   reward, accuracy   of the sampled completions, rise from 0.5 to 1.0; flat: see equal_groups
        equal_groups       share of groups of equal rewards, which have zero group advantage: from
                           0 to 0.7; near 1: the problems are too hard or too easy
        length, truncated  tokens of a completion, share that didn't end: near 0; rising: the model
                           rambles, raise --max_new_tokens or set --overlong_buffer
        entropy            estimate from the sampled tokens, nats each; near 0: nothing is explored
        kl                 nats per completion to the reference, with --kl_coef
        clip_fraction      share of tokens beyond the clip range: 0 with one inner update
        loss               says little (for grpo, rloo and gspo without KL it is 0 at rho = 1)
        grad_norm          below 1
        val_accuracy       greedy, on held-out problems, whether a completion has ended or not
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from data.village import examples as village
from nanollm.batches import Completions, Sampler
from nanollm.config import (
    LARGE,
    AdapterConfig,
    NotNegative,
    OpenShare,
    Positive,
    TrainConfig,
    Whole,
    cli,
)
from nanollm.formats import need, read_parts
from nanollm.generate import as_text, sample_together
from nanollm.hub import load_model, save_model
from nanollm.logprobs import batched_logprobs, completion_logprobs
from nanollm.metrics import accuracy_table, first_of_each_task, sample_by_task, sampled_metrics
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.peft.adapters import reference, start_adapter
from nanollm.records import read_examples, read_prompts
from nanollm.rewards import accuracy, think_format
from nanollm.rollouts import RolloutRows, prompt_of, sample_rows, whiten, with_room
from nanollm.run import Run, check_folders, effect
from nanollm.runtime import start
from nanollm.tools import Toolbox

LossName = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "cispo", "gspo"]


@dataclass
class Config(AdapterConfig, TrainConfig):
    # -- Data
    init: str = "runs/cot"  # run folder or model folder to start from; also the reference
    # village: its problems; tools: its questions for tools; images: what to count in its images; or
    # JSONL of problems, GSM8K's too, with an "image" where they are about one
    data: str = "village"
    tasks: str = ""  # only these kinds of problems, separated by commas; default: all
    val_fraction: OpenShare = 0.05  # share of --data that is held out
    # how a problem is put. chat: as a user's question; for base models (R1-Zero) zero: after a
    # worked example; think: after a description of <think>, as DeepSeek does
    template: Literal["chat", "zero", "think"] = "chat"
    tools: bool = False  # run the calls that the model writes
    # with tools: JSONL of {"title", "text"} to search; default: the village's, and SQL about it
    knowledge: str | None = None
    # -- Loss
    loss: LossName = "grpo"  # GRPO or a relative; one line each in VARIANTS
    kl_coef: NotNegative = 0.0  # beta, the price of a nat of KL to the reference; 0: no reference
    # -- Sampling
    samples: Whole[2] = 8  # G, completions per problem
    max_new_tokens: Whole[1] = 112  # longest completion
    temperature: Positive = 1.0  # of sampling and of training
    inner_updates: Whole[1] = 1  # optimizer steps per batch of completions
    # sample on until enough groups have unequal rewards (DAPO); all that are found are kept, so a
    # batch may be larger than --batch_size
    dynamic_sampling: bool = False
    # length of the zone before --max_new_tokens where the reward falls by up to 1 (DAPO); 0: none
    overlong_buffer: Whole[0] = 0
    # -- Training
    out: str = "runs/grpo"
    steps: int = 30  # updates, each with a batch of new completions
    batch_size: int = 32  # problems per update, over all processes
    accumulate: int = 4  # micro-batches, sorted by length
    optimizer: str = "adamw"
    lr: float = 3e-4
    muon_lr: float = 0.002
    warmup: int = 3
    eval_every: int = 10
    eval_problems: Whole[1] = 40  # held-out problems per task that are answered at an evaluation
    eval_samples: Whole[1] = 8  # k of pass@k and maj@k, before and after training; 1: neither


PRESETS = {
    "smoke": dict(steps=4, batch_size=4, samples=4, max_new_tokens=16, eval_every=2)
    | dict(eval_problems=4),
    "zero": dict(init="runs/pretrain", template="zero", tasks="easy", out="runs/zero")
    | dict(max_new_tokens=24, lr=1e-4),
    # with std normalisation, the 0.1 for the format would count fully where every answer is wrong
    "images": dict(init="runs/vlm", data="images", loss="dr_grpo", out="runs/vlm-grpo")
    | dict(max_new_tokens=64, steps=24, eval_every=12),
    "gpu": dict(batch_size=128, samples=16, steps=200, lr=1e-6, accumulate=16),
    # rate of DeepSeekMath (Shao et al. 2024, arXiv:2402.03300, section 4.2); schedule of DAPO
    # (Yu et al. 2025, 2503.14476), which drops the KL, and with it the reference, as here
    "downloaded": dict(LARGE, schedule="constant", lr=1e-6, warmup=10, steps=200, eval_every=20)
    | dict(batch_size=16, accumulate=32, max_new_tokens=512),
}

REWARDS = (  # (weight, function of a problem and the text of a completion)
    (1.0, accuracy),
    (0.1, think_format),
)
ROUNDS = 4  # of dynamic sampling at most


# --- data: which problems, and how they are put --------------------------------------------------


def load_problems(cfg):
    """(training problems, held-out problems): those with an "answer", of the chosen tasks."""
    if cfg.data in ("village", "tools", "images"):
        name = "tools" if cfg.data == "tools" else "problems"
        place = village
        if cfg.data == "images":
            from data.village import images as place  # which paints: text alone needs none of it
        folder = place.of_run(cfg.init)
        parts = [read_prompts(folder / f"{name}_{split}.jsonl") for split in ("train", "test")]
        parts = [[example for example in part if "answer" in example] for part in parts]
    else:
        parts = read_parts(read_examples, cfg.data, None, cfg.val_fraction)
    known = dict.fromkeys(problem["task"] for part in parts for problem in part)
    wanted = cfg.tasks.split(",") if cfg.tasks else known
    parts = [[problem for problem in part if problem["task"] in wanted] for part in parts]
    fine = {*wanted} <= {*known} and all(parts)
    need(fine, f"--tasks {cfg.tasks}", f"{cfg.data} has only {', '.join(known)}")
    return parts


class Prompts:
    """How problems are put to a policy, with what their images show, and what it then completes."""

    def __init__(self, cfg, rt, policy, tokenizer, problems):
        self.cfg, self.rt, self.policy, self.tokenizer = cfg, rt, policy, tokenizer
        self.tools = self.store = None
        if cfg.tools:
            knowledge = village.knowledge_of(cfg.init, cfg.knowledge)
            self.tools = Toolbox.with_knowledge(knowledge, tokenizer)
        if any(problem.get("images") for problem in problems):
            self.store = policy.image_store()

    def ids(self, problem):
        return prompt_of(problem, self.policy, self.tokenizer, self.cfg.template)

    @torch.no_grad()
    def images(self, problems):
        """What the frozen vision tower makes of each problem's images, (n, N, C_v), or None."""
        paths = [problem.get("images", []) for problem in problems]
        if not any(paths):
            return None
        images = self.store.of([path for own in paths for path in own]).to(self.policy.device)
        return self.policy.encode_images(images).split([len(own) for own in paths])

    def sample(self, problems):
        """G completions of each of this process's problems, to train on: rollouts.SampledRows."""
        ids, images = list(map(self.ids, problems)), self.images(problems)
        policy, tokenizer = self.policy, self.tokenizer
        return sample_rows(self.cfg, self.rt, policy, tokenizer, problems, ids, self.tools, images)

    def complete(self, problems, **sampling):
        """Texts of completions; the processes share the work."""
        ids, mine = list(map(self.ids, problems)), self.rt.mine(len(problems))
        sampling |= {"tools": self.tools, "images": self.images(problems[mine])}
        policy, tokenizer, longest = self.policy, self.tokenizer, self.cfg.max_new_tokens
        completions = sample_together(self.rt, policy, tokenizer, ids, longest, **sampling)
        prompts = [p for p in ids for _ in range(len(completions) // len(ids))]
        begins = map(tokenizer.begun, prompts)
        return [begin + as_text(tokenizer, each) for begin, each in zip(begins, completions)]


# --- algorithm: B = N G completions of N problems; t of (B, T - 1) belongs to tokens[:, t + 1] ---


def group_advantages(rewards):
    """(r - mean) / (std + 1e-4) within each group: (N, G) -> (N, G)."""
    return centred(rewards) / (rewards.std(1, keepdim=True) + 1e-4)


def centred(rewards):
    """r - mean; a division would favour problems nearly solved or failed (Dr. GRPO). The first
    reward is subtracted before the mean, so that equal rewards give exactly 0 in floating point.
    """
    rewards = rewards - rewards[:, :1]
    return rewards - rewards.mean(1, keepdim=True)


def leave_one_out(rewards):
    """r - mean of the others in the group (RLOO)."""
    G = rewards.shape[1]
    return centred(rewards) * G / (G - 1)


def returns_to_go(rewards, kl, mask, beta):
    """Reward (B,) at the end less beta k1 of each token from t on, (B, T - 1) (REINFORCE++)."""
    to_go = (-beta * kl * mask).flip(1).cumsum(1).flip(1)
    return (rewards[:, None] + to_go) * mask


def kl_k3(logprobs, ref):
    """ref/pi - log(ref/pi) - 1 of each token: never negative (Schulman 2020)."""
    return torch.exp(ref - logprobs) - (ref - logprobs) - 1


def overlong_penalty(length, longest, buffer):
    """0 up to `longest` - `buffer` tokens, then falling to -1 at `longest` (DAPO, eq. 13)."""
    if not buffer:
        return 0.0
    return max(-1.0, min(0.0, (longest - buffer - length) / buffer))


@dataclass
class Sizes:
    """Denominators of the losses, counted over the whole batch: all micro-batches and processes."""

    num_sequences: float
    num_tokens: float
    max_new_tokens: int


# pi / pi_old from log_rho (B, T - 1): of each token, or one number for each sequence, (B, 1).


def token_ratio(log_rho, mask):
    return torch.exp(log_rho)


def sequence_ratio(log_rho, mask):
    """The product over its tokens: a completion is one action (RLOO)."""
    return torch.exp((log_rho * mask).sum(1, keepdim=True))


def mean_ratio(log_rho, mask):
    """The geometric mean over its tokens (GSPO)."""
    return torch.exp((log_rho * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))


# Every loss: logprobs, rho, A, mask and penalty (beta times KL) are (B, T - 1), of which rho, A and
# penalty may broadcast; clip is (low, high). Parts of a batch add up to the loss of the whole.


def clipped(rho, A, clip):
    """max(-A rho, -A clip(rho, 1 - low, 1 + high))."""
    return torch.maximum(-A * rho, -A * rho.clamp(1 - clip[0], 1 + clip[1]))


def grpo(logprobs, rho, A, mask, sizes, clip, penalty=0.0):
    """Mean over sequences of the mean over tokens: a token of a short one weighs more."""
    per_token = clipped(rho, A, clip) + penalty
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / sizes.num_sequences


def dr_grpo(logprobs, rho, A, mask, sizes, clip, penalty=0.0):
    """Sum over tokens divided by a constant: length doesn't change a token's weight."""
    per_token = clipped(rho, A, clip) + penalty
    return (per_token * mask).sum() / (sizes.num_sequences * sizes.max_new_tokens)


def dapo(logprobs, rho, A, mask, sizes, clip, penalty=0.0):
    """Mean over all tokens of the batch, so that long sequences weigh more."""
    per_token = clipped(rho, A, clip) + penalty
    return (per_token * mask).sum() / sizes.num_tokens


def rloo(logprobs, rho, A, mask, sizes, clip, penalty=0.0):
    """Mean over sequences, of which each has one ratio: log pi of a sequence is a sum."""
    return clipped(rho, A, clip).sum() / sizes.num_sequences


def cispo(logprobs, rho, A, mask, sizes, clip, penalty=0.0):
    """REINFORCE with clipped weights: every token keeps its gradient."""
    weight = rho.clamp(1 - clip[0], 1 + clip[1]).detach()
    return ((-weight * A * logprobs + penalty) * mask).sum() / sizes.num_tokens


@dataclass
class Variant:
    loss: Callable
    ratio: Callable
    advantages: Callable | None  # from rewards (N, G); None: of each token, by `returns_to_go`
    # (low, high): dapo's and gspo's are those of their papers, and 0.2 is PPO's; cispo's paper has
    # none below and doesn't name the one above, which is this project's choice
    clip: tuple
    kl_in_reward: bool = False


VARIANTS = {
    "grpo": Variant(grpo, token_ratio, group_advantages, (0.2, 0.2)),
    "dr_grpo": Variant(dr_grpo, token_ratio, centred, (0.2, 0.2)),
    "dapo": Variant(dapo, token_ratio, group_advantages, (0.2, 0.28)),
    "rloo": Variant(rloo, sequence_ratio, leave_one_out, (0.2, 0.2), kl_in_reward=True),
    "reinforce_pp": Variant(dapo, token_ratio, None, (0.2, 0.2), kl_in_reward=True),
    "cispo": Variant(cispo, token_ratio, group_advantages, (math.inf, 4.0)),  # weights up to 5
    "gspo": Variant(grpo, mean_ratio, group_advantages, (3e-4, 4e-4)),
}


def estimate_advantages(cfg, rollout, total=float):
    """A of each completion, (B, 1), or of each token, (B, T - 1)."""
    variant, mask = VARIANTS[cfg.loss], rollout.mask
    kl = torch.zeros(mask.shape, device=mask.device)
    if variant.kl_in_reward and cfg.kl_coef:
        kl = (rollout.old_logprobs - rollout.ref_logprobs) * mask  # k1
    if variant.advantages is None:
        return whiten(returns_to_go(rollout.rewards, kl, mask, cfg.kl_coef), mask, total)
    rewards = rollout.rewards - cfg.kl_coef * kl.sum(1)
    return variant.advantages(rewards.view(-1, cfg.samples)).view(-1, 1)


# --- sampling ------------------------------------------------------------------------------------


@dataclass
class Rollout(RolloutRows):
    """Completions and their rewards; row n G + g is completion g of problem n."""

    rewards: torch.Tensor  # (B,)
    correct: torch.Tensor  # (B,) accuracy
    ended: torch.Tensor  # (B,) bool
    old_logprobs: torch.Tensor | None = None  # (B, T - 1), as the two below
    ref_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None  # or (B, 1)

    @classmethod
    def join(cls, rollouts):
        """As they were sampled, one below the other."""
        rows = Completions.join([each.rows for each in rollouts])
        parts = ((each.rewards, each.correct, each.ended) for each in rollouts)
        return cls(rows, *map(torch.cat, zip(*parts)))


def reward_of(cfg, problem, text, length, ended):
    """What a completion is worth: by REWARDS, less the price of its length."""
    reward = sum(weight * function(problem, text) for weight, function in REWARDS)
    if not ended:  # 0, but a negative reward stays: to run on would be a way out of it
        reward = min(0.0, reward)
    return reward + overlong_penalty(length, cfg.max_new_tokens, cfg.overlong_buffer)


def sample_rollout(cfg, prompts, problems):
    """Sample G completions of each of this process's problems; reward them."""
    sampled = prompts.sample(problems)
    ended = sampled.ended.tolist()
    each = [*zip(sampled.examples, sampled.texts, map(len, sampled.completions), ended)]
    rewards = [reward_of(cfg, *of_one) for of_one in each]
    correct = [accuracy(problem, text) if ended else 0.0 for problem, text, _, ended in each]
    rewards, correct = (torch.tensor(x, device=sampled.ended.device) for x in (rewards, correct))
    return Rollout(sampled.rows, rewards, correct, sampled.ended)


def sample_batch(cfg, rt, prompts, train, sampler):
    """(rollout of this process, stats of all); with dynamic sampling of several rounds."""
    G, missing, rounds = cfg.samples, cfg.batch_size, []
    while missing > 0 and len(rounds) < (ROUNDS if cfg.dynamic_sampling else 1):
        problems = [train[i] for i in sampler.take(cfg.batch_size)[rt.share(cfg.batch_size)]]
        rounds.append(sample_rollout(cfg, prompts, problems))
        missing -= rt.sum((~equal_groups(rounds[-1].rewards, G)).sum())
    rollout = Rollout.join(rounds)
    stats = rollout_stats(rollout, G, rt.sum)
    if cfg.dynamic_sampling:
        keep = ~equal_groups(rollout.rewards, G)
        keep[0] |= not keep.any()  # no process may be left without a row
        rollout = rollout[keep.repeat_interleave(G).nonzero()[:, 0]]
    return rollout, stats


def equal_groups(rewards, G):
    """True for each group whose rewards are all the same, (N,)."""
    groups = rewards.view(-1, G)
    return (groups == groups[:, :1]).all(1)


def rollout_stats(rollout, G, total=float):
    """Means over completions; `total` sums a number over processes."""
    n = total(len(rollout))
    return {
        "reward": total(rollout.rewards.sum()) / n,
        "accuracy": total(rollout.correct.sum()) / n,
        "equal_groups": total(equal_groups(rollout.rewards, G).sum()) / (n / G),
        "length": total(rollout.mask.sum()) / n,
        "truncated": 1 - total(rollout.ended.sum()) / n,
    }


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, cfg.init)
    policy, tokenizer = load_model(cfg.init)
    start_adapter(policy, cfg, rt)
    if policy.tokens_per_image and not cfg.adapter:
        policy.train_parts(language=True)  # and the projector
    ref = rt.prepare(reference(policy), train=False) if cfg.kl_coef else None
    if cfg.data == "images":
        policy.image_store()  # refuses a model of text before images are painted
    train, val = load_problems(cfg)
    prompts = Prompts(cfg, rt, policy, tokenizer, train + val)
    room = prompts.ids, policy, cfg.max_new_tokens, "problems"
    train, val = (with_room(problems, *room) for problems in (train, val))
    val = first_of_each_task(val, cfg.eval_problems)

    run = Run(cfg, rt)
    ddp_model = rt.prepare(policy, cfg.compile)
    policy.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(policy, cfg, rt.scaler)
    schedule, sampler = SCHEDULES[cfg.schedule], Sampler(len(train), cfg.seed)
    saved = run.restore(policy, optimizer, sampler)
    measure = partial(evaluate, cfg, run, prompts, val)
    if not saved:
        before = measure(cfg.eval_samples)
        saved = {"before": before, "after": before}

    while run.step < cfg.steps:
        rollout, stats = sample_batch(cfg, rt, prompts, train, sampler)
        factor = schedule(run.step, cfg.steps, cfg.warmup)
        updated, num_tokens = update(cfg, rt, ddp_model, ref, optimizer, rollout, factor)
        run.advance(num_tokens, every=1, show=("reward", "accuracy"), **stats, **updated)

        if run.due(cfg.eval_every):
            saved["after"] = measure(cfg.eval_samples if run.step == cfg.steps else 1)
            run.export(save_model, policy, tokenizer)
            run.checkpoint(**saved)
    run.close("reward", "accuracy", "val_accuracy", x_label="update", y_label="share")
    finish(rt, run, saved["before"], saved["after"])


def update(cfg, rt, ddp_model, ref, optimizer, rollout, factor=1.0):
    """The inner updates on one batch: (stats, means over all processes; tokens trained on)."""
    variant, order = VARIANTS[cfg.loss], rollout.rows.real.sum(1).argsort()
    by_length = rollout.rows, order.chunk(cfg.accumulate), cfg.temperature
    if ref is not None:
        rollout.ref_logprobs = batched_logprobs(ref, *by_length)
    kl_in_reward = variant.kl_in_reward and ref is not None
    if kl_in_reward or cfg.inner_updates > 1:  # with one update its own pass gives them: rho = 1
        rollout.old_logprobs = batched_logprobs(ddp_model, *by_length)
    # before sorting: the completions of a group stand in consecutive rows
    rollout.advantages = estimate_advantages(cfg, rollout, rt.sum)
    rollout, sums = rollout[order], Counter()
    sizes = Sizes(rt.sum(len(rollout)), rt.sum(rollout.mask.sum()), cfg.max_new_tokens)
    for _ in range(cfg.inner_updates):
        for part in rt.micro_batches(rollout, cfg.accumulate, ddp_model):
            logprobs = completion_logprobs(ddp_model, part.rows, cfg.temperature)
            old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
            rho, penalty = variant.ratio(logprobs - old, part.mask), 0.0
            if ref is not None and not variant.kl_in_reward:
                penalty = cfg.kl_coef * kl_k3(logprobs, part.ref_logprobs)
            A, mask, clip = part.advantages, part.mask, variant.clip
            loss = variant.loss(logprobs, rho, A, mask, sizes, clip, penalty)
            sums["loss"] += rt.backward(loss).item()
            sums.update(update_stats(part, old, rho.detach(), sizes, clip))
        grad_norm = optimizer.step(factor, cfg.grad_clip)
    stats = {name: rt.sum(value) / cfg.inner_updates for name, value in sums.items()}
    return stats | {"grad_norm": grad_norm}, sizes.num_tokens * cfg.inner_updates


def update_stats(part, old, rho, sizes, clip):
    """What a part of an update adds to its stats: shares of all tokens, nats per completion."""
    outside = ((rho < 1 - clip[0]) | (rho > 1 + clip[1])) & part.mask
    stats = {
        "clip_fraction": outside.sum().item() / sizes.num_tokens,
        "entropy": -(old * part.mask).sum().item() / sizes.num_tokens,  # an estimate
    }
    if part.ref_logprobs is not None:
        kl = (old - part.ref_logprobs) * part.mask
        stats["kl"] = kl.sum().item() / sizes.num_sequences
    return stats


def evaluate(cfg, run, prompts, problems, samples=1):
    """Greedy accuracy on held-out problems; with `samples` also pass@k and maj@k."""
    sampled = None
    prompts.policy.eval()
    greedy = prompts.complete(problems, temperature=0.0)
    if samples > 1:
        sampled = prompts.complete(problems, samples=samples, seed=cfg.seed)
    prompts.policy.train()
    metrics = sampled_metrics(problems, greedy, sampled)
    run.evaluated(val_accuracy=metrics["all"]["accuracy"])
    run.write_sample(sample_by_task(problems, greedy))
    return metrics


def finish(rt, run, before, after):
    """Print what the rewards have changed, and keep it in result.json."""
    for name, metrics in (("before", before), ("after", after)):
        rt.print(f"\n{name}: greedy, one sample, maj@k and pass@k of k = {metrics['all']['k']}")
        rt.print(accuracy_table({"": metrics}, ("accuracy", "sampled", "maj", "pass")))
    effects, names = [], {"accuracy": "right answers to held-out problems"}
    if "sampled" in after["all"]:
        names["sampled"] = "right samples"
    for key, name in names.items():
        effects.append(effect(name, before["all"][key], after["all"][key], "share"))
    run.write_result(effects, before=before, after=after)
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
