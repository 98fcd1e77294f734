"""Examples for distillation: labelled ones, and a teacher's completions; packed rows in which each
token knows whether it is a label, and whether it belongs to a rationale.

An example is a dict with "messages" (a prompt: the dialogue up to where the assistant writes) and,
where it is known, "completion" (a label, or what a teacher has written); other keys, such as
"answer" and "check" for the checker, stay. R rows of T tokens, n of which are trained on.
"""

import itertools
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanollm.batches import Rows, pack
from nanollm.formats import as_chat, as_prompt, read_jsonl, write_jsonl
from nanollm.generate import as_text, sample_together
from nanollm.rewards import is_right
from nanollm.rollouts import chat_prompt
from nanollm.runtime import clock

# --- files ---------------------------------------------------------------------------------------

OTHER_LAYOUTS = ("conversations", "instruction", "input", "output")  # ShareGPT's and Alpaca's keys


def read_completions(path):
    """Examples from dialogues, prompts or problems: where a dialogue ends with the assistant, its
    last turn is the "completion". Raises UserError with file and line.
    """
    examples = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        example = as_prompt(record, where)
        if {"messages", "conversations", "instruction"} & record.keys():
            last = as_chat(record, where)["messages"][-1]
            if last["role"] == "assistant":
                example["completion"] = last["content"]
        examples.append({k: v for k, v in example.items() if k not in OTHER_LAYOUTS})
    return examples


def write_completions(examples, path):
    """Keep examples in the chat format, as read_completions and train_sft.py --data read them."""
    dialogues = []
    for example in examples:
        last = {"role": "assistant", "content": example["completion"]}
        rest = {k: v for k, v in example.items() if k not in ("messages", "completion")}
        dialogues.append({"messages": [*example["messages"], last], **rest})
    write_jsonl(path, dialogues)


# --- the teacher's completions -------------------------------------------------------------------


def ask_teacher(
    rt, teacher, tokenizer, examples, max_new_tokens, samples=1, temperature=1.0, seed=0
):
    """The examples with what the teacher writes, `samples` completions of each, without those that
    don't end, which are counted. Where an answer is known, "right" is what the checker says.
    """
    begin, asked = clock(teacher.device), len(examples) * samples
    room = teacher.cfg.max_position_embeddings
    prompts = [chat_prompt(example, tokenizer) for example in examples]
    fits = [len(prompt) < room for prompt in prompts]
    examples, prompts = (list(itertools.compress(each, fits)) for each in (examples, prompts))
    how = {"samples": samples, "temperature": temperature, "seed": seed}
    completions = sample_together(rt, teacher, tokenizer, prompts, max_new_tokens, **how)
    completed = []
    for n, ids in enumerate(completions):
        example, text = examples[n // samples], as_text(tokenizer, ids)
        if ids[-1] in tokenizer.stop_ids:
            right = is_right(example, text) if "answer" in example else None
            completed.append({**example, "completion": text, "right": right})
    rt.print(
        f"the teacher was asked {len(examples)} prompts in {clock(teacher.device) - begin:.0f} s; "
        f"{asked - len(completed)} of {asked} completions don't end within {max_new_tokens} tokens"
    )
    return completed


def filtered(examples, checked):
    """(examples to learn from, a sentence that counts the others): no two of them are equal, and
    with `checked` none is wrong.
    """
    seen, kept, twice, wrong = set(), [], 0, 0
    for example in examples:
        key = json.dumps([example["messages"], example["completion"]])
        if checked and example.get("right") is False:
            wrong += 1
        elif key in seen:
            twice += 1
        else:
            seen.add(key)
            kept.append(example)
    unchecked = sum(example.get("right") is None for example in kept)
    note = f", {unchecked} of them unchecked: no answer is known" if unchecked else ""
    return kept, (
        f"{wrong} found wrong by the checker, {twice} equal to another, {len(kept)} kept{note}"
    )


# --- rows ----------------------------------------------------------------------------------------


@dataclass
class LabelledRows(Rows):
    """Packed rows (as batches.Packed) with two more masks; all (R, T)."""

    tokens: torch.Tensor
    mask: torch.Tensor  # True on completions
    documents: torch.Tensor
    positions: torch.Tensor
    labelled: torch.Tensor  # True on the completions that are labels
    rationale: torch.Tensor  # True inside of <think>...</think>, the two marks included
    # what the teacher says of the next token, where it was asked beforehand: its K most likely ids
    # (R, T, K), their log-probabilities and that of all others together (R, T, K + 1)
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def __getitem__(self, numbers):
        return self.each(lambda x: x[numbers])

    def where(self):
        """Positions whose next token is trained on, (R, T); n of them are True."""
        return F.pad(self.mask[:, 1:], (0, 1))

    def trained(self, values):
        """`values` (R, T) of the trained tokens themselves, (n,)."""
        return values[:, 1:][self.mask[:, 1:]]


def tokenize(examples, labelled, tokenizer, T):
    """(prompt ids, completion ids, labelled) of the examples that have at most T tokens."""
    tokenized = []
    for example in examples:
        prompt = chat_prompt(example, tokenizer)
        turn = {"role": "assistant", "content": example["completion"]}
        ids, mask = tokenizer.render([*example["messages"], turn])
        last = len(mask) - mask[::-1].index(True)  # some layouts write a line end after the turn
        if last <= T:
            tokenized.append((prompt, ids[len(prompt) : last], labelled))
    return tokenized


def rationale_mask(ids, tokenizer):
    """For each id: does it stand inside of <think>...</think>, the two marks included?"""
    begin, end = (tokenizer.special.get(mark) for mark in ("<think>", "</think>"))
    inside, mask = False, []
    for token in ids:
        inside = inside or token == begin
        mask.append(inside)
        inside = inside and token != end
    return mask


def pack_labelled(tokenized, T, tokenizer):
    """LabelledRows of T tokens from what `tokenize` gives."""
    examples, labels, rationales = [], [], []
    for prompt, completion, labelled in tokenized:
        ids, before, n = prompt + completion, [False] * len(prompt), len(completion)
        examples.append((ids, before + [True] * n))
        labels.append((ids, before + [labelled] * n))
        rationales.append((ids, before + rationale_mask(completion, tokenizer)))
    # where an example goes depends on lengths alone, so that all three are packed alike
    rows, labels, rationales = (
        pack(each, T, tokenizer.pad_id) for each in (examples, labels, rationales)
    )
    return LabelledRows(*rows.tensors(), labels.mask, rationales.mask)
