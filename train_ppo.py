"""PPO: sample completions, score them, and make those better than expected more likely.

    R_t = -beta (log pi(y_t) - log ref(y_t)),  + score at the last token         arXiv:2203.02155
    delta_t = R_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1}   GAE, 1506.02438
    policy loss = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = pi / pi_old  1707.06347
    value loss = 0.5 mean max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2),  G = A + V_old
    loss = policy loss + value_coef * value loss
    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)              1909.08593

A is whitened over the batch, in the policy loss only. A completion without its end token gets a
fixed reward (--truncation_reward) instead of its score, which comes from a reward model, or from
rules on the text (ReFT, 2401.08967). The critic is a copy of the reward model (with rules: of
--init, with a new head), a value head on the policy (shared), or none: then gamma and lambda are
unused, and the baseline is the mean over the prompt's other samples, or over the batch where a
prompt has one. The KL term (k1) is part of the reward, so its gradient is that of the reverse KL.
InstructGPT's mixing in of pretraining gradients (PPO-ptx) is left out.

Run     python train_ppo.py
        python train_ppo.py --kl_coef 0 --kl_target 0 --lr 1e-3 --steps 60 --out runs/too_far
        python train_ppo.py --preset reft                           # from runs/cot, rule rewards
Needs   runs/sft and runs/rm                       (python train_sft.py && python train_rm.py)
Expect  gold score 0.68 -> 0.96 on held-out prompts with bf16, 0.69 -> 0.90 in fp32 (seed 0), at a
        KL near kl_target. The second command goes too far on purpose: the learned reward goes on
        rising while the gold falls
Watch   reward      mean score, rises; val_gold, where there is one, must rise with it, or the
                    policy has found the reward model's errors (reward_over_kl.svg)
        kl          nats per completion to the reference, is held near kl_target by kl_coef (beta);
                    running away: lower the learning rate, raise --kl_coef
        entropy     nats per token; near 0: nothing is explored any more
        length, ended    tokens of a completion, and the share that ends its turn: near 1
        explained_variance   of the returns by the critic: rises above 0.5; below 0 for long: the
                    critic doesn't learn, raise --value_coef or --lr
        policy_loss near 0, since advantages have mean 0; value_loss falls
        clip_fraction, approximate_kl   share of tokens beyond the clip range, and how far the
                    update has gone (k3): below 0.2 and 0.05; above: lower --lr, fewer --epochs
        grad_norm   mean over the minibatches: about 1; spikes: lower --lr
        val_...     of completions of held-out prompts, sampled at temperature 1, unfinished ones
                    scored as they are; val_win_rate: over the reference, by gold
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn

from data.village import examples as village
from data.village.preferences import gold_of
from nanollm.batches import Sampler, last_true
from nanollm.config import (
    LARGE,
    AdapterConfig,
    NotNegative,
    OpenShare,
    Positive,
    Share,
    TrainConfig,
    Whole,
    atomic_write,
    cli,
)
from nanollm.formats import need, read_parts
from nanollm.gpt import Linear
from nanollm.hub import load_model, load_scalar, save_model
from nanollm.logprobs import completion_logprobs
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.peft.adapters import reference, start_adapter
from nanollm.plot import line_chart
from nanollm.preferences import (
    dialogue_rows,
    finish,
    load_scorer,
    measure_completions,
    sample_text,
    scores,
    win_rate,
)
from nanollm.records import read_prompts
from nanollm.rewards import accuracy, reft_reward
from nanollm.rollouts import RolloutRows, chat_prompt, moments, sample_rows, whiten, with_room
from nanollm.run import Run, check_folders, effect, read_metrics
from nanollm.runtime import start


@dataclass
class Config(AdapterConfig, TrainConfig):
    # -- Data
    init: str = "runs/sft"  # run folder or model folder to start from; also the reference
    # village: its prompts; problems: its problems; or JSONL of prompts, preferences or problems
    data: str = "village"
    val_fraction: OpenShare = 0.05  # share of --data that is held out
    prompts: Whole[1] = 3000  # use at most this many of the prompts
    # -- Reward
    reward: Literal["model", "rules"] = "model"  # model: --reward_model; rules: the answer's check
    reward_model: str = "runs/rm"  # run folder of train_rm.py
    truncation_reward: float = -6.0  # of a completion that doesn't end within --max_new_tokens
    # separate: a copy of the reward model, or with --reward rules of --init with a new head;
    # shared: a value head on the policy; none: no critic
    critic: Literal["separate", "shared", "none"] = "separate"
    # -- KL to the reference
    kl_coef: NotNegative = 0.1  # beta at the start
    kl_target: NotNegative = 6.0  # nats per completion to steer beta to; 0: beta stays as it is
    # -- PPO
    samples: Whole[1] = 1  # completions per prompt
    max_new_tokens: Whole[1] = 64  # longest completion
    temperature: Positive = 1.0  # of sampling and of training
    epochs: Whole[1] = 2  # passes over the batch per update
    minibatches: Whole[1] = 2  # optimizer steps per pass
    clip_range: Positive = 0.2  # eps, of the policy and of the value
    value_coef: NotNegative = 0.1  # weight of the value loss
    gamma: Share = 1.0  # discount; unused without a critic
    lam: Share = 0.95  # lambda of GAE; unused without a critic
    # -- Training
    out: str = "runs/ppo"
    steps: int = 30  # updates, each with a batch of new completions
    batch_size: int = 64  # prompts per update, over all processes
    accumulate: int = 1  # parts that a process splits a minibatch into, to save memory
    optimizer: str = "adamw"
    lr: float = 3e-4
    muon_lr: float = 1e-3
    schedule: str = "constant"
    warmup: int = 5
    eval_every: int = 10
    eval_prompts: Whole[1] = 200  # held-out prompts that are answered at every evaluation


PRESETS = {
    "smoke": dict(steps=4, batch_size=8, max_new_tokens=16, eval_every=2, eval_prompts=20),
    "reft": dict(init="runs/cot", data="problems", prompts=9000, out="runs/reft")
    | dict(reward="rules", critic="shared", truncation_reward=0.0, kl_coef=0.01, kl_target=0.0)
    | dict(batch_size=256, max_new_tokens=112, epochs=1, steps=25),
    "gpu": dict(batch_size=512, steps=200, minibatches=8, lr=1e-5),
    # rate and schedule of Llama 2's (Touvron et al. 2023, arXiv:2307.09288, section 3.2.3). Policy
    # and critic take 16 bytes per parameter each, reference and reward model 4: --adapter lora, or
    # --critic shared, takes less
    "downloaded": dict(LARGE, schedule="constant", max_new_tokens=256, steps=100, accumulate=16)
    | dict(epochs=1, lr=1e-6),
}
KL_HORIZON = 2000  # completions: how slowly beta is steered to kl_target


# --- data ----------------------------------------------------------------------------------------


def load_prompts(cfg):
    """(training prompts, held-out prompts); with rules those that have an answer to check."""
    read = partial(read_prompts, answered=cfg.reward == "rules")
    if cfg.data not in ("village", "problems"):
        return read_parts(read, cfg.data, None, cfg.val_fraction, cfg.prompts)
    name, folder = "prompts" if cfg.data == "village" else "problems", village.of_run(cfg.init)
    train, val = (read(folder / f"{name}_{split}.jsonl") for split in ("train", "test"))
    return train[: cfg.prompts], val


# --- algorithm: B completions, T tokens; entry t of (B, T - 1) belongs to tokens[:, t + 1] --------


def token_rewards(logprobs, ref_logprobs, score, mask, beta):
    """R_t: minus beta times the KL of each token, plus the score (B,) at the last; (B, T - 1)."""
    rewards = -beta * (logprobs - ref_logprobs) * mask
    return rewards.scatter_add(1, last_true(mask)[:, None], score[:, None])


def gae(rewards, values, mask, gamma, lam):
    """(advantages, returns), (B, T - 1) each, 0 outside of the mask; V after the end is 0."""
    advantages = torch.zeros_like(rewards)
    A = V_next = torch.zeros(len(rewards), device=rewards.device)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * V_next - values[:, t]
        A = (delta + gamma * lam * A) * mask[:, t]
        V_next = values[:, t] * mask[:, t]
        advantages[:, t] = A
    return advantages, (advantages + values) * mask


def baseline_advantages(rewards, mask, samples, total=float):
    """Without a critic: the return from each token on, less the mean return of the others: of the
    prompt's further completions, or where `samples` is 1 of all of the batch (leave-one-out
    baseline; Ahmadian et al. 2024, arXiv:2402.14740).
    """
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    own = (rewards * mask).sum(1)
    if samples > 1:
        sums, n = own.view(-1, samples).sum(1).repeat_interleave(samples), samples
    else:
        sums, n = total(own.sum()), total(len(own))
    others = (sums - own) / max(1, n - 1)
    return (to_go - others[:, None]) * mask


def policy_loss(logprobs, old_logprobs, advantages, eps):
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) of every token."""
    rho = torch.exp(logprobs - old_logprobs)
    return torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - eps, 1 + eps))


