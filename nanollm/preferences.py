"""What the preference stages share: the village's rankings of a model's own completions, rows of
completions with their scores, and the measurement of what a model's completions are worth.

The gold score (data/village/preferences.py) is the village's truth. It makes the annotators'
rankings and it is reported beside learned rewards; nothing is ever trained on it.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch

from data import village
from data.village.preferences import (
    BEST_GOLD,
    annotate,
    composed_completion,
    gold_parts,
    gold_score,
    temperature_for,
)
from nanollm.batches import pad_completions
from nanollm.checkpoint import existing_folder, is_scalar, weights_hash
from nanollm.config import UserError
from nanollm.formats import read_preferences, read_prompts, split_documents
from nanollm.generate import as_text, sample_completions
from nanollm.hub import load_model, load_scalar
from nanollm.logprobs import completion_logprobs

CACHE = Path("data/cache")
K = 4  # completions per prompt


# --- data ----------------------------------------------------------------------------------------


def village_prompts(init, split, limit=0):
    """The village's prompts of a split ("train", "test"), at most `limit` where it isn't 0."""
    prompts = read_prompts(village.of_run(init) / f"prompts_{split}.jsonl")
    return prompts[:limit] if limit else prompts


def village_preferences(init, model, tokenizer, rt, n_prompts, rate, seed=0, max_new_tokens=64):
    """(training, held-out) rankings of K completions per prompt, as read_preferences gives them.

    Of every prompt's completions up to K - 1 are the model's own, sampled at temperature 1, the others
    composed; annotators rank them, who disagree with the gold at `rate`. Made once for this model
    and kept in data/cache/, where the files can be read.
    """
    settings = [
        weights_hash(init),
        village.of_run(init).name,
        n_prompts,
        rate,
        seed,
        max_new_tokens,
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = CACHE / f"preferences-{key}"
    if rt.main and not folder.is_dir():
        made = {}
        for split, n in ("train", n_prompts), ("test", 0):
            examples = village_prompts(init, split, n)
            rng = random.Random(f"preferences-{split}-{seed}")
            generator = torch.Generator(model.device).manual_seed(seed)
            prompts = prompt_ids(examples, tokenizer)
            completions = sample_completions(
                model, tokenizer, prompts, max_new_tokens, K, generator=generator
            )
            made[split] = rank_completions(examples, completions, tokenizer, rate, rng)
        _write_folder(folder, made)
    rt.barrier()
    return tuple(read_preferences(folder / f"{split}.jsonl") for split in ("train", "test"))


def rank_completions(examples, completions, tokenizer, rate, rng):
    """Ranking records from the model's completions (K lists of ids per item) and composed ones."""
    candidates = []
    for n, example in enumerate(examples):
        own = [ids for ids in completions[n * K : (n + 1) * K] if ids[-1] in tokenizer.stop_ids]
        texts = list(dict.fromkeys(filter(None, (as_text(tokenizer, i).strip() for i in own))))
        texts = texts[: K - 1]
        while len(texts) < K:
            completion = composed_completion(example, rng)
            if completion not in texts:
                texts.append(completion)
        candidates.append(texts)
    golds = [
        [gold_score(example, text) for text in row] for example, row in zip(examples, candidates)
    ]
    temperature = temperature_for(golds, rate)
    records = []
    for example, texts, gold in zip(examples, candidates, golds):
        order, ratings = annotate(gold, temperature, rng)
        ranked = {"ranking": texts, "ratings": ratings, "gold": [round(g, 4) for g in gold]}
        records.append(example | {name: [v[i] for i in order] for name, v in ranked.items()})
    return records


def _write_folder(folder, records):
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    for split, rows in records.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (new / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    try:
        os.replace(new, folder)
    except OSError:  # another process was faster, with the same bytes
        shutil.rmtree(new)


def load_preferences(cfg, model, tokenizer, rt):
    """(training, held-out) rankings as the settings say: the village's own, or files.

    Reads cfg.data, val_data, val_fraction, init, prompts, disagreement and seed.
    """
    if cfg.data == "village":
        return village_preferences(
            cfg.init, model, tokenizer, rt, cfg.prompts, cfg.disagreement, cfg.seed
        )
    records = read_preferences(cfg.data)
    if cfg.val_data:
        return records, read_preferences(cfg.val_data)
    return train_and_held_out(records, cfg)


def train_and_held_out(records, cfg):
    """The records of cfg.data in two parts, of which the last cfg.val_fraction is held out."""
    parts = [split_documents(records, part, cfg.val_fraction) for part in ("train", "val")]
    if not all(parts):
        raise UserError(f"{cfg.data}: {len(records)} records leave none to train on or to hold out")
    return parts


# --- rows ----------------------------------------------------------------------------------------


def prompt_ids(examples, tokenizer):
    """Each item's messages as ids, up to where the assistant begins."""
    return [
        tokenizer.render(example["messages"], generation_prompt=True)[0] for example in examples
    ]


def completion_rows(examples, tokenizer, most):
    """One row per completion of each item, in order: (data.Completions, counts (N,) of completions per item).

    Items with a row of more than `most` tokens are refused, with the length that they need.
    """
    prompts, completions, counts = [], [], []
    for example, prompt in zip(examples, prompt_ids(examples, tokenizer)):
        for text in example["completions"]:
            ids = [*tokenizer.encode(text), tokenizer.end_id]
            if len(prompt) + len(ids) > most:
                asked = example["messages"][-1]["content"][:40]
                raise UserError(
                    f"the prompt {asked!r} and a completion need {len(prompt) + len(ids)} tokens, but "
                    f"the model reads {most}; shorten or drop them"
                )
            prompts.append(prompt)
            completions.append(ids)
        counts.append(len(example["completions"]))
    return pad_completions(prompts, completions, tokenizer.pad_id), torch.tensor(counts)


def scores(reward_model, rows):
    """The reward of each row, (B,): what the model says at the last real token."""
    return reward_model(*rows.inputs()).gather(1, rows.last()[:, None])[:, 0]


def load_scorer(folder, tokenizer, model_folder, rt):
    """A reward model to score with; one of another tokenizer than the model's is refused."""
    if not is_scalar(existing_folder(folder, "--reward_model")):
        raise UserError(f"{folder} is no reward model; train one with train_rm.py")
    scorer, own = load_scalar(folder)
    if own.fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"the reward model {folder} has another tokenizer than {model_folder}: it would score "
            "other text; train it from the same run"
        )
    rt.prepare(scorer, train=False)
    return scorer


