"""What stands around the training loop of train_grpo.py: problems, how they are asked, figures.

    open_problems     problems to train and to evaluate on, and a Sampling that asks them
    load_problems     the village's, or those of a file
    Sampling          how problems are put to a policy, and what it answers
    figures_of        what a batch of answers was like
    evaluate, finish  what the held-out problems say, during training and after it
"""

import torch

from nanollm.config import UserError
from nanollm.evaluate import as_text, pictures_of, sample_replies, village_of, village_tools
from nanollm.figures import (
    figures_table,
    first_of_each_family,
    sample_by_family,
    sampled_figures,
)
from nanollm.formats import split_documents
from nanollm.generate import check_room
from nanollm.picture_data import read_picture_prompts, store_of
from nanollm.rollouts import sample_answers
from nanollm.templates import prompt_of
from nanollm.tools import check_knowledge


def check_flags(cfg, rewards):
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
    if not rewards:
        raise UserError("REWARDS in train_grpo.py is empty, so that all answers are worth the same")
    check_knowledge(cfg)


# --- problems ------------------------------------------------------------------------------------


def open_problems(cfg, policy, tokenizer):
    """(training problems, held-out ones to evaluate on, a Sampling that asks them); raises
    UserError where this policy can't be asked some of them.
    """
    if cfg.data == "pictures":
        store_of(policy)  # refuses a model without eyes before pictures are painted
    train, val = load_problems(cfg)
    problems = train + val
    with_pictures = any(item.get("images") for item in problems)
    if with_pictures and cfg.template != "chat":
        raise UserError(f"--template {cfg.template} shows no pictures, but problems have; use chat")
    sampling = Sampling(cfg, tokenizer, policy if with_pictures else None)
    check_room(policy, list(map(sampling.ask, problems)), cfg.max_new_tokens, problems)
    return train, first_of_each_family(val, cfg.eval_items), sampling


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


class Sampling:
    """How problems are put to a policy, and what it answers."""

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

    def answers(self, policy, items, noise):
        """rollouts.Answers to train on, with this noise (B, max_new_tokens)."""
        prompts, seen = list(map(self.ask, items)), self.look(policy, items)
        return sample_answers(
            self.cfg, policy, self.tokenizer, items, prompts, noise, self.tools, seen
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


# --- figures -------------------------------------------------------------------------------------


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
    run.write_sample(sample_by_family(items, greedy))
    return figures


def finish(rt, run, before, after):
    """Print what the rewards have changed, and keep it in result.json."""
    run.close()
    run.draw_curves("reward", "accuracy", "val_accuracy", x_label="update", y_label="share")
    rt.print(figures_table({"before": before, "after": after}))
    run.write_result(before=before, after=after, **run.speed())
    rt.print(f"{run.folder}: {run.step} updates in {run.elapsed:.0f} s")
    rt.close()
