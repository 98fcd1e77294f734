"""What the preference stages share: rankings of completions, rows of them and their scores, and
what a model's completions of held-out prompts are worth.

The library knows no village: whoever calls passes its folder, its annotators and its gold score.
"""

import hashlib
import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
import torch.nn.functional as F

from nanollm.batches import pad_completions
from nanollm.checkpoint import existing_folder, is_scalar, weights_hash
from nanollm.config import ErrorRate, OpenShare, Whole
from nanollm.formats import Unusable, need, read_parts, usable, write_jsonl
from nanollm.generate import as_text, sample_completions, sample_together
from nanollm.hub import load_model, load_scalar
from nanollm.logprobs import completion_logprobs
from nanollm.metrics import cohens_kappa, table
from nanollm.records import comparison, read_preferences, read_prompts
from nanollm.rollouts import chat_prompt
from nanollm.run import effect

CACHE = Path("data/cache")
K = 4  # completions of each prompt that the village's annotators rank

# --- data ----------------------------------------------------------------------------------------


@dataclass
class PreferenceConfig:
    """Options of what learns from preferences, as `load_preferences` reads them."""

    # -- Data
    init: str = "runs/sft"  # run folder or model folder to start from; also the reference
    # village, or JSONL of pairs or rankings (see data/README.md)
    data: str = "village"
    val_data: str | None = None  # held-out preferences; default: the last --val_fraction of --data
    val_fraction: OpenShare = 0.05  # share of --data that is held out
    prompts: Whole[1] = 3000  # prompts of the village that are ranked
    disagreement: ErrorRate = 0.15  # share of the village's pairs that are ranked against the gold
    annotators: Whole[1] = 1  # of each of the village's rankings, which is the mean of theirs
    # run folder or model folder of a model that says which of two completions is better; it ranks
    # what is trained on, instead of the annotators (train_sft.py --preset judge makes one)
    judge: str | None = None


def load_preferences(cfg, model, tokenizer, rt, village_of, annotate):
    """[training, held-out] rankings as --data says, those of a file or `village_rankings`; of each
    part what `completion_rows` gives.

    cfg: a PreferenceConfig with a loss and a seed.
    """
    if cfg.data == "village":
        parts = village_rankings(cfg, model, tokenizer, rt, village_of(cfg.init), annotate)
    else:
        parts = read_parts(read_preferences, cfg.data, cfg.val_data, cfg.val_fraction)
    alone = cfg.loss == "kto" and not cfg.judge
    for record in itertools.chain(*parts):
        wanted = "one completion and its label are for --loss kto, without a judge"
        need(alone or len(record["completions"]) > 1, record.where, wanted)
    if cfg.judge:
        parts = [judged(parts[0], cfg.judge, rt), parts[1]]
    if rows := agreement(parts[0]):
        rt.print(table(["two completions in the same order", "share", "kappa"], rows))
    context = model.cfg.max_position_embeddings
    return [completion_rows(records, tokenizer, context) for records in parts]


def village_rankings(cfg, model, tokenizer, rt, folder, annotate):
    """[training, held-out] rankings of what the model itself says to the village's prompts, and of
    composed completions beside it: annotate is data/village/preferences.py's rank_completions.

    Made once for a model and kept in data/cache/, where the files can be read.
    """
    settings = [weights_hash(cfg.init), folder.name, cfg.prompts, cfg.disagreement, cfg.seed]
    if cfg.annotators > 1:
        settings.append(cfg.annotators)
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    paths = [CACHE / f"preferences-{key}" / f"{split}.jsonl" for split in ("train", "test")]
    for path, most in zip(paths, (cfg.prompts, None)):
        if rt.sum(path.exists()) == rt.world:
            continue
        examples = read_prompts(folder / f"prompts_{path.stem}.jsonl")[:most]
        prompts = [chat_prompt(example, tokenizer) for example in examples]
        ids = sample_together(rt, model, tokenizer, prompts, 64, K, cfg.seed)
        texts = [as_text(tokenizer, i) if i[-1] in tokenizer.stop_ids else None for i in ids]
        own = [list(filter(None, texts[i : i + K])) for i in range(0, len(texts), K)]
        seed = f"{path.stem}-{cfg.seed}"
        rankings = annotate(examples, own, K, cfg.disagreement, seed, cfg.annotators)
        if rt.main:
            write_jsonl(path, rankings)
        rt.barrier()
    return [read_preferences(path) for path in paths]


