"""Preferences with a known truth: prompts, composed completions, the gold score, and annotators.

The gold score says how good a completion is. Only the annotators know it, and they waver; it is
reported beside learned rewards, and nothing is ever trained on it:

    gold = 0.5 correct + 0.3 polite + 0.2 concise        correct, concise in 0..1, polite in -1..1

An annotator ranks K completions by Plackett and Luce's model: i comes first with a probability
proportional to exp(gold_i / temperature), then the next of the others, and so on. Of two
completions i is then preferred to j with probability sigmoid((gold_i - gold_j) / temperature),
which is what the Bradley-Terry loss of a reward model assumes. The temperature follows from the
stated rate at which pairs are to be ranked against their gold.
"""

import math
import random
import re
import statistics

from data.village.facts import answer_sentence
from data.village.tasks import MAKERS, STYLES, chat, distinct_examples, with_style
from data.village.world import Villager, article
from nanollm.records import comparison
from nanollm.rewards import check_answer

WEIGHTS = {"correct": 0.5, "polite": 0.3, "concise": 0.2}
BEST_GOLD = sum(WEIGHTS.values())
SHARES = {"fact": 0.55, "two_hop": 0.15, "unknown": 0.18, "multi_turn": 0.12}
FREE, MOST = 8, 24  # words beyond the reference up to which, and from which on, concise is 1 and 0
RATINGS = 7  # the scale on which annotators also rate each completion


def politeness(completion):
    """1 for a courteous completion, -1 for a rude one, 0 for one that is neither, or both."""
    courteous = any(phrase in completion for phrase in STYLES["courteous"])
    rude = any(phrase in completion for phrase in STYLES["rude"])
    return courteous - rude


def gold_parts(example, completion):
    """{"gold": what a completion is worth, at most 1, "correct", "polite", "concise"}; `example` as
    preference_prompts makes it.
    """
    extra = len(completion.split()) - len(example["reference"].split())  # words
    parts = {
        "correct": float(check_answer(example, completion)),
        "polite": politeness(completion),
        "concise": 1 - min(1.0, max(0.0, (extra - FREE) / (MOST - FREE))),
    }
    return {"gold": sum(WEIGHTS[name] * part for name, part in parts.items()), **parts}


def gold_of(examples):
    """gold_parts where these are the village's prompts, None where they have no gold."""
    known = all({"reference", "answer", "check"} <= example.keys() for example in examples)
    return gold_parts if known else None


def preference_prompts(world, split, n_examples):
    """Prompts {"messages", "reference": the plain answer, "task", "answer", "check", ...}, held out
    as the instructions of the split are.
    """

    def make(task, rng):
        turns, check = MAKERS[task](world, split, rng)
        if check["check"] == "exact":  # its wording isn't free: no style to prefer
            return None
        return {"messages": chat(turns[:-1]), "reference": turns[-1], "task": task, **check}

    sizes = {task: round(share * n_examples) for task, share in SHARES.items()}
    return distinct_examples(world.draws(f"preferences-{split}"), sizes, make)


def wrong_completion(example, rng):
    """A completion like the reference that says something false."""
    reference, answer = example["reference"], example["answer"]
    value = rng.choice(example["not"])
    if example["check"] == "unknown":
        name = re.search(r"called (\w+)", reference)[1]
        stranger = Villager(name, rng.choice(("she", "he")), False, {example["attribute"]: value})
        return answer_sentence(stranger, example["attribute"])
    return re.sub(
        rf"\b(?:(an?) )?{re.escape(answer)}(?!\w)",
        lambda m: f"{article(value)} {value}" if m[1] else value,
        reference,
    )


def composed_completion(example, rng):
    """A completion that is right or wrong, in any style: what the model may not say by itself."""
    right = rng.random() < 0.5
    text = example["reference"] if right else wrong_completion(example, rng)
    usual = "courteous" if right else "plain"
    return with_style(text, rng.choice((usual, usual, *STYLES)), rng)


