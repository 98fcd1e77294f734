"""What a student of distillation learns from: labels, and the teacher's answers to prompts. How the
teacher is asked, what the checker says of its answers, and how many of them are dropped.

Records are those of lessons.py. A record with an answer of the teacher has it as "completion", and as
"right" what the checker says of it: True, False, or None where no answer is known.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from nanollm.config import UserError, atomic_write
from nanollm.distillation import (
    as_dialogue,
    load_lessons,
    make_lessons,
    prompt_ids,
    read_lessons,
    tokenize,
)
from nanollm.generate import as_text, check_room, sample_completions
from nanollm.metrics import first_of_each_task
from nanollm.rewards import accuracy
from nanollm.runtime import clock

UNCHECKED = ("soft", "on_policy")  # learn from all answers, by their probabilities: no labels


def ask_teacher(cfg, teacher, tokenizer, records):
    """The records with the teacher's answers, `samples` of each, without those that don't end."""
    completions = sample_completions(
        teacher,
        tokenizer,
        [prompt_ids(record, tokenizer) for record in records],
        cfg.max_new_tokens,
        cfg.samples,
        cfg.sample_temperature,
        generator=torch.Generator(teacher.device).manual_seed(cfg.seed),
    )
    answered = []
    for n, ids in enumerate(completions):
        record, text = records[n // cfg.samples], as_text(tokenizer, ids)
        if ids[-1] in tokenizer.stop_ids:
            right = bool(accuracy(record, text)) if "answer" in record else None
            answered.append({**record, "completion": text, "right": right})
    return answered


def filtered(method, answered):
    """(records that the student learns from, a sentence with the counts)."""
    seen, kept, twice, wrong = set(), [], 0, 0
    for record in answered:
        key = json.dumps([record["messages"], record["completion"]])
        if method not in UNCHECKED and record.get("right") is False:
            wrong += 1
        elif key in seen:
            twice += 1
        else:
            seen.add(key)
            kept.append(record)
    unchecked = sum(record.get("right") is None for record in kept)
    return kept, (
        f"{wrong} found wrong by the checker, {twice} equal to another, {len(kept)} kept"
        + (f", {unchecked} of them unchecked: no answer is known" if unchecked else "")
    )


def teacher_answers(cfg, rt, teacher, tokenizer, records):
    """What the student learns from, beside the labels: records with the teacher's answers."""
    file = Path(cfg.out) / "teacher.jsonl"
    if cfg.resume and file.exists():
        return read_lessons(file) if file.stat().st_size else []
    if cfg.method == "labels" or not records:
        return []
    if cfg.answers:
        answered, count = read_lessons(cfg.answers), ""
        if not all("completion" in record for record in answered):
            raise UserError(f"--answers {cfg.answers}: a dialogue doesn't end with an answer")
    else:
        begin = clock(rt.device)
        answered = [ask_teacher(cfg, teacher, tokenizer, records) if rt.main else None]
        if rt.world > 1:
            dist.broadcast_object_list(answered)
        answered, asked = answered[0], len(records) * cfg.samples
        count = (
            f"{asked} in {clock(rt.device) - begin:.0f} s, {asked - len(answered)} without an end "
            f"within {cfg.max_new_tokens} tokens, "
        )
    kept, counts = filtered(cfg.method, answered)
    rt.print(f"teacher's answers: {count}{counts}")
    return kept


def write_answers(records, path):
    """Keep answers in the chat format, as train_sft.py --data and --answers read them."""
    lines = (json.dumps(as_dialogue(record), ensure_ascii=False) + "\n" for record in records)
    atomic_write(path, "".join(lines))


def check_rationales(cfg, rt, answers):
    """Say how many answers of the teacher have a rationale; refuse where none has."""
    n = sum("<think>" in record["completion"] for record in answers)
    rt.print(f"{n} of the teacher's {len(answers)} answers that were kept have a rationale")
    if not n:
        raise UserError(
            f"--teacher {cfg.teacher} gives no rationale, <think>...</think>, with --data "
            f"{cfg.data}; step_by_step wants one that reasons, and questions of that kind, such as "
            "--teacher runs/grpo --data problems"
        )


def prepare(cfg, rt, teacher, student, tokenizer):
    """(training lessons, ids of all prompts, held-out rows, test examples, the teacher's answers)."""
    labelled, unlabelled, val, examples = load_lessons(cfg)
    examples = first_of_each_task(examples, cfg.test_examples)
    prompts = [prompt_ids(record, tokenizer) for record in labelled + unlabelled]
    for model in (teacher, student):
        every = prompts + [prompt_ids(example, tokenizer) for example in examples]
        check_room(model, every, cfg.max_new_tokens, labelled + unlabelled + examples)
    T = min(cfg.context, *(m.cfg.max_position_embeddings for m in (teacher, student)))
    asked = labelled if cfg.method == "step_by_step" else unlabelled
    own = labelled if cfg.method != "step_by_step" else []
    answers = teacher_answers(cfg, rt, teacher, tokenizer, asked)
    examples = tokenize(own, True, tokenizer, T)
    taught = tokenize(answers, cfg.method not in UNCHECKED, tokenizer, T)
    held_out = tokenize(val, True, tokenizer, T)
    if not own + answers:
        raise UserError(
            f"nothing to learn from: none of the teacher's answers was kept; see whether --teacher "
            f"{cfg.teacher} answers the prompts, or raise --max_new_tokens {cfg.max_new_tokens}"
        )
    if cfg.method == "step_by_step":
        check_rationales(cfg, rt, answers)
    if not examples + taught or not held_out:
        raise UserError(
            f"nothing to learn from: no label and none of the teacher's {len(answers)} answers "
            f"that were kept fits {T} tokens; raise --context"
        )
    lessons = make_lessons(examples + taught, T, tokenizer)
    rt.print(
        f"{len(examples)} labelled examples and {len(taught)} answers of the teacher in "
        f"{len(lessons)} rows of {T} tokens, {len(own) - len(examples)} and "
        f"{len(answers) - len(taught)} left out because they were longer"
    )
    return lessons, prompts, make_lessons(held_out, T, tokenizer).rows, examples, answers
