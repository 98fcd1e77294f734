"""What stands around the training loop of train_grpo.py: problems, how they are asked, figures.

open_problems     problems to train and to evaluate on, and a Sampling that asks them
load_problems     the village's, or those of a file
Sampling          how problems are put to a policy, and what it answers
figures_of        what a batch of answers was like
evaluate, finish  what the held-out problems say, during training and after it
"""

import torch

from data import village
from data.village import images as village_images
from nanollm.config import UserError
from nanollm.formats import read_prompts, split_documents
from nanollm.generate import as_text, check_room, sample_completions
from nanollm.metrics import first_of_each_task, metrics_table, sample_by_task, sampled_metrics
from nanollm.rollouts import prompt_of, sample_rows
from nanollm.tools import Toolbox, check_knowledge


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
    if cfg.data == "images":
        policy.image_store()  # refuses a model without eyes before images are painted
    train, val = load_problems(cfg)
    problems = train + val
    with_images = any(example.get("images") for example in problems)
    if with_images and cfg.template != "chat":
        raise UserError(f"--template {cfg.template} shows no images, but problems have; use chat")
    sampling = Sampling(cfg, tokenizer, policy if with_images else None)
    check_room(policy, list(map(sampling.ask, problems)), cfg.max_new_tokens, problems)
    return train, first_of_each_task(val, cfg.eval_examples), sampling


def load_problems(cfg):
    """(training problems, held-out problems)."""
    wanted = {name.strip() for name in cfg.tasks.split(",")} - {""}

    def chosen(records):
        examples = [{"task": "all", **example} for example in records if "answer" in example]
        tasks = dict.fromkeys(example["task"] for example in examples)
        if examples and (unknown := wanted - tasks.keys()):
            raise UserError(
                f"{cfg.data} has no problems of {', '.join(sorted(unknown))}, only of "
                f'{", ".join(list(tasks)[:9])}; choose with --tasks, or --tasks "" for all'
            )
        return [example for example in examples if not wanted or example["task"] in wanted]

    if cfg.data in ("village", "tools", "images"):
        folder = (village_images.of_run if cfg.data == "images" else village.of_run)(cfg.init)
        name = "tools" if cfg.data == "tools" else "problems"
        files = (folder / f"{name}_{split}.jsonl" for split in ("train", "test"))
        parts = [chosen(read_prompts(path)) for path in files]
    else:
        records = chosen(read_prompts(cfg.data))
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
        """`model`: the one that reads the problems' images, where they have some."""
        self.cfg, self.tokenizer, self.model = cfg, tokenizer, model
        self.store = None if model is None else model.image_store()
        self.tools = None
        if cfg.tools:
            self.tools = Toolbox.of_village(village.of_run(cfg.init), tokenizer, cfg.knowledge)

    def ask(self, example):
        """Ids of the prompt."""
        return prompt_of(example, self.model, self.tokenizer, self.cfg.template)

    @torch.no_grad()
    def look(self, policy, examples):
        """What the vision tower, which stays frozen, makes of each item's images: (n, N, C_v);
        None where there are none.
        """
        paths = [example.get("images", []) for example in examples]
        if not any(paths):
            return None
        images = self.store.of([path for own in paths for path in own])
        return policy.encode_images(images.to(policy.device)).split([len(own) for own in paths])

    def answers(self, policy, examples, noise):
        """rollouts.SampledRows to train on, with this noise (B, max_new_tokens)."""
        prompts, seen = list(map(self.ask, examples)), self.look(policy, examples)
        return sample_rows(
            self.cfg, policy, self.tokenizer, examples, prompts, noise, self.tools, seen
        )

    def completions(self, policy, examples, samples=1, temperature=0.0, generator=None):
        """Texts of answers, `samples` per item."""
        ids = sample_completions(
            policy,
            self.tokenizer,
            list(map(self.ask, examples)),
            self.cfg.max_new_tokens,
            samples,
            temperature,
            generator=generator,
            tools=self.tools,
            images=self.look(policy, examples),
        )
        return [as_text(self.tokenizer, completion) for completion in ids]


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


def evaluate(cfg, run, policy, sampling, examples, samples=1):
    """Greedy accuracy on held-out problems; with `samples` also pass@k and maj@k."""
    policy.eval()
    greedy, sampled = sampling.completions(policy, examples), None
    if samples > 1:
        generator = torch.Generator(policy.device).manual_seed(cfg.seed)
        sampled = sampling.completions(policy, examples, samples, 1.0, generator)
    policy.train()
    figures = sampled_metrics(examples, greedy, sampled)
    run.log(val_accuracy=figures["all"]["greedy"], show=("val_accuracy",))
    run.write_sample(sample_by_task(examples, greedy))
    return figures


def finish(rt, run, before, after):
    """Print what the rewards have changed, and keep it in result.json."""
    run.close()
    run.draw_curves("reward", "accuracy", "val_accuracy", x_label="update", y_label="share")
    rt.print(metrics_table({"before": before, "after": after}))
    run.write_result(before=before, after=after, **run.speed())
    rt.print(f"{run.folder}: {run.step} updates in {run.elapsed:.0f} s")
    rt.close()