def value_loss(values, old_values, returns, eps):
    """0.5 max((V - G)^2, (V_old + clip(V - V_old) - G)^2) of every token."""
    clipped = old_values + (values - old_values).clamp(-eps, eps)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def adapted_beta(beta, kl, n, target, horizon):
    """Ziegler et al.'s controller: kl nats per completion, over n; a target of 0 keeps beta."""
    error = min(0.2, max(-0.2, kl / target - 1)) if target else 0.0
    return beta * (1 + error * n / horizon)


class ActorCritic(nn.Module):
    """Policy and critic in one module, so that one data-parallel wrapper holds both."""

    def __init__(self, policy, critic=None, shared=False):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.value_head = Linear(policy.cfg.hidden_size, 1, bias=False) if shared else None
        if shared:
            nn.init.zeros_(self.value_head.weight)

    def forward(self, rows, temperature, with_entropy=False):
        """(what completion_logprobs gives, values, 0 without a critic): (B, T - 1) each."""
        policy, values = self.policy, torch.zeros(rows.mask[:, 1:].shape, device=rows.mask.device)
        if self.value_head is not None:  # both heads read the same hidden states
            hidden = policy.hidden(*rows.inputs())
            values = self.value_head(hidden.float())[:, :-1, 0]
            # what completion_logprobs calls as a model: the head alone, on states already there
            policy = lambda *_, where: self.policy.head(hidden[where])  # noqa: E731
        elif self.critic is not None:
            values = self.critic(*rows.inputs())[:, :-1]
        return completion_logprobs(policy, rows, temperature, with_entropy), values


