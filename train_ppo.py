"""PPO: sample completions, score them, and make those better than expected more likely.

    R_t = -beta (log pi(y_t) - log ref(y_t)),  + score at the last token         arXiv:2203.02155
    delta_t = R_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1}   GAE, 1506.02438
    policy loss = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = pi / pi_old  1707.06347
    value loss = 0.5 mean max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2),  G = A + V_old
    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)              1909.08593

Advantages are whitened over the batch. A completion without its end token gets a fixed penalty instead
of its score. The score comes from a reward model, or from rules on the text (ReFT, 2401.08967).
The critic is a copy of the reward model, a value head on the policy (shared), or none: then the
baseline is the mean over the prompt's other samples, or over the batch where a prompt has one.
The KL term is k1 inside the reward, where the policy gradient makes it the reverse KL's.

Run     python train_ppo.py
        python train_ppo.py --kl_coef 0 --kl_target 0 --lr 1e-3 --steps 60 --out runs/too_far
        python train_ppo.py --preset reft --out runs/reft           # from runs/cot, rule rewards
Needs   runs/sft and runs/rm                       (python train_sft.py && python train_rm.py)
Expect  see README.md: gold score on held-out prompts, with the KL that it cost. The second command
        goes too far on purpose: the learned reward goes on rising while the gold falls
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn

from nanollm.batches import Sampler, last_true
from nanollm.config import UserError, cli
from nanollm.generate import check_room
from nanollm.gpt import Linear
from nanollm.hub import load_model, load_scalar
from nanollm.logprobs import completion_logprobs
from nanollm.optim import build_optimizers
from nanollm.peft.adapters import reference, start_adapter
from nanollm.ppo_runs import evaluate, finish, load_prompts, rollout_figures
from nanollm.preferences import judge, load_scorer, prompt_ids, scores
from nanollm.rewards import reft_reward
from nanollm.rollouts import Answers, draw_noise, sample_answers
from nanollm.run import Run, check_folders
from nanollm.runtime import start


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; reft: problems, rewarded by rules;
    # gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Data
    init: str = "runs/sft"  # run folder or model folder to start from; also the reference
    # village: its prompts; problems: its problems; or JSONL of prompts, preferences or problems
    data: str = "village"
    val_fraction: float = 0.05  # share of --data that is held out
    prompts: int = 3000  # use at most this many of the prompts
    # -- Reward
    reward: Literal["model", "rules"] = "model"  # model: --reward_model; rules: the answer's check
    reward_model: str = "runs/rm"  # run folder of train_rm.py
    truncation_reward: float = (
        -6.0
    )  # the score of a completion that doesn't end within --max_new_tokens
    # separate: a copy of the reward model; shared: a value head on the policy; none: no critic
    critic: Literal["separate", "shared", "none"] = "separate"
    # -- KL to the reference
    kl_coef: float = 0.1  # beta at the start
    kl_target: float = 6.0  # nats per completion that beta is steered to; 0: beta stays as it is
    kl_horizon: float = 2000.0  # how slowly: completions
    # -- PPO
    batch_size: int = 64  # prompts per update, over all processes
    samples: int = 1  # completions per prompt
    max_new_tokens: int = 64  # longest completion
    temperature: float = 1.0  # of sampling and of training
    epochs: int = 2  # passes over the batch per update
    minibatches: int = 2  # optimizer steps per pass
    clip_range: float = 0.2  # eps of the policy
    value_clip: float = 0.2  # eps of the value
    value_coef: float = 0.1  # weight of the value loss
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of GAE
    # -- Adapter
    # freeze the model and train an adapter only: lora, dora, qlora, adapter, prefix, ptuning or
    # prompt (nanollm/peft/adapters.py); default: all weights are trained
    adapter: str | None = None
    rank: int = 16  # r of lora, dora and qlora; width of a bottleneck adapter
    alpha: float = 32.0  # lora, dora, qlora: what they learn counts alpha / r
    # -- Training
    out: str = "runs/ppo"  # run folder to write
    steps: int = 30  # updates, each with a batch of new completions
    lr: float = 3e-4  # learning rate of AdamW
    warmup: int = 5  # updates of linear warm-up
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 10  # updates between evaluations, each followed by a checkpoint
    eval_prompts: int = 200  # held-out prompts that are answered at every evaluation
    # -- Machine
    seed: int = 0  # of the sampling and the order of the prompts
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    # precision of the layers; weights stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


PRESETS = {
    "smoke": {
        "steps": 4,
        "batch_size": 8,
        "max_new_tokens": 16,
        "eval_every": 2,
        "eval_prompts": 20,
    },
    "tiny": {},
    "reft": {
        "init": "runs/cot",
        "data": "problems",
        "prompts": 9000,
        "reward": "rules",
        "critic": "shared",
        "truncation_reward": 0.0,
        "kl_coef": 0.01,
        "kl_target": 0.0,
        "batch_size": 256,
        "max_new_tokens": 112,
        "epochs": 1,
        "steps": 25,
        "out": "runs/reft",
    },
    "gpu": {"batch_size": 512, "steps": 200, "minibatches": 8, "lr": 1e-5},
}


# --- algorithm: B completions, T tokens; entry t of (B, T - 1) belongs to tokens[:, t + 1] -----------


def token_rewards(logprobs, ref_logprobs, scores, mask, beta):
    """R_t: minus beta times the KL of each token, plus the score (B,) at the last; (B, T - 1)."""
    rewards = -beta * (logprobs - ref_logprobs) * mask
    return rewards.scatter_add(1, last_true(mask)[:, None], scores[:, None])


def gae(rewards, values, mask, gamma, lam):
    """(advantages, returns), (B, T - 1) each: generalised advantage estimation.

    V after the end is 0. The tokens of a completion follow one another; outside of the mask both are 0.
    """
    advantages = torch.zeros_like(rewards)
    A = V_next = torch.zeros(len(rewards), device=rewards.device)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * V_next - values[:, t]
        A = (delta + gamma * lam * A) * mask[:, t]
        V_next = values[:, t] * mask[:, t]
        advantages[:, t] = A
    return advantages, (advantages + values) * mask


def baseline_advantages(rewards, mask, samples):
    """Without a critic: the return from each token on, less the mean return of the other completions.

    The others are the prompt's `samples` - 1 further ones, or all of the batch where samples is 1
    (leave-one-out baseline; Ahmadian et al. 2024, arXiv:2402.14740).
    """
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    total = (rewards * mask).sum(1)
    groups = total.view(-1, samples) if samples > 1 else total[None]
    G = groups.shape[1]
    others = (groups.sum(1, keepdim=True) - groups) / max(1, G - 1)
    return (to_go - others.reshape(-1, 1)) * mask


def whiten(x, mask, total=lambda value: value):
    """(x - mean) / std over the real tokens; `total` sums a number over processes."""
    n = total(mask.sum().item())
    mean = total((x * mask).sum().item()) / n
    variance = total((((x - mean) * mask) ** 2).sum().item()) / n
    return (x - mean) / math.sqrt(variance + 1e-8) * mask


def policy_loss(logprobs, old_logprobs, advantages, eps):
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) of every token."""
    rho = torch.exp(logprobs - old_logprobs)
    return torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - eps, 1 + eps))


