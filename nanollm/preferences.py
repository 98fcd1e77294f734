"""What the preference stages share: rankings of completions, rows of them and their scores, and
what a model's completions of held-out prompts are worth.

The library knows no village: whoever calls passes its folder, its annotators and its gold score.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from nanollm.batches import pad_completions
from nanollm.checkpoint import existing_folder, is_scalar, weights_hash
from nanollm.config import UserError
from nanollm.formats import need, need_usable, read_parts, usable, write_jsonl
from nanollm.generate import as_text, sample_completions, sample_together
from nanollm.hub import load_scalar
from nanollm.logprobs import completion_logprobs
from nanollm.metrics import table
from nanollm.records import read_preferences, read_prompts
from nanollm.rollouts import chat_prompt
from nanollm.run import effect

CACHE = Path("data/cache")
K = 4  # completions of each prompt that the village's annotators rank

# --- data ----------------------------------------------------------------------------------------


def load_preferences(cfg, model, tokenizer, rt, village_of, annotate):
    """(training, held-out) rankings as --data says: those of a file, or `village_rankings`. What
    doesn't fit the model's context is dropped, and counted.

    Reads cfg.init, data, val_data, val_fraction, prompts, disagreement, loss and seed.
    """
    if cfg.data == "village":
        parts = village_rankings(cfg, model, tokenizer, rt, village_of(cfg.init), annotate)
    else:
        parts = read_parts(read_preferences, cfg.data, cfg.val_data, cfg.val_fraction)
    most = model.cfg.max_position_embeddings

    def fitting(record, where):
        for text in record["completions"]:
            prompt, completion = tokenizer.completion(record["messages"], text)
            long = len(prompt + completion + tokenizer.turn_end) > most
            need_usable(not long, where, f"longer than the model's {most} tokens")
        pair = len(record["completions"]) > 1
        need(pair or cfg.loss == "kto", where, "one completion and its label are for --loss kto")
        return record

    return [usable(records, fitting, "rankings") for records in parts]


def village_rankings(cfg, model, tokenizer, rt, folder, annotate):
    """(training, held-out) rankings of what the model itself says to the village's prompts, and of
    composed completions beside it: annotate is data/village/preferences.py's rank_completions.

    Made once for a model and kept in data/cache/, where the files can be read.
    """
    settings = [weights_hash(cfg.init), folder.name, cfg.prompts, cfg.disagreement, cfg.seed]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    paths = [CACHE / f"preferences-{key}" / f"{split}.jsonl" for split in ("train", "test")]
    for path, most in zip(paths, (cfg.prompts, None)):
        if rt.sum(path.exists()) == rt.world:
            continue
        examples = read_prompts(folder / f"prompts_{path.stem}.jsonl")[:most]
        prompts = prompt_ids(examples, tokenizer)
        ids = sample_together(rt, model, tokenizer, prompts, 64, K, cfg.seed)
        texts = [as_text(tokenizer, i) if i[-1] in tokenizer.stop_ids else None for i in ids]
        own = [list(filter(None, texts[i : i + K])) for i in range(0, len(texts), K)]
        rankings = annotate(examples, own, K, cfg.disagreement, f"{path.stem}-{cfg.seed}")
        if rt.main:
            write_jsonl(path, rankings)
        rt.barrier()
    return [read_preferences(path) for path in paths]


# --- rows ----------------------------------------------------------------------------------------


def prompt_ids(examples, tokenizer):
    """Each example's messages as ids, up to where the assistant begins."""
    return [chat_prompt(example, tokenizer) for example in examples]


def completion_rows(records, tokenizer):
    """(Completions with a row for each completion of each record, in order; index (N, K): the row
    of each record's completions, -1 where it has fewer than K). A row ends as a dialogue does: in
    some templates behind the end of turn, the last that a policy is trained on.
    """
    prompts, completions = [], []
    counts = torch.tensor([len(record["completions"]) for record in records])
    for record in records:
        for text in record["completions"]:
            prompt, completion = tokenizer.completion(record["messages"], text)
            prompts.append(prompt)
            completions.append(completion)
    columns = torch.arange(counts.max())
    index = (counts.cumsum(0) - counts)[:, None] + columns
    index = torch.where(columns < counts[:, None], index, -1)
    return finish_turns(pad_completions(prompts, completions, tokenizer.pad_id), tokenizer), index