# --- sampling ------------------------------------------------------------------------------------


@dataclass
class Rollout(RolloutRows):
    """Sampled completions and what an update needs to know; (B, T - 1) unless noted."""

    ended: torch.Tensor  # (B,) bool
    scores: torch.Tensor  # (B,) as trained on
    logprobs: torch.Tensor  # of the policy that sampled
    entropy: torch.Tensor
    values: torch.Tensor  # the critic's, at sampling time
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


@torch.no_grad()
def sample_rollout(cfg, rt, actor, ref, reward_model, tokenizer, examples):
    """Sample completions of this process's prompts, and score them."""
    prompts = [chat_prompt(example, tokenizer) for example in examples]
    sampled = sample_rows(cfg, rt, actor.policy, tokenizer, examples, prompts)
    rows = sampled.rows
    if cfg.reward == "rules":
        raw_scores = list(map(reft_reward, sampled.examples, sampled.texts))
        raw_scores = torch.tensor(raw_scores, device=rt.device)
    else:
        context = reward_model.cfg.max_position_embeddings
        dialogues = dialogue_rows(sampled.prompts, sampled.completions, tokenizer, context)
        raw_scores = scores(reward_model, dialogues.to(rt.device))
    (logprobs, entropy), values = actor(rows, cfg.temperature, with_entropy=True)
    return Rollout(
        rows,
        sampled.ended,
        torch.where(sampled.ended, raw_scores, cfg.truncation_reward),
        logprobs,
        entropy,
        values * rows.mask[:, 1:],
        completion_logprobs(ref, rows, cfg.temperature),
    )


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, cfg.init, cfg.reward_model if cfg.reward == "model" else None)
    policy, tokenizer = load_model(cfg.init)
    start_adapter(policy, cfg, rt)
    ref = rt.prepare(reference(policy), train=False)
    reward_model = critic = None
    if cfg.reward == "model":
        reward_model = load_scorer(cfg.reward_model, tokenizer, cfg.init, rt)
    train, val = load_prompts(cfg)
    sees = policy.tokens_per_image or any(example.get("images") for example in train + val)
    need(
        not sees, f"--init {cfg.init}, --data {cfg.data}", "PPO reads no images; use train_grpo.py"
    )
    room = policy, cfg.max_new_tokens, "prompts"
    train, val = (with_room(x, lambda e: chat_prompt(e, tokenizer), *room) for x in (train, val))
    if cfg.critic == "separate":
        origin = cfg.reward_model if cfg.reward == "model" else cfg.init
        critic, _ = load_scalar(origin)
        start_adapter(critic, cfg, rt, origin)

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt)
    model = ActorCritic(policy, critic, cfg.critic == "shared")
    ddp_model = rt.prepare(model, cfg.compile)
    for each in filter(None, (policy, critic)):  # prepare has set its precision on `model` alone
        each.compute_dtype = rt.dtype
        each.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler, eps=1e-5)  # as in public PPO implementations
    schedule, sampler = SCHEDULES[cfg.schedule], Sampler(len(train), cfg.seed)
    gold, examples = gold_of(train + val), val[: cfg.eval_prompts]
    measure = partial(evaluate, cfg, run, policy, tokenizer, ref, reward_model, gold, examples)
    saved = run.restore(model, optimizer, sampler)
    if not saved:
        before, golds = measure()
        saved = {"before": before, "golds": golds, "beta": cfg.kl_coef}

    while run.step < cfg.steps:
        prompts, beta = [train[i] for i in sampler.take(cfg.batch_size)[share]], saved["beta"]
        rollout = sample_rollout(cfg, rt, model, ref, reward_model, tokenizer, prompts)
        estimate_advantages(cfg, rollout, beta, rt.sum)
        stats, n = rollout_stats(cfg, rollout, rt.sum), cfg.batch_size * cfg.samples
        factor = schedule(run.step, cfg.steps, cfg.warmup)
        stats |= update(cfg, rt, ddp_model, optimizer, rollout, factor)
        saved["beta"] = adapted_beta(beta, stats["kl"], n, cfg.kl_target, KL_HORIZON)
        num_tokens = stats["length"] * n * cfg.epochs
        run.advance(num_tokens, every=1, show=("reward", "kl"), kl_coef=saved["beta"], **stats)

        if run.due(cfg.eval_every):
            saved["after"], _ = measure(saved["golds"])
            run.export(save_model, policy, tokenizer)
            run.checkpoint(**saved)
    curves = ("reward", "val_gold", "val_accuracy", "kl")
    run.close(*curves, x_label="update", y_label="per completion")
    if gold and rt.main:
        atomic_write(run.folder / "reward_over_kl.svg", over_optimisation_chart(run))
    before, after = saved["before"], saved["after"]
    reached = effect("reward of sampled completions", before["reward"], after["reward"])
    if cfg.reward == "rules":
        name = "right answers to held-out problems, sampled"
        reached = effect(name, before["accuracy"], after["accuracy"], "share")
    finish(rt, run, before, after, reached)  # which shows `reached` without a gold