def value_loss(values, old_values, returns, eps):
    """0.5 max((V - G)^2, (V_old + clip(V - V_old) - G)^2) of every token."""
    clipped = old_values + (values - old_values).clamp(-eps, eps)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


class AdaptiveKL:
    """Ziegler et al.'s proportional controller of beta; a target of 0 leaves beta as it is."""

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, n):
        """kl: nats per completion, over n completions."""
        if self.target:
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.coef *= 1 + error * n / self.horizon


# --- policy and critic ---------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Policy and critic in one module, so that one data-parallel wrapper holds both."""

    def __init__(self, policy, critic=None, shared=False):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.value_head = Linear(policy.cfg.hidden_size, 1, bias=False) if shared else None
        if shared:
            nn.init.zeros_(self.value_head.weight)

    def forward(self, rows, temperature, with_entropy=False):
        """(what completion_logprobs gives, values or None): (B, T - 1) each."""
        policy, values = self.policy, None
        if self.value_head is not None:
            hidden = policy.hidden(*rows.inputs())
            policy, values = _HeadOnly(policy, hidden), self.value_head(hidden.float())[:, :-1, 0]
        elif self.critic is not None:
            values = self.critic(*rows.inputs())[:, :-1]
        return completion_logprobs(policy, rows, temperature, with_entropy), values