def judged(records, folder, rt):
    """The rankings as a judge has them, instead of the annotators (RLAIF, Lee et al. 2023,
    arXiv:2309.00267): completions are ordered by the mean probability that each is better than
    another. It is asked with either of the two in the first place, and its answers are averaged,
    since a model prefers a place, too. Unlike the paper's, the labels are hard.

    "orders" holds the annotators' order, "first" (K, K) how probably the judge prefers i, shown
    first, to j.
    """
    ranked = []
    for record, first in zip(records, ask_judge(records, folder, rt)):
        all_k = range(len(first))
        order = sorted(all_k, key=lambda i: sum(first[j][i] - first[i][j] for j in all_k))
        own = {k: [record[k][i] for i in order] for k in ("completions", "gold") if k in record}
        own["first"] = [[first[i][j] for j in order] for i in order]
        own["orders"] = [[order.index(i) for i in all_k]]
        ranked.append(record | own | {"ratings": None, "margin": None})
    return ranked


def ask_judge(records, folder, rt):
    """`first` of each record, as `judged` describes it."""
    judge, tokenizer = load_model(folder)
    rt.prepare(judge, train=False)
    pairs = [(r["messages"], *two) for r in records for two in permutations(r["completions"], 2)]
    prompts = [chat_prompt({"messages": comparison(*pair)}, tokenizer) for pair in pairs]
    labels, longest = [tokenizer.encode(label)[0] for label in "AB"], max(map(len, prompts))
    wanted = f"a comparison of {longest} tokens is longer than its context"
    need(longest < judge.cfg.max_position_embeddings, f"--judge {folder}", wanted)

    def probabilities(model, rows):
        logits = model(*rows.inputs(), where=F.pad(rows.mask[:, 1:], (0, 1)))  # (B, V)
        return logits.float().softmax(-1)[:, labels]  # (B, 2)

    rows = pad_completions(prompts, [labels[:1]] * len(prompts), tokenizer.pad_id)
    found = in_batches(probabilities, judge, rows)
    wanted = f"it answers {found.sum(1).mean():.0%} of the comparisons with A or B"
    need(found.sum(1).mean() > 0.5, f"--judge {folder}", f"{wanted}; --preset judge trains one")
    answers = iter((found[:, 0] / found.sum(1)).tolist())
    sizes = [range(len(record["completions"])) for record in records]
    return [[[next(answers) if i != j else 0.5 for j in K] for i in K] for K in sizes]


def agreement(records):
    """Rows of a table: how often annotators, the ranking and the gold score put two completions in
    the same order, and Cohen's kappa; of a judge also how often its two answers say the same.
    """
    found = defaultdict(list)
    for record in (each for each in records if "orders" in each):
        texts, gold, first = (record.get(key) for key in ("completions", "gold", "first"))
        places = sorted(range(len(texts)), key=texts.__getitem__)  # which follow no ranking
        for i, j in itertools.combinations(places, 2):
            votes = [order.index(i) < order.index(j) for order in record["orders"]]
            answers = [first[i][j] > 0.5, first[j][i] < 0.5] if first else []
            found["two annotators"] += itertools.combinations(votes, 2)
            found["annotators, ranking"] += [(vote, i < j) for vote in votes]
            found["judge, both places"] += itertools.combinations(answers, 2)
            if gold and gold[i] != gold[j]:
                for name, said in dict(annotators=votes, judge=answers, ranking=[i < j]).items():
                    found[f"{name}, gold"] += [(each, gold[i] > gold[j]) for each in said]
    return [
        [name, sum(a == b for a, b in labels) / len(labels), f"{cohens_kappa(labels):.2f}"]
        for name, labels in found.items()
        if labels
    ]


# --- rows ----------------------------------------------------------------------------------------


def completion_rows(records, tokenizer, context=math.inf):
    """(records, Completions with a row for each completion of each record, in order; index (N, K):
    the row of each record's completions, -1 where it has fewer than K). What is longer than the
    model's context is dropped, and counted.
    """

    def rendered(record):
        ids = [tokenizer.completion(record["messages"], text) for text in record["completions"]]
        longest = max(len(prompt + completion + tokenizer.turn_end) for prompt, completion in ids)
        if longest > context:
            raise Unusable(f"longer than the model's {context} tokens")
        return record, ids

    records, ids = zip(*usable(records, rendered, "rankings"))
    counts = torch.tensor([len(each) for each in ids])
    columns = torch.arange(counts.max())
    index = (counts.cumsum(0) - counts)[:, None] + columns
    index = torch.where(columns < counts[:, None], index, -1)
    return records, dialogue_rows(*zip(*itertools.chain(*ids)), tokenizer), index