def update(cfg, rt, ddp_model, optimizer, rollout, factor):
    """The passes over one batch; means over its tokens, of all processes."""
    sums, grad_norms, all_tokens = Counter(), [], rt.sum(rollout.mask.sum())
    for _ in range(cfg.epochs):
        for numbers in torch.randperm(len(rollout)).chunk(cfg.minibatches):
            minibatch = rollout[numbers]
            num_tokens = rt.sum(minibatch.mask.sum())
            for part in rt.micro_batches(minibatch, cfg.accumulate, ddp_model):
                logprobs, values = ddp_model(part.rows, cfg.temperature)
                losses = policy_loss(logprobs, part.logprobs, part.advantages, cfg.clip_range)
                value_losses = value_loss(values, part.values, part.returns, cfg.clip_range)
                per_token = losses + cfg.value_coef * value_losses
                rt.backward((per_token * part.mask).sum() / num_tokens)
                sums.update(update_stats(cfg, part, logprobs, losses, value_losses))
            grad_norms.append(optimizer.step(factor, cfg.grad_clip))
    stats = {name: rt.sum(x) / all_tokens / cfg.epochs for name, x in sums.items()}
    return stats | {"grad_norm": sum(grad_norms) / len(grad_norms)}


def estimate_advantages(cfg, rollout, beta, total):
    """Set the rollout's whitened advantages and returns; `total` sums a number over processes."""
    mask = rollout.mask
    rewards = token_rewards(rollout.logprobs, rollout.ref_logprobs, rollout.scores, mask, beta)
    if cfg.critic == "none":
        advantages = baseline_advantages(rewards, mask, cfg.samples, total)
        rollout.returns = torch.zeros_like(advantages)
    else:
        advantages, rollout.returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.lam)
    rollout.advantages = whiten(advantages, mask, total)


