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
        python train_grpo.py --preset pictures       # counting what is in a picture, from runs/vlm
Needs   runs/cot                 (python train_sft.py --preset cot)
Expect  held-out problems 49% -> 89% in a minute on 2 cores; R1-Zero 0.5% -> 62% in 20 s (README.md)
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Callable, Literal

import torch
import torch.nn as nn

from nanollm.adapter_runs import reference, start_adapter
from nanollm.config import UserError, cli
from nanollm.data import Replies, Sampler, pad_replies
from nanollm.evaluate import as_text, pictures_of, sample_replies, village_of, village_tools
from nanollm.figures import figures_table, first_of_each_family, sampled_figures
from nanollm.formats import split_documents
from nanollm.generate import check_room, generate
from nanollm.hub import load_model
from nanollm.logprobs import reply_logprobs
from nanollm.optim import build_optimizers, trapezoid
from nanollm.picture_data import read_picture_prompts, store_of
from nanollm.rewards import accuracy, think_format
from nanollm.run import Run, check_folders
from nanollm.runtime import start
from nanollm.templates import prompt_of
from nanollm.tools import check_knowledge
from nanollm.vlm import VLM


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; zero: R1-Zero, from the base model;
    # pictures: a vision-language model counts; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Data
    init: str = "runs/cot"  # run folder or model folder to start from; also the reference
    # village: its problems; tools: its questions for tools; pictures: what to count in its
    # pictures; or JSONL of problems, GSM8K's too, with an "image" where they are about one
    data: str = "village"
    families: str = ""  # only these kinds of problems, separated by commas; default: all
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
    # prompt (nanollm/adapters.py); default: all weights are trained
    adapter: str | None = None
    rank: int = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: float = 32.0  # lora, dora, qlora: what they learn counts alpha / r
    # -- Training
    out: str = "runs/grpo"  # run folder to write
    steps: int = 30  # batches of answers
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: matrices by Muon, the rest by AdamW
    lr: float = 0.002  # learning rate of Muon
    adam_lr: float = 3e-4  # learning rate of AdamW
    warmup: int = 3  # updates of linear warm-up; the last 60% fall linearly to 0
    clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    accumulate: int = 4  # parts that a process splits its answers into, short ones beside short
    eval_every: int = 10  # updates between evaluations, each followed by a checkpoint
    eval_items: int = 40  # held-out problems per kind that are answered at every evaluation
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
        "eval_items": 4,
        "eval_samples": 2,
    },
    "tiny": {},
    "zero": {
        "init": "runs/pretrain",
        "template": "zero",
        "families": "easy",
        "max_new_tokens": 24,
        "adam_lr": 1e-4,
        "out": "runs/zero",
    },
    "pictures": {
        "init": "runs/vlm",
        "data": "pictures",
        "loss": "dr_grpo",  # or the small reward of the format counts in full where all are wrong
        "max_new_tokens": 64,
        "steps": 24,
        "eval_every": 12,
        "out": "runs/vlm-grpo",
    },
    "gpu": {"batch_size": 128, "samples": 16, "steps": 200, "adam_lr": 1e-6, "accumulate": 16},
}

REWARDS = ((1.0, accuracy), (0.1, think_format))  # (weight, function of problem and answer)


# --- data ----------------------------------------------------------------------------------------