def disagreement(golds, temperature):
    """Share of the pairs of unequal gold that annotators are expected to rank against it.

    golds: per prompt, the gold scores of its completions.
    """
    gaps = [abs(a - b) for row in golds for i, a in enumerate(row) for b in row[:i] if a != b]
    return sum(1 / (1 + math.exp(gap / temperature)) for gap in gaps) / len(gaps)


def temperature_for(golds, rate):
    """The temperature at which annotators disagree with the gold at this rate, by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        if disagreement(golds, middle) < rate:
            low = middle
        else:
            high = middle
    return middle


def annotate(golds, temperature, rng):
    """One annotator's view of K completions: (order, best first; a rating from 1 to 7 of each).

    Ranking by gold / temperature plus Gumbel noise is drawing from Plackett and Luce's model.
    """
    views = [g - temperature * math.log(-math.log(rng.random())) for g in golds]
    order = sorted(range(len(golds)), key=lambda i: -views[i])
    ratings = [1 + round((RATINGS - 1) * min(1.0, max(0.0, view / BEST_GOLD))) for view in views]
    return order, ratings


def rank_completions(prompts, completions, K, rate, seed, annotators=1):
    """Rankings {"ranking", "ratings", "gold", ...} of K completions of each prompt, of which up to
    K - 1 are the model's own (a list of texts per prompt), the others composed. Each annotator
    disagrees with the gold at `rate`. Of several the mean place ranks (Borda's count; of two
    completions the majority), and "orders" are those in which they have put "ranking".
    """
    rng, candidates, golds = random.Random(f"rankings-{seed}"), [], []
    for prompt, own in zip(prompts, completions):
        texts = list(dict.fromkeys(text.strip() for text in own if text.strip()))[: K - 1]
        while len(texts) < K:
            composed = composed_completion(prompt, rng)
            if composed not in texts:
                texts.append(composed)
        candidates.append(texts)
        golds.append([gold_parts(prompt, text)["gold"] for text in texts])
    temperature, rankings = temperature_for(golds, rate), []
    for prompt, texts, gold in zip(prompts, candidates, golds):
        orders, ratings = zip(*(annotate(gold, temperature, rng) for _ in range(annotators)))
        order = sorted(orders[0], key=lambda i: sum(own.index(i) for own in orders))
        ratings = [statistics.median(each) for each in zip(*ratings)]
        ranked = {"ranking": texts, "ratings": ratings, "gold": [round(g, 4) for g in gold]}
        ranked = prompt | {name: [v[i] for i in order] for name, v in ranked.items()}
        if annotators > 1:
            ranked["orders"] = [[order.index(i) for i in own] for own in orders]
        rankings.append(ranked)
    return rankings


def comparisons(prompts, split, seed=0, rate=0.15):
    """Of two composed completions of each prompt, which is better: labels {"messages", "a", "b",
    "label"} by annotators who disagree with the gold at `rate`; for the test what a judge is asked,
    with the gold's "answer".
    """
    rng, pairs = random.Random(f"comparisons-{split}-{seed}"), []
    for prompt in prompts:
        a, b = composed_completion(prompt, rng), composed_completion(prompt, rng)
        if a != b:
            golds = [gold_parts(prompt, text)["gold"] for text in (a, b)]
            pairs.append((prompt["messages"], a, b, golds))
    temperature = temperature_for([golds for *_, golds in pairs], rate)
    for messages, a, b, golds in pairs:
        (best, _), _ = annotate(golds, temperature, rng)
        if split != "test":
            yield {"messages": messages, "a": a, "b": b, "label": "ab"[best]}
        elif golds[0] != golds[1]:
            answer = "A" if golds[0] > golds[1] else "B"
            asked = {"answer": answer, "check": "exact", "task": "comparison"}
            yield {"messages": comparison(messages, a, b), **asked}