def rollout_stats(cfg, rollout, total):
    """Means over a batch of completions, of all processes."""
    mask = rollout.mask
    per_completion = {
        "reward": rollout.scores,
        "kl": ((rollout.logprobs - rollout.ref_logprobs) * mask).sum(1),
        "length": mask.sum(1),
        "ended": rollout.ended,
    }
    n, num_tokens = total(len(rollout)), total(mask.sum())
    stats = {name: total(values.sum()) / n for name, values in per_completion.items()}
    stats["entropy"] = total((rollout.entropy * mask).sum()) / num_tokens
    if cfg.critic != "none":
        critic = rollout.values, rollout.returns, mask, total
        stats["explained_variance"] = explained_variance(*critic)
    return stats


def explained_variance(values, returns, mask, total=float):
    """1 - var(G - V) / var(G) over real tokens: 1 for a perfect critic, 0 for a constant."""
    _, left = moments(returns - values, mask, total)
    return 1 - left / max(moments(returns, mask, total)[1], 1e-8)


@torch.no_grad()
def update_stats(cfg, part, logprobs, losses, value_losses):
    """Sums over the tokens of a part of a minibatch."""
    log_rho = logprobs - part.logprobs
    per_token = {
        "policy_loss": losses,
        "value_loss": value_losses,
        "clip_fraction": (log_rho.exp() - 1).abs() > cfg.clip_range,
        "approximate_kl": log_rho.exp() - 1 - log_rho,  # k3 (Schulman 2020)
    }
    return {name: (values * part.mask).sum().item() for name, values in per_token.items()}


def evaluate(cfg, run, policy, tokenizer, ref, reward_model, gold, examples, ref_golds=None):
    """(what sampled completions to held-out prompts are worth, the gold of each); logs them."""
    stats, texts, golds = measure_completions(
        policy, tokenizer, examples, ref, reward_model, gold, cfg.max_new_tokens, seed=cfg.seed
    )
    if cfg.reward == "rules":
        stats["reward"] = sum(map(reft_reward, examples, texts)) / len(examples)
        stats["accuracy"] = sum(map(accuracy, examples, texts)) / len(examples)
    if golds is not None:
        stats["win_rate"] = win_rate(golds, ref_golds or golds)
    shown = ("val_reward", "val_gold", "val_accuracy", "val_kl")
    run.evaluated(shown, **{f"val_{name}": value for name, value in stats.items()})
    run.write_sample(sample_text(examples, texts))
    return stats, golds


def over_optimisation_chart(run):
    """Learned reward and gold over KL: where they part (Gao et al. 2022, arXiv:2210.10760)."""
    records = [m for m in read_metrics(run.folder) if "val_kl" in m]
    series, first = {}, records[0]
    for label, name in (("learned reward", "val_reward"), ("gold", "val_gold")):
        series[label] = [(m["val_kl"], m[name] - first[name]) for m in records]
    title, x = "Held-out prompts: reward over KL", "KL to the reference, nats per completion"
    return line_chart(series, title, x, "gained since the start")


if __name__ == "__main__":
    cli(main, Config, PRESETS)