def load_problems(cfg):
    """(training problems, held-out problems)."""
    wanted = {name.strip() for name in cfg.families.split(",")} - {""}

    def chosen(records):
        items = [{"family": "all", **item} for item in records if "answer" in item]
        families = dict.fromkeys(item["family"] for item in items)
        if items and (unknown := wanted - families.keys()):
            raise UserError(
                f"{cfg.data} has no problems of {', '.join(sorted(unknown))}, only of "
                f'{", ".join(list(families)[:9])}; choose with --families, or --families "" for all'
            )
        return [item for item in items if not wanted or item["family"] in wanted]

    if cfg.data in ("village", "tools", "pictures"):
        folder = (pictures_of if cfg.data == "pictures" else village_of)(cfg.init)
        name = "tools" if cfg.data == "tools" else "problems"
        files = (folder / f"{name}_{split}.jsonl" for split in ("train", "test"))
        parts = [chosen(read_picture_prompts(path)) for path in files]
    else:
        records = chosen(read_picture_prompts(cfg.data))
        parts = [split_documents(records, part, cfg.val_fraction) for part in ("train", "val")]
    if not all(parts):
        raise UserError(
            f'{cfg.data}: {len(parts[0])} problems with an "answer" to train on and '
            f"{len(parts[1])} held out; both are needed"
        )
    return parts


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

    rows: Replies  # their mask leaves out what tools have written
    rewards: torch.Tensor  # (B,)
    right: torch.Tensor  # (B,) accuracy
    ended: torch.Tensor  # (B,) bool

    @property
    def mask(self):
        return self.rows.mask[:, 1:]

    def select(self, numbers):
        rest = (x[numbers] for x in (self.rewards, self.right, self.ended))
        return Rollout(self.rows.rows(numbers), *rest)

    @classmethod
    def join(cls, parts):
        rows = Replies.join([part.rows for part in parts])
        names = "rewards", "right", "ended"
        return cls(rows, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


def reward_of(item, text):
    return sum(weight * function(item, text) for weight, function in REWARDS)


class Sampling:
    """How problems are put to a policy, and what its answers are worth."""

    def __init__(self, cfg, tokenizer, model=None):
        """`model`: the one that reads the problems' pictures, where they have some."""
        self.cfg, self.tokenizer, self.model = cfg, tokenizer, model
        self.store = None if model is None else store_of(model)
        self.tools = None
        if cfg.tools:
            self.tools = village_tools(cfg.init, tokenizer, cfg.knowledge)

    def ask(self, item):
        """Ids of the prompt."""
        return prompt_of(item, self.model, self.tokenizer, self.cfg.template)

    @torch.no_grad()
    def look(self, policy, items):
        """What the vision tower, which stays frozen, makes of each item's pictures: (n, N, C_v);
        None where there are none.
        """
        paths = [item.get("images", []) for item in items]
        if not any(paths):
            return None
        pictures = self.store.of([path for own in paths for path in own])
        return policy.look(pictures.to(policy.device)).split([len(own) for own in paths])

    def rollout(self, policy, items, noise):
        """Sample G answers to each item with this noise (B, max_new_tokens)."""
        cfg, tokenizer = self.cfg, self.tokenizer
        prompts, seen = list(map(self.ask, items)), self.look(policy, items)
        out = generate(
            policy,
            prompts,
            cfg.max_new_tokens,
            cfg.samples,
            cfg.temperature,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            noise=noise,
            tools=self.tools,
            pictures=seen,
        )
        answers = out.lists()  # ids as generated, never made from text again
        items, prompts, seen = (
            xs and [x for x in xs for _ in range(cfg.samples)] for xs in (items, prompts, seen)
        )
        rows = pad_replies(prompts, answers, tokenizer.pad_id, out.owned(), seen)
        ended = [ids[-1] in tokenizer.stop_ids for ids in answers]
        rewards, right = [], []
        for item, ids, done in zip(items, answers, ended):
            text = as_text(tokenizer, ids)
            reward = reward_of(item, text)
            if not done:  # nothing; and where rewards may be negative, no way out of them
                reward = min(0.0, reward)
            reward += overlong_penalty(len(ids), cfg.max_new_tokens, cfg.overlong_buffer)
            rewards.append(reward)
            right.append(accuracy(item, text) if done else 0.0)
        device = out.tokens.device
        return Rollout(
            rows.to(device), *(torch.tensor(x, device=device) for x in (rewards, right, ended))
        )

    def replies(self, policy, items, samples=1, temperature=0.0, generator=None):
        """Texts of answers, `samples` per item."""
        ids = sample_replies(
            policy,
            self.tokenizer,
            list(map(self.ask, items)),
            self.cfg.max_new_tokens,
            samples,
            temperature,
            generator=generator,
            tools=self.tools,
            pictures=self.look(policy, items),
        )
        return [as_text(self.tokenizer, reply) for reply in ids]


def sample_batch(cfg, rt, policy, sampling, problems, sampler):
    """(rollout of this process, figures of all): with dynamic sampling groups whose rewards are
    equal, which teach nothing, make room for others, in up to four rounds.
    """
    share, G, parts, seen, left = rt.share(cfg.batch_size), cfg.samples, [], [], cfg.batch_size
    for _ in range(4 if cfg.dynamic_sampling else 1):
        items = [problems[i] for i in sampler.take(cfg.batch_size)[share]]
        noise = torch.rand(cfg.batch_size, G, cfg.max_new_tokens, dtype=torch.float64)
        part = sampling.rollout(policy, items, noise[share].flatten(0, 1).to(rt.device))
        seen.append(part)
        unequal = ~equal_groups(part.rewards, G)
        left -= rt.sum(unequal.sum().item())
        if cfg.dynamic_sampling:
            unequal[0] |= not parts and not unequal.any()  # no process may be left without any
        else:
            unequal[:] = True
        if unequal.any():
            parts.append(part.select(unequal.repeat_interleave(G).nonzero()[:, 0]))
        if left <= 0:
            break
    return Rollout.join(parts), figures_of(rt, Rollout.join(seen), G)


def equal_groups(rewards, G):
    """True for each group whose rewards are all the same, (N,)."""
    groups = rewards.view(-1, G)
    return (groups == groups[:, :1]).all(1)


def figures_of(rt, rollout, G):
    """Means over all answers of all processes."""
    n = rt.sum(len(rollout.rewards))
    equal = equal_groups(rollout.rewards, G)
    return {
        "reward": rt.sum(rollout.rewards.sum().item()) / n,
        "accuracy": rt.sum(rollout.right.sum().item()) / n,
        "equal_groups": rt.sum(equal.sum().item()) / (n / G),
        "length": rt.sum(rollout.mask.sum().item()) / n,
        "truncated": 1 - rt.sum(rollout.ended.sum().item()) / n,
    }


# --- training ------------------------------------------------------------------------------------


def check_flags(cfg):
    """Refuse settings with which nothing could be learnt."""
    if cfg.samples < 2:
        raise UserError("--samples 1 makes no group to compare with; use two or more")
    if cfg.temperature == 0:
        raise UserError("--temperature 0 gives a group of equal answers; use 1")
    if cfg.overlong_buffer > cfg.max_new_tokens:
        raise UserError(
            f"--overlong_buffer {cfg.overlong_buffer} is longer than the longest answer, "
            f"--max_new_tokens {cfg.max_new_tokens}: even an empty one would pay"
        )
    if not REWARDS:
        raise UserError("REWARDS in train_grpo.py is empty, so that all answers are worth the same")
    check_knowledge(cfg)


def main(cfg):
    check_flags(cfg)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.init, cfg.out)
    policy, tokenizer = load_model(cfg.init)
    start_adapter(policy, cfg, rt)
    if isinstance(policy, VLM) and not cfg.adapter:
        policy.train_parts(language=True)  # and the projector
    ref = reference(policy) if cfg.kl_coef else None
    if cfg.data == "pictures":
        store_of(policy)  # refuses a model without eyes before pictures are painted
    train, val = load_problems(cfg)
    problems = train + val
    with_pictures = any(item.get("images") for item in problems)
    if with_pictures and cfg.template != "chat":
        raise UserError(f"--template {cfg.template} shows no pictures, but problems have; use chat")
    sampling = Sampling(cfg, tokenizer, policy if with_pictures else None)
    check_room(policy, list(map(sampling.ask, problems)), cfg.max_new_tokens, problems)

    run = Run(cfg, rt, cfg.steps)
    called = rt.prepare(policy)
    policy.model.checkpoint_activations = cfg.checkpoint_activations
    if ref is not None:
        rt.prepare(ref, train=False)
    optimizers = build_optimizers(
        policy, cfg.optimizer, cfg.lr, cfg.adam_lr, weight_decay=0.0, betas=(0.9, 0.95)
    )
    sampler = Sampler(len(train), cfg.seed)
    scaler, trained = rt.scaler(), [policy, optimizers, [sampler]]
    saved = run.restore(*trained, scaler)
    items = first_of_each_family(val, cfg.eval_items)
    measure = partial(evaluate, cfg, run, policy, sampling, items)
    before = saved.get("before") or measure(cfg.eval_samples)
    after = saved.get("after", before)

    while run.step < cfg.steps:
        optimizers.schedule(trapezoid(run.step, cfg.steps, cfg.warmup))
        rollout, sampled = sample_batch(cfg, rt, policy, sampling, train, sampler)
        seen = update(cfg, rt, called, ref, optimizers, scaler, rollout)
        run.check_finite(seen["loss"])
        run.advance()
        run.log(seen.pop("tokens"), show=("reward", "accuracy"), **sampled, **seen)
        last = run.step == cfg.steps
        if run.step % cfg.eval_every == 0 or last:
            after = measure(cfg.eval_samples if last else 1)
            run.export(policy, tokenizer)
            run.checkpoint(*trained, scaler, before=before, after=after)
    finish(rt, run, before, after)


