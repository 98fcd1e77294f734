"""Lessons for distillation: labelled examples, prompts without labels, and packed rows in which
each token knows whether it is a label, and whether it belongs to a rationale.

A record is a dict with "messages" (a prompt: the dialogue up to where the assistant answers) and,
where it is known, "completion" (the answer: a label, or what a teacher has written); other keys, such
as "answer" and "check" for the checker, stay. T tokens of a row, R rows, B of a batch.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import village
from data.village.problems import answer_of, worked
from data.village.tasks import fact_never_asked
from data.village.world import build_world
from nanollm.batches import Packed, pack
from nanollm.checkpoint import read_json
from nanollm.config import UserError
from nanollm.formats import read_chats, read_examples, read_jsonl, read_prompts, split_documents


def read_lessons(path, kind="worked"):
    """Records with "messages" (a prompt) and, where the file tells one, "completion" (its label)."""
    first = read_jsonl(path)[0][1]
    turns = first.get("messages") or [{}]
    if {"conversations", "instruction"} & first.keys() or turns[-1].get("role") == "assistant":
        return [split_completion(chat) for chat in read_chats(path)]
    return [example | label_of(example, kind) for example in read_prompts(path)]


def split_completion(chat):
    """A dialogue without its last answer, which becomes "completion"; one that has none stays."""
    *prompt, last = chat["messages"]
    if not prompt or last["role"] != "assistant":
        return chat
    return {**chat, "messages": prompt, "completion": last["content"]}


def label_of(problem, kind):
    """{"completion"} of a problem: its steps and the answer, or the answer alone; {} without either."""
    if kind == "worked" and "steps" in problem:
        return {"completion": worked(problem)["messages"][-1]["content"]}
    return {"completion": answer_of(problem)} if "answer" in problem else {}


# --- the village ---------------------------------------------------------------------------------

VILLAGE = {"village": "sft", "problems": "problems"}  # --data: the village's files
PEOPLE = ("fact", "fact_never_asked", "unknown", "two_hop", "multi_turn")


def prompts_about_people(folder, n_never_asked=1500):
    """The village's prompts, and questions about the villagers that no dialogue is about, worded
    as no test example is; shuffled. Their answers are for the checker.
    """
    prompts, known = read_prompts(folder / "prompts_train.jsonl"), read_json(folder / "world.json")
    world = build_world(len(known["villagers"]), known["seed"])
    rng = random.Random(f"prompts-about-people-{world.seed}")
    for _ in range(n_never_asked):
        (question, _), check = fact_never_asked(world, "train", rng)
        turns = [{"role": "user", "content": question}]
        prompts.append({"messages": turns, "task": "fact_never_asked", **check})
    rng.shuffle(prompts)
    return prompts


def load_lessons(cfg):
    """(labelled, unlabelled, held-out) records and test examples; the held-out ones have labels."""
    if cfg.data in VILLAGE:
        folder, name = village.of_run(cfg.teacher), VILLAGE[cfg.data]
        files = (folder / f"{name}_{part}.jsonl" for part in ("train", "val"))
        train, val = (read_lessons(path, cfg.label) for path in files)
        examples = read_examples(cfg.test_data or folder / f"{name}_test.jsonl")
        if cfg.data == "village":
            train, val = ([r for r in part if r["task"] in PEOPLE] for part in (train, val))
            examples = [
                example for example in examples if cfg.test_data or example["task"] in PEOPLE
            ]
    else:
        records = read_lessons(cfg.data, cfg.label)
        train, val = (split_documents(records, p, cfg.val_fraction) for p in ("train", "val"))
        examples = read_examples(cfg.test_data) if cfg.test_data else []
    labelled, rest = train[: cfg.labels], train[cfg.labels :]
    if cfg.data == "village":
        rest = prompts_about_people(folder)
    for n, record in enumerate(labelled):
        if "completion" not in record:
            raise UserError(
                f"{cfg.data}: record {n + 1} has no label: a dialogue that ends with the "
                f'assistant, or an "answer"; --labels says how many need one'
            )
    unlabelled = [{k: v for k, v in r.items() if k != "completion"} for r in rest[: cfg.unlabelled]]
    return labelled, unlabelled, [r for r in val if "completion" in r], examples


def prompt_ids(record, tokenizer):
    """Ids of a record's prompt, up to where the assistant begins."""
    return tokenizer.render(record["messages"], generation_prompt=True)[0]


def as_dialogue(record):
    """The record in the chat format, as train_sft.py --data and read_lessons read it."""
    completion = {"role": "assistant", "content": record["completion"]}
    rest = {k: v for k, v in record.items() if k not in ("messages", "completion")}
    return {"messages": [*record["messages"], completion], **rest}


# --- rows ----------------------------------------------------------------------------------------


@dataclass
class Lessons:
    """Packed rows: rows.mask is True on answers, `labelled` on those of their tokens that are
    labels, `rationale` on those inside of <think>...</think>. All (R, T).
    """

    rows: Packed
    labelled: torch.Tensor
    rationale: torch.Tensor

    def __len__(self):
        return len(self.labelled)

    def select(self, numbers):
        return Lessons(self.rows[numbers], self.labelled[numbers], self.rationale[numbers])

    def to(self, device):
        return Lessons(self.rows.to(device), self.labelled.to(device), self.rationale.to(device))

    def where(self):
        """Positions whose next token is trained on, (B, T); n of them are True."""
        return F.pad(self.rows.mask[:, 1:], (0, 1))

    def at(self, values):
        """`values` (B, T) of the trained tokens themselves, (n,)."""
        return values[:, 1:][self.rows.mask[:, 1:]]


class PerToken:
    """Values of every trained token of all lessons, (n, ...) each, found by numbers of rows."""

    def __init__(self, lessons, *values):
        self.lengths = lessons.where().sum(1)
        self.begins, self.values = self.lengths.cumsum(0) - self.lengths, values

    def rows(self, numbers, device):
        """The values of these rows' trained tokens, in order."""
        lengths = self.lengths[numbers]
        shift = self.begins[numbers] - (lengths.cumsum(0) - lengths)
        chosen = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
        return [value[chosen].to(device) for value in self.values]


def rationale_of(ids, tokenizer):
    """For each id: does it stand inside of <think>...</think>, the two marks included?"""
    begin, end = (tokenizer.special.get(mark) for mark in ("<think>", "</think>"))
    inside, found = False, []
    for token in ids:
        inside = inside or token == begin
        found.append(inside)
        inside = inside and token != end
    return found


def make_lessons(examples, T, tokenizer):
    """Lessons from examples (prompt ids, completion ids, labelled)."""
    kinds = ([], [], [])
    for prompt, completion, labelled in examples:
        masks = (
            [True] * len(completion),
            [labelled] * len(completion),
            rationale_of(completion, tokenizer),
        )
        for kind, mask in zip(kinds, masks):
            kind.append((prompt + completion, [False] * len(prompt) + mask))
    # where an example goes depends on lengths alone, so that all three are packed alike
    rows, labelled, rationale = (pack(kind, T, tokenizer.pad_id) for kind in kinds)
    return Lessons(rows, labelled.mask, rationale.mask)


def tokenize(records, labelled, tokenizer, T):
    """Examples of at most T tokens; longer ones are left out."""
    examples = []
    for record in records:
        prompt = prompt_ids(record, tokenizer)
        turn = {"role": "assistant", "content": record["completion"]}
        ids, mask = tokenizer.render([*record["messages"], turn])
        last = len(mask) - mask[::-1].index(True)  # some layouts write a line end after the turn
        if last <= T:
            examples.append((prompt, ids[len(prompt) : last], labelled))
    return examples