class _HeadOnly:
    """The policy's head on hidden states that are there already."""

    def __init__(self, policy, hidden):
        self.policy, self.hidden = policy, hidden

    def __call__(self, tokens, positions, mask, where):
        return self.policy.head(self.hidden[where])


# --- sampling ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Completions and all that an update needs to know of them; (B, T - 1) where nothing is said."""

    answers: Answers
    scores: torch.Tensor  # (B,) as trained on
    logprobs: torch.Tensor  # of the policy that sampled
    ref_logprobs: torch.Tensor
    values: torch.Tensor  # of the critic then; zeros without one
    entropy: torch.Tensor

    @property
    def mask(self):
        return self.answers.rows.mask[:, 1:]

    @property
    def kl(self):
        """Nats per completion, (B,)."""
        return ((self.logprobs - self.ref_logprobs) * self.mask).sum(1)


def rewards_of(reward_model, answers):
    """The reward of each completion, (B,): a model's at the last token, or by rules on the text."""
    if reward_model is not None:
        return scores(reward_model, answers.rows)
    rewards = list(map(reft_reward, answers.examples, answers.texts))
    return torch.tensor(rewards, device=answers.ended.device)


@torch.no_grad()
def sample_rollout(cfg, actor, ref, reward_model, tokenizer, examples, noise):
    """Sample completions to the items with this noise (B, max_new_tokens), score them, look back."""
    prompts = prompt_ids(examples, tokenizer)
    answers = sample_answers(cfg, actor.policy, tokenizer, examples, prompts, noise)
    rows = answers.rows
    (logprobs, entropy), values = actor(rows, cfg.temperature, with_entropy=True)
    return Rollout(
        answers,
        torch.where(answers.ended, rewards_of(reward_model, answers), cfg.truncation_reward),
        logprobs,
        completion_logprobs(ref, rows, cfg.temperature),
        torch.zeros_like(logprobs) if values is None else values * rows.mask[:, 1:],
        entropy,
    )


def advantages_of(cfg, rollout, beta, total):
    """(whitened advantages, returns), (B, T - 1)."""
    mask = rollout.mask
    rewards = token_rewards(rollout.logprobs, rollout.ref_logprobs, rollout.scores, mask, beta)
    if cfg.critic == "none":
        advantages = baseline_advantages(rewards, mask, cfg.samples)
        returns = torch.zeros_like(advantages)
    else:
        advantages, returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.lam)
    return whiten(advantages, mask, total), returns


# --- training ------------------------------------------------------------------------------------


def update(cfg, rt, ddp_model, model, optimizers, scaler, rollout, advantages, returns):
    """Epochs of minibatches over one batch of completions; returns means of what was seen."""
    seen = {}
    B = len(rollout.scores)
    for _ in range(cfg.epochs):
        for numbers in torch.randperm(B).chunk(cfg.minibatches):
            numbers = numbers.to(rt.device)
            rows = rollout.answers.rows[numbers]
            width = rows.mask.shape[1] - 1  # rows() leaves out columns of padding, all on the right
            mask, old, A, G, V_old = (
                x[numbers][:, :width]
                for x in (rollout.mask, rollout.logprobs, advantages, returns, rollout.values)
            )
            count = rt.sum(mask.sum().item())
            logprobs, values = ddp_model(rows, cfg.temperature)
            loss = (policy_loss(logprobs, old, A, cfg.clip_range) * mask).sum() / count
            errors = 0.0
            if values is not None:
                errors = (value_loss(values, V_old, G, cfg.value_clip) * mask).sum() / count
            scaler.scale((loss + cfg.value_coef * errors) * rt.world).backward()
            optimizers.unscale(scaler)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            optimizers.step(scaler)
            optimizers.zero_grad()
            with torch.no_grad():
                log_rho = (logprobs - old)[mask]
                part = {
                    "policy_loss": loss.item(),
                    "value_loss": float(errors),
                    "clip_fraction": (log_rho.exp() - 1).abs().gt(cfg.clip_range).float().mean(),
                    "approximate_kl": (log_rho.exp() - 1 - log_rho).mean(),  # k3, Schulman
                    "grad_norm": norm.item(),
                }
            for name, value in part.items():
                seen.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in seen.items()}


