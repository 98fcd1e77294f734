"""Examples for distillation: labelled ones, and a teacher's completions; packed rows in which each
token knows whether it is a label, and whether it belongs to a rationale.

An example is a dict with "messages" (a prompt: the dialogue up to where the assistant writes) and,
where it is known, "completion" (a label, or what a teacher has written); other keys, such as
"answer" and "check" for the checker, stay. R rows of T tokens, n of which are trained on.
"""

import json
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanollm.batches import Packed, pack
from nanollm.endpoint import Endpoint
from nanollm.formats import Unusable, read_usable, usable, write_jsonl
from nanollm.generate import as_text, sample_together
from nanollm.records import as_chat, as_dialogue, as_prompt, named, plain_text
from nanollm.rewards import is_right
from nanollm.rollouts import chat_prompt, with_room

# --- files ---------------------------------------------------------------------------------------


def read_completions(path):
    """Examples from dialogues, prompts or problems: where a dialogue ends with an answer that is
    to be learnt, that is the "completion". Raises UserError with file and line.
    """

    def as_example(record):
        example, record = as_prompt(record), named(record)
        if record.keys() & {"messages", "completion"} and "chosen" not in record:
            *_, last = as_dialogue(record)["messages"]
            if last["role"] == "assistant" and "loss" not in last:
                as_chat(record)  # is its answer one to learn?
                example["completion"] = plain_text(last)
        return example

    return read_usable(path, as_example)


def write_completions(examples, path):
    """Keep examples in the chat format, as read_completions and train_sft.py --data read them."""
    dialogues = []
    for example in examples:
        last = {"role": "assistant", "content": example["completion"]}
        rest = {k: v for k, v in example.items() if k not in ("messages", "completion")}
        dialogues.append({"messages": [*example["messages"], last], **rest})
    write_jsonl(path, dialogues)


# --- the teacher's completions -------------------------------------------------------------------


def ask_teacher(rt, teacher, tokenizer, examples, max_new_tokens, samples=1, **how):
    """The examples with what the teacher, a model or an Endpoint, writes: `samples` completions of
    each, without those that don't end, which are counted. Where an answer is known, "right" is what
    the checker says.
    """
    if isinstance(teacher, Endpoint):
        begins = [""] * len(examples)
        texts = teacher.complete(rt, examples, max_new_tokens, samples, **how)
    else:
        examples = with_room(examples, lambda e: chat_prompt(e, tokenizer), teacher, 1, "prompts")
        prompts = [chat_prompt(example, tokenizer) for example in examples]
        begins = [tokenizer.begun(prompt) for prompt in prompts]
        made = sample_together(rt, teacher, tokenizer, prompts, max_new_tokens, samples, **how)
        texts = [as_text(tokenizer, ids) if ids[-1] in tokenizer.stop_ids else None for ids in made]
    completed = []
    for n, text in enumerate(texts):
        example, begin = examples[n // samples], begins[n // samples]
        if text is not None:
            right = is_right(example, begin + text) if "answer" in example else None
            completed.append(example | {"completion": text, "right": right})
    rt.print(
        f"the teacher was asked {len(examples)} prompts; {len(texts) - len(completed)} of "
        f"{len(texts)} completions don't end within {max_new_tokens} tokens"
    )
    return completed


def filtered(examples, checked):
    """(examples that are neither empty, nor equal to others, nor if `checked` wrong; a count)."""
    kept, dropped = {}, Counter()
    for example in examples:
        key = json.dumps([example["messages"], example["completion"]])
        if checked and example.get("right") is False:
            dropped["found wrong by the checker"] += 1
        elif not example["completion"].strip():
            dropped["empty"] += 1
        elif key in kept:
            dropped["equal to another"] += 1
        else:
            kept[key] = example
    counts = [f"{n} {reason}" for reason, n in dropped.items()] + [f"{len(kept)} kept"]
    unchecked = sum(example.get("right") is None for example in kept.values())
    if unchecked:
        counts.append(f"{unchecked} of them unchecked: no answer is known")
    return list(kept.values()), ", ".join(counts)


# --- rows ----------------------------------------------------------------------------------------


@dataclass
class LabelledRows(Packed):
    """Packed rows of which more is known; a mask is True on completions."""

    labelled: torch.Tensor | None = None  # (R, T): True on the completions that are labels
    # (R, T): True inside of <think>...</think>, the two marks included
    rationale: torch.Tensor | None = None
    # what the teacher says of the next token, where it was asked beforehand: its K most likely ids
    # (R, T, K), their log-probabilities and that of all others together (R, T, K + 1)
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def where(self):
        """Positions whose next token is trained on, (R, T); n of them are True."""
        return F.pad(self.mask[:, 1:], (0, 1))

    def trained(self, values):
        """`values` (R, T) of the trained tokens themselves, (n,)."""
        return values[:, 1:][self.mask[:, 1:]]


def tokenize(examples, labelled, tokenizer, T, name="examples"):
    """(prompt ids, completion ids, labelled) of the examples that have at most T tokens."""

    def ids_of(example):
        prompt, ids = tokenizer.completion(example["messages"], example["completion"])
        if len(prompt) + len(ids) > T:
            raise Unusable(f"longer than {T} tokens")
        return prompt, ids, labelled

    return usable(examples, ids_of, name, "raise --context, or lower --max_new_tokens")


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
    masks = [[], [], []]  # of what is trained on, of labels, of rationales
    for prompt, completion, labelled in tokenized:
        n, thought = len(completion), rationale_mask(completion, tokenizer)
        for examples, mask in zip(masks, ([True] * n, [labelled] * n, thought)):
            examples.append((prompt + completion, [False] * len(prompt) + mask))
    # where an example goes depends on lengths alone, so that all three are packed alike
    rows, labels, rationales = (pack(examples, T, tokenizer.pad_id) for examples in masks)
    return LabelledRows(**vars(rows), labelled=labels.mask, rationale=rationales.mask)