def dialogue_rows(prompts, completions, tokenizer, context=None):
    """Completions (batches.py) from lists of ids that end as the template ends a dialogue, which is
    where a reward model is read: those that have ended with the end of turn and what follows it,
    which isn't trained on, as far as `context` tokens hold it.
    """
    tail, stops = [tokenizer.end_id, *tokenizer.turn_end], tokenizer.stop_ids
    whole = [[*ids[:-1], *tail] if ids[-1] in stops else ids for ids in completions]
    own = [[i < len(ids) for i in range(len(all_ids))] for ids, all_ids in zip(completions, whole)]
    rows = pad_completions(prompts, whole, tokenizer.pad_id, own)
    return rows.each(lambda tensor: tensor[:, :context])


def pair_index(index):
    """Rows (P, 2) of every pair of a record's completions, the better first; index (N, K)."""
    i, j = torch.triu_indices(index.shape[1], index.shape[1], 1)
    pairs = torch.stack([index[:, i], index[:, j]], -1).flatten(0, 1)
    return pairs[pairs[:, 1] >= 0]


def scores(reward_model, rows):
    """The reward of each row, (B,), at its last real token."""
    return reward_model(*rows.inputs()).gather(1, rows.last()[:, None])[:, 0]


def load_scorer(folder, tokenizer, model_folder, rt):
    """A reward model to score with; one of another tokenizer than the model's is refused."""
    fine = is_scalar(existing_folder(folder, "--reward_model"))
    need(fine, f"--reward_model {folder}", "it is no reward model; train one with train_rm.py")
    scorer, own = load_scalar(folder)
    same = own.fingerprint() == tokenizer.fingerprint()
    need(same, f"--reward_model {folder}", f"it has another tokenizer than {model_folder}")
    return rt.prepare(scorer, train=False)


def in_batches(function, model, rows, batch=128):
    """function(model, rows) of each row, without gradients: (B, ...) on the CPU, in order."""
    parts = rows.real.sum(1).argsort().split(batch)
    with torch.no_grad():
        results = [function(model, rows[part].to(model.device)).float().cpu() for part in parts]
    return torch.cat(results)[torch.cat(parts).argsort()]


# --- what completions are worth ------------------------------------------------------------------


def measure_completions(
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
    prompts = [chat_prompt(example, tokenizer) for example in examples]
    how = {"generator": torch.Generator(model.device).manual_seed(seed), "samples": best_of}
    ids = sample_completions(model, tokenizer, prompts, max_new_tokens, **how)
    best, stats = [*range(0, len(ids), best_of)], {}
    if reward_model is not None:
        repeated = [prompt for prompt in prompts for _ in range(best_of)]
        context = reward_model.cfg.max_position_embeddings
        rows = dialogue_rows(repeated, ids, tokenizer, context)
        rewards = in_batches(scores, reward_model, rows)
        best = [first + int(rewards[first : first + best_of].argmax()) for first in best]
        stats["reward"] = rewards[best].mean().item()
    ids = [ids[i] for i in best]
    if ref is not None:
        rows = pad_completions(prompts, ids, tokenizer.pad_id)

        def kl(model, part):
            return (completion_logprobs(model, part) - completion_logprobs(ref, part)).sum(1)

        stats["kl"] = in_batches(kl, model, rows).mean().item()
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


def finish(rt, run, before, after, *effects):
    """Print what training has changed, and keep it; without a gold score the given effects."""
    lines = [[name, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in before]
    rt.print(table(["held-out", "before", "after"], lines))
    if "win_rate" in after:
        better = "better than the completion of the model before, by gold"
        effects = (
            effect("gold score of sampled completions", before["gold"], after["gold"]),
            effect(better, before["win_rate"], after["win_rate"], "share"),
        )
    run.write_result(effects, before=before, after=after)
    rt.close()


def win_rate(golds, others):
    """Share of prompts on which the first gold is higher than the second; a tie counts half."""
    wins = [0.5 if abs(a - b) < 1e-9 else float(a > b) for a, b in zip(golds, others)]
    return sum(wins) / len(wins)