def update(cfg, rt, called, ref, optimizers, scaler, rollout):
    """The inner updates on one batch of answers; returns what was seen, as means."""
    variant, rows, mask = VARIANTS[cfg.loss], rollout.rows, rollout.mask
    parts = rows.real.sum(1).argsort().chunk(cfg.accumulate)
    counts = Counts(rt.sum(len(rows)), rt.sum(mask.sum().item()), cfg.max_new_tokens)
    low, high = cfg.clip_low, cfg.clip_high
    clip = [own if given is None else given for given, own in zip((low, high), variant.clip)]
    ref_logprobs = look_back(ref, rows, parts, cfg.temperature) if ref is not None else None
    old = torch.zeros(mask.shape, device=rt.device)
    if variant.kl_in_reward and ref is not None:
        old = look_back(called, rows, parts, cfg.temperature)
    A = advantages_of(cfg, variant, rollout, old, ref_logprobs, rt.sum)
    seen = {"loss": 0.0, "grad_norm": 0.0, "clip_fraction": 0.0}
    for inner in range(cfg.inner_updates):
        for i, numbers in enumerate(parts):
            part = rows.rows(numbers)
            width = part.mask.shape[1] - 1  # columns of padding, all on the right, are left out
            with rt.accumulating(called, more=i + 1 < len(parts)):
                logprobs = reply_logprobs(called, part, cfg.temperature)
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
        norm = nn.utils.clip_grad_norm_(called.parameters(), cfg.clip or math.inf)
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


