"""What stands around the training loop of train_ppo.py: prompts, figures, charts.

load_prompts      the village's prompts or problems, or those of a file
rollout_figures   what a batch of completions was like
evaluate, finish  what completions to held-out prompts are worth, during training and after it
"""

import torch

from data import village
from data.village.preferences import gold_score
from nanollm.checkpoint import read_json
from nanollm.config import UserError, atomic_write
from nanollm.formats import read_prompts
from nanollm.plot import line_chart
from nanollm.preferences import (
    gap_closed,
    has_gold,
    judge,
    sample_text,
    train_and_held_out,
    village_prompts,
    win_rate,
)
from nanollm.rewards import accuracy, reft_reward
from nanollm.run import read_metrics

# --- prompts -------------------------------------------------------------------------------------


def load_prompts(cfg):
    """(training prompts, held-out prompts); raises UserError where rules have no answer to check."""
    if cfg.data == "village":
        train = village_prompts(cfg.init, "train", cfg.prompts)
        val = village_prompts(cfg.init, "test")
    elif cfg.data == "problems":
        files = (
            village.of_run(cfg.init) / f"problems_{split}.jsonl" for split in ("train", "test")
        )
        train, val = map(read_prompts, files)
        train = train[: cfg.prompts]
    else:
        train, val = train_and_held_out(read_prompts(cfg.data)[: cfg.prompts], cfg)
    if cfg.reward == "rules" and not all("answer" in example for example in train + val):
        raise UserError(f'--reward rules needs an "answer" in every record of {cfg.data}')
    return train, val


# --- figures -------------------------------------------------------------------------------------


def rollout_figures(cfg, rt, rollout, returns):
    """Means over the batch, of all processes: what PPO's log shows."""
    answers, mask, n = rollout.answers, rollout.mask, cfg.batch_size * cfg.samples
    tokens = rt.sum(mask.sum().item())
    figures = {
        "reward": rt.sum(rollout.scores.sum().item()) / n,
        "kl": rt.sum(rollout.kl.sum().item()) / n,
        "entropy": rt.sum((rollout.entropy * mask).sum().item()) / tokens,
        "length": tokens / n,
        "ended": rt.sum(answers.ended.sum().item()) / n,
    }
    if cfg.critic != "none":
        figures["explained_variance"] = explained_variance(rollout.values, returns, mask)
    if has_gold(answers.examples):  # to look at; nothing is trained on it
        figures["gold"] = rt.sum(sum(map(gold_score, answers.examples, answers.texts))) / n
    return figures


def explained_variance(values, returns, mask):
    """1 - var(G - V) / var(G) over real tokens: 1 for a perfect critic, 0 for a constant."""
    G, error = returns[mask], (returns - values)[mask]
    return (1 - error.var(unbiased=False) / G.var(unbiased=False).clamp(min=1e-8)).item()


@torch.no_grad()
def evaluate(cfg, run, policy, tokenizer, ref, reward_model, examples, ref_golds):
    """What sampled completions to held-out prompts are worth, by the reward and by gold."""
    policy.eval()
    figures, completions, golds = judge(
        policy, tokenizer, examples, ref, reward_model, cfg.max_new_tokens, seed=cfg.seed
    )
    if cfg.reward == "rules":
        figures["reward"] = sum(map(reft_reward, examples, completions)) / len(examples)
        figures["accuracy"] = sum(map(accuracy, examples, completions)) / len(examples)
    policy.train()
    if golds is not None:
        figures["win_rate"] = win_rate(golds, ref_golds)
    shown = ("val_reward", "val_gold", "val_accuracy", "val_kl")
    run.log(**{f"val_{name}": value for name, value in figures.items()}, show=shown)
    run.write_sample(sample_text(examples, completions))
    return figures


def over_optimisation_chart(cfg, run):
    """Learned reward and gold over the KL that they cost: where they part, the policy has learnt
    the reward model's errors (Gao et al. 2022, arXiv:2210.10760).
    """
    records = [m for m in read_metrics(run.folder) if "val_kl" in m and "val_gold" in m]
    line = None
    if cfg.reward == "model":
        line = read_json(f"{cfg.reward_model}/result.json").get("gold_line")
    a, b = line or (0.0, 1.0)
    series = {
        "learned reward": [(m["val_kl"], a + b * m["val_reward"]) for m in records],
        "gold": [(m["val_kl"], m["val_gold"]) for m in records],
    }
    title, x = "Held-out prompts: reward over KL", "KL to the reference, nats per completion"
    return line_chart(series, title, x, "on the gold's scale")


def finish(cfg, rt, run, before, after):
    """Print what the rewards have changed, and keep it in result.json."""
    run.close()
    curves = ("reward", "val_accuracy") if cfg.reward == "rules" else ("reward", "gold", "kl")
    run.draw_curves(*curves, x_label="update", y_label="per completion")
    shown = "reward accuracy kl length ended correct polite concise"
    for name in filter(before.__contains__, shown.split()):
        rt.print(f"held-out {name:8} {before[name]:9.3f} -> {after[name]:9.3f}")
    closed = {}
    if "gold" in after:
        closed = {"gap_closed": gap_closed(after["gold"], before["gold"])}
        rt.print(
            f"held-out gold     {before['gold']:9.3f} -> {after['gold']:9.3f}: "
            f"{closed['gap_closed']:.0%} of the way to the best possible; wins over the reference "
            f"{after['win_rate']:.1%}"
        )
        if rt.main:
            atomic_write(run.folder / "reward_over_kl.svg", over_optimisation_chart(cfg, run))
    run.write_result(before=before, after=after, **closed, **run.speed())
    rt.print(f"{cfg.out}: {run.step} updates in {run.elapsed:.0f} s")
    rt.close()