def in_batches(function, rows, device, batch=128):
    """function(rows) over batches of similar length, without gradients; results in row order."""
    order = rows.real.sum(1).argsort()
    with torch.no_grad():
        parts = [function(rows[part].to(device)).cpu() for part in order.split(batch)]
    results = torch.empty(len(rows), *parts[0].shape[1:])
    results[order] = torch.cat(parts)
    return results


# --- what completions are worth ----------------------------------------------------------------------


def has_gold(examples):
    return all({"reference", "answer", "check"} <= example.keys() for example in examples)


def judge(
    model, tokenizer, examples, ref=None, reward_model=None, max_new_tokens=64, best_of=1, seed=0
):
    """Sample a completion to every item at temperature 1 and measure it: (figures, completions, golds).

    With `best_of` n the completion is that of n which the reward model scores highest: rejection
    sampling (Stiennon et al. 2020, arXiv:2009.01325; Llama 2, 2307.09288). Figures are means over
    items: "gold" and its parts (where the items have one), "reward", "kl" (nats per completion, the sum
    over its tokens of log policy - log ref), "length" in tokens, "ended".
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    prompts = prompt_ids(examples, tokenizer)
    ids = sample_completions(
        model, tokenizer, prompts, max_new_tokens, best_of, generator=generator
    )
    repeated = [prompt for prompt in prompts for _ in range(best_of)]
    rows = pad_completions(repeated, ids, tokenizer.pad_id)
    figures, best = {}, torch.arange(len(examples)) * best_of
    if reward_model is not None:
        rewards = in_batches(lambda part: scores(reward_model, part), rows, model.device)
        best = best + rewards.view(-1, best_of).argmax(1)
        figures["reward"] = rewards[best].mean().item()
    ids, rows = [ids[i] for i in best], rows[best]
    if ref is not None:
        figures["kl"] = (
            in_batches(
                lambda part: (
                    completion_logprobs(model, part) - completion_logprobs(ref, part)
                ).sum(1),
                rows,
                model.device,
            )
            .mean()
            .item()
        )
    completions, golds = [as_text(tokenizer, completion) for completion in ids], None
    if has_gold(examples):
        golds = [
            gold_score(example, completion) for example, completion in zip(examples, completions)
        ]
        figures["gold"] = sum(golds) / len(golds)
        parts = [
            gold_parts(example, completion) for example, completion in zip(examples, completions)
        ]
        figures |= {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
    figures["length"] = sum(map(len, ids)) / len(ids)
    figures["ended"] = sum(completion[-1] in tokenizer.stop_ids for completion in ids) / len(ids)
    return figures, completions, golds


def sample_text(examples, completions, n=5):
    """The first few prompts with their completions, for samples.txt."""
    pairs = zip(examples[:n], completions)
    return "\n".join(f"{example['messages'][-1]['content']}\n    {r}" for example, r in pairs)


def win_rate(golds, others):
    """Share of prompts on which the first is worth more than the second; a tie counts half, so
    the two orders add up to one.
    """
    wins = [0.5 if abs(a - b) < 1e-9 else float(a > b) for a, b in zip(golds, others)]
    return sum(wins) / len(wins)


def gap_closed(gold, start):
    """Share of the distance from `start` to the best possible gold score."""
    return (gold - start) / (BEST_GOLD - start)


def evaluate_preferences(cfg, rt, model, tokenizer):
    """Figures of sampled completions to held-out preference prompts, and the completions; prints them."""
    examples = village_prompts(cfg.model, "test", cfg.limit)
    ref = reward_model = None
    if cfg.against:
        ref, _ = load_model(cfg.against)
        rt.prepare(ref, train=False)
    if cfg.reward_model:
        reward_model = load_scorer(cfg.reward_model, tokenizer, cfg.model, rt)
    sampling = {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed}
    figures, completions, golds = judge(
        model, tokenizer, examples, ref, reward_model, best_of=cfg.best_of, **sampling
    )
    if ref is not None:
        other, other_completions, other_golds = judge(
            ref, tokenizer, examples, reward_model=reward_model, **sampling
        )
        figures["win_rate"] = win_rate(golds, other_golds)
        figures["gap_closed"] = gap_closed(figures["gold"], other["gold"])
        figures["against"] = other
    for name, value in figures.items():
        beside = figures.get("against", {}).get(name, "")
        if name != "against":
            print(f"{name:12}{value:9.3f}" + (f"{beside:9.3f} of {cfg.against}" if beside else ""))
    asked = [example["messages"][-1]["content"] for example in examples]
    result = {"figures": figures, "prompts": asked, "completions": completions}
    return result | ({"completions_against": other_completions} if ref is not None else {})