@torch.no_grad()
def look_back(model, rows, parts, temperature):
    """Logprobs (B, T - 1) of the answers, part by part."""
    out = torch.zeros(rows.mask[:, 1:].shape, device=rows.mask.device)
    for numbers in parts:
        logprobs = reply_logprobs(model, rows.rows(numbers), temperature)
        out[numbers, : logprobs.shape[1]] = logprobs
    return out


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


def evaluate(cfg, run, policy, sampling, items, samples=1):
    """Greedy accuracy on held-out problems; with `samples` also pass@k and maj@k."""
    policy.eval()
    greedy, sampled = sampling.replies(policy, items), None
    if samples > 1:
        generator = torch.Generator(policy.device).manual_seed(cfg.seed)
        sampled = sampling.replies(policy, items, samples, 1.0, generator)
    policy.train()
    figures = sampled_figures(items, greedy, sampled)
    run.log(val_accuracy=figures["all"]["greedy"], show=("val_accuracy",))
    first = {item["family"]: (item, reply) for item, reply in zip(items[::-1], greedy[::-1])}
    run.write_sample(
        "\n".join(f"{i['messages'][-1]['content']}\n    {reply}" for i, reply in first.values())
    )
    return figures


def finish(rt, run, before, after):
    """Print what the rewards have changed, and keep it in result.json."""
    run.close()
    run.draw_curves("reward", "accuracy", "val_accuracy", x_label="update", y_label="share")
    rt.print(figures_table({"before": before, "after": after}))
    run.write_result(before=before, after=after, **run.speed())
    rt.print(f"{run.folder}: {run.step} updates in {run.elapsed:.0f} s")
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
