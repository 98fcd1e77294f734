"""What is measured of completions: accuracy by task, votes and pass@k; and the one table of text
that shows it.
"""

import math
from collections import Counter, defaultdict

from nanollm.generate import complete
from nanollm.rewards import extracted, final_answer, is_right
from nanollm.rollouts import prompt_of

LONGEST_COMPLETION = 128  # tokens; the village's longest worked solution has 108

# --- accuracy ------------------------------------------------------------------------------------


def accuracy_by_task(
    model,
    tokenizer,
    examples,
    max_new_tokens=LONGEST_COMPLETION,
    begin="",
    store=None,
    shown="right",
    template="chat",
    **sampling,
):
    """Let the model answer every example; returns ({task: {"accuracy", "n"}}, completions).

    A cloze example is continued as plain text, and right when the text goes on with the answer;
    every other one is asked by the template, and judged by its check. Every completion goes on from
    `begin`. Examples with "images" are asked with their images, or as `shown` says
    (vision/images.py); an ImageStore given as `store` keeps those that it has opened.
    """
    begun, images = tokenizer.encode(begin, special=True), None
    if any(example.get("images") for example in examples):
        images = (store or model.image_store()).shown(examples, shown)
    prompts = [prompt_of(example, model, tokenizer, template) for example in examples]
    begins = [tokenizer.begun(prompt) + begin for prompt in prompts]
    prompts = [prompt + begun for prompt in prompts]
    completions = complete(model, tokenizer, prompts, max_new_tokens, images=images, **sampling)
    completions = [begin + completion for begin, completion in zip(begins, completions)]
    right = defaultdict(list)
    for example, completion in zip(examples, completions):
        right[example["task"]].append(is_right(example, completion))
    by_task = {name: {"accuracy": sum(r) / len(r), "n": len(r)} for name, r in right.items()}
    return by_task, completions


def mean_accuracy(by_task):
    """The mean over tasks of {task: {"accuracy"}}; None without any."""
    accuracies = [each["accuracy"] for each in by_task.values()]
    return sum(accuracies) / len(accuracies) if accuracies else None


def sampled_metrics(examples, greedy, sampled=None):
    """{task: metrics}, and "all" for their mean over examples.

    Metrics are "n", "accuracy" (of the greedy completions), and where `sampled` holds k completions
    per example, in order, "sampled" (accuracy of one of them), "maj" (of a vote among k: maj@k) and
    "pass" (share of examples with a right one among k: pass@k).
    """
    k = len(sampled) // len(examples) if sampled else 0
    by_task = defaultdict(list)
    for n, (example, completion) in enumerate(zip(examples, greedy)):
        found = {"accuracy": float(is_right(example, completion))}
        if k:
            several = sampled[n * k : (n + 1) * k]
            right = sum(is_right(example, each) for each in several)
            vote = float(is_right(example, majority(example, several)))
            found |= {"sampled": right / k, "maj": vote, "pass": float(right > 0)}
        by_task[example["task"]].append(found)
    by_task["all"] = [found for rows in list(by_task.values()) for found in rows]
    return {
        name: {"n": len(rows), "k": k}
        | {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        for name, rows in by_task.items()
    }


def majority(example, completions):
    """The completion whose final answer most others share; the first of them where several lead.

    Self-consistency (Wang et al. 2022, arXiv:2203.11171). Completions without an answer don't vote.
    """
    votes = {}
    for completion in completions:
        vote = vote_of(example, completion)
        if vote not in (None, ""):
            votes.setdefault(vote, []).append(completion)
    return max(votes.values(), key=len)[0] if votes else ""


def vote_of(example, completion):
    """What a completion answers, or None; of a cloze example the rest of the sentence."""
    if "check" not in example:
        return completion.partition(".")[0].strip().lower()
    answer = extracted(example, final_answer(completion))
    return answer.lower() if isinstance(answer, str) else answer


def cohens_kappa(labels):
    """How far two annotators agree beyond chance: (p_o - p_e) / (1 - p_e), p_o the share of equal
    labels, p_e the share if both gave theirs at random (Cohen 1960, A coefficient of agreement for
    nominal scales); labels: (the first's, the second's) of each thing.
    """
    n = len(labels)
    first, second = map(Counter, zip(*labels))
    observed = sum(a == b for a, b in labels) / n
    expected = sum(first[label] * second[label] for label in first) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


# --- examples and tables -------------------------------------------------------------------------


def first_of_each_task(examples, limit):
    """At most `limit` examples per task; 0 for all."""
    seen, kept = defaultdict(int), []
    for example in examples:
        seen[example["task"]] += 1
        if not limit or seen[example["task"]] <= limit:
            kept.append(example)
    return kept


def question_of(example):
    """What an example asks, as text."""
    return example["messages"][-1]["content"] if "messages" in example else example["prompt"]


def sample_by_task(examples, completions):
    """The first example of each task with its completion, for samples.txt."""
    first = {e["task"]: (e, text) for e, text in zip(examples[::-1], completions[::-1])}
    return "\n".join(f"{question_of(e)}\n    {text}" for e, text in first.values())


def table(head, rows):
    """Text table: the first column flush left, the others flush right; cells are text or numbers,
    shares between 0 and 1 that are floats in percent.
    """

    def cell(value):
        if isinstance(value, float):
            return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.3f}"
        return "-" if value is None else str(value)

    lines = [[cell(value) for value in row] for row in [head, *rows]]
    first, *others = (max(map(len, column)) for column in zip(*lines))  # widths
    padded = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines)
    return "\n".join(map("  ".join, padded))


def accuracy_table(columns, keys=("accuracy",)):
    """Text table of {column: {task: metrics}}, a line per task; of each column those `keys`."""
    tasks = dict.fromkeys(task for by_task in columns.values() for task in by_task)
    shown = [
        (name, key)
        for name, by_task in columns.items()
        for key in keys
        if any(key in found for found in by_task.values())
    ]
    head = [name if len(keys) == 1 else f"{name} {key}".strip() for name, key in shown]
    rows = []
    for task in tasks:
        found = [columns[name].get(task, {}) for name, _ in shown]
        counts = dict.fromkeys(str(each["n"]) for each in found if each)
        cells = [each.get(key) for each, (_, key) in zip(found, shown)]
        rows.append([task, *cells, ", ".join(counts)])
    return table(["task", *head, "n"], rows)