def finish_turns(rows, tokenizer, context=None):
    """Rows whose completions end as the template ends a dialogue, which is where a reward model is
    read: those that have ended with the end of turn and what follows it, which isn't trained on,
    as far as `context` tokens hold it.
    """
    tail = torch.tensor([tokenizer.end_id, *tokenizer.turn_end], device=rows.tokens.device)
    room, last = len(tail) - 1, rows.last()
    tokens = F.pad(rows.tokens, (0, room), value=tokenizer.pad_id)
    mask, real = (F.pad(x, (0, room)) for x in (rows.mask, rows.real))
    stops = torch.tensor(sorted(tokenizer.stop_ids), device=tokens.device)
    ended = torch.isin(tokens.gather(1, last[:, None])[:, 0], stops).nonzero()  # (E, 1)
    columns = last[ended] + torch.arange(len(tail), device=tokens.device)  # (E, len(tail))
    tokens[ended, columns], real[ended, columns] = tail, True
    tokens, mask, real = (x[:, :context] for x in (tokens, mask, real))
    return replace(rows, tokens=tokens, mask=mask, real=real)


def pair_index(index):
    """Rows (P, 2) of every pair of a record's completions, the better first; index (N, K)."""
    i, j = torch.triu_indices(index.shape[1], index.shape[1], 1)
    pairs = torch.stack([index[:, i], index[:, j]], -1).flatten(0, 1)
    return pairs[pairs[:, 1] >= 0]


def scores(reward_model, rows):
    """The reward of each row, (B,): what the model says at the last real token, which is the one
    that the template ends with, after `finish_turns`.
    """
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


# --- what completions are worth ------------------------------------------------------------------


def judge(
    model,
    tokenizer,
    examples,
    ref=None,
    reward_model=None,
    gold=None,
    max_new_tokens=64,
    best_of=1,
    seed=0,
):
    """Sample a completion of every prompt at temperature 1 and measure it: (stats, completions,
    golds).

    Stats are means over prompts: "reward", "kl" (nats per completion, the sum over its tokens of
    log policy - log ref), "length" in tokens, "ended", and what gold(example, completion) gives:
    "gold" and its parts; golds holds the gold of each. With `best_of` n the completion is that of n
    which the reward model scores highest: rejection sampling (Stiennon et al. 2020, 2009.01325).
    """
    prompts = prompt_ids(examples, tokenizer)
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = sample_completions(
        model, tokenizer, prompts, max_new_tokens, best_of, generator=generator
    )
    repeated = [prompt for prompt in prompts for _ in range(best_of)]
    rows = pad_completions(repeated, ids, tokenizer.pad_id)
    best, stats = torch.arange(len(examples)) * best_of, {}
    if reward_model is not None:
        dialogues = finish_turns(rows, tokenizer, reward_model.cfg.max_position_embeddings)
        rewards = in_batches(lambda part: scores(reward_model, part), dialogues, model.device)
        best = best + rewards.view(-1, best_of).argmax(1)
        stats["reward"] = rewards[best].mean().item()
    ids, rows = [ids[i] for i in best], rows[best]
    if ref is not None:

        def kl(part):
            return (completion_logprobs(model, part) - completion_logprobs(ref, part)).sum(1)

        stats["kl"] = in_batches(kl, rows, model.device).mean().item()
    stats["length"] = sum(map(len, ids)) / len(ids)
    stats["ended"] = sum(each[-1] in tokenizer.stop_ids for each in ids) / len(ids)
    completions, golds = [as_text(tokenizer, each) for each in ids], None
    if gold is not None:
        parts = [gold(example, text) for example, text in zip(examples, completions)]
        stats |= {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
        golds = [each["gold"] for each in parts]
    return stats, completions, golds


def sample_text(examples, completions, n=5):
    """The first few prompts with their completions, for samples.txt."""
    pairs = zip(examples[:n], completions)
    return "\n".join(f"{example['messages'][-1]['content']}\n    {text}" for example, text in pairs)


def change_table(before, after):
    """Text table of held-out metrics before and after training."""
    lines = [[name, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in before]
    return table(["held-out", "before", "after"], lines)


def gold_effects(before, after):
    """The effects of a policy's training, where completions have a gold score."""
    name = "better than the completion of the model before, by gold"
    return [
        effect("gold score of sampled completions", before["gold"], after["gold"]),
        effect(name, before["win_rate"], after["win_rate"], "share"),
    ]


def win_rate(golds, others):
    """Share of prompts on which the first is worth more than the second; a tie counts half, so
    the two orders add up to one.
    """
    wins = [0.5 if abs(a - b) < 1e-9 else float(a > b) for a, b in zip(golds, others)]
    return sum(wins) / len(wins)