def main(cfg):
    if cfg.temperature == 0:
        raise UserError(
            "--temperature 0 samples one completion only, with nothing to explore; use 1"
        )
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.init, cfg.out)
    if cfg.reward == "model":
        check_folders(cfg.reward_model, cfg.out)
    policy, tokenizer = load_model(cfg.init)
    start_adapter(policy, cfg, rt)
    ref, reward_model, critic = reference(policy), None, None
    if cfg.reward == "model":
        reward_model = load_scorer(cfg.reward_model, tokenizer, cfg.init, rt)
    train, val = load_prompts(cfg)
    prompts = prompt_ids(train + val, tokenizer)
    check_room(policy, prompts, cfg.max_new_tokens, train + val)
    if cfg.critic == "separate":
        critic = load_scalar(cfg.reward_model if cfg.reward == "model" else cfg.init)[0]
        start_adapter(critic, cfg, rt)
        critic.compute_dtype = rt.dtype

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    model = ActorCritic(policy, critic, cfg.critic == "shared")
    policy.model.checkpoint_activations = cfg.checkpoint_activations
    policy.compute_dtype = rt.dtype
    ddp_model = rt.prepare(model)
    rt.prepare(ref, train=False)
    optimizers = build_optimizers(
        model, "adamw", lr=cfg.lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-5
    )
    sampler = Sampler(len(train), cfg.seed)
    control = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    scaler, trained = rt.scaler(), [model, optimizers, [sampler]]
    saved = run.restore(*trained, scaler)
    control.coef = saved.get("kl_coef", control.coef)
    examples = val[: cfg.eval_prompts]
    ref_golds = judge(ref, tokenizer, examples, None, None, cfg.max_new_tokens, seed=cfg.seed)[2]
    measure = partial(evaluate, cfg, run, policy, tokenizer, ref, reward_model, examples, ref_golds)
    before = saved.get("before") or measure()
    after = saved.get("after", before)

    while run.step < cfg.steps:
        optimizers.schedule(min(1.0, (run.step + 1) / max(1, cfg.warmup)))
        chosen = [train[i] for i in sampler.take(cfg.batch_size)[share]]
        noise = draw_noise(cfg, rt)
        rollout = sample_rollout(cfg, model, ref, reward_model, tokenizer, chosen, noise)
        advantages, returns = advantages_of(cfg, rollout, control.coef, rt.sum)
        seen = update(cfg, rt, ddp_model, model, optimizers, scaler, rollout, advantages, returns)
        run.check_finite(seen["policy_loss"] + seen["value_loss"])
        figures = rollout_figures(cfg, rt, rollout, returns)
        control.update(figures["kl"], cfg.batch_size * cfg.samples)
        run.advance()

        tokens = figures["length"] * cfg.batch_size * cfg.samples
        run.log(tokens, show=("reward", "kl"), **figures, **seen, kl_coef=control.coef)
        if run.step % cfg.eval_every == 0 or run.step == cfg.steps:
            after = measure()
            run.export(policy, tokenizer)
            run.checkpoint(*trained, scaler, kl_coef=control.coef, before=before, after=after)
    finish(cfg, rt, run, before, after)


if __name__ == "__main__":
    cli(main, Config, PRESETS)
