"""Questions about images, written by a text model that never sees them: it reads captions.

LLaVA's way to training data (Liu et al. 2023, arXiv:2304.08485, section 3): the teacher is given
a image in words and writes a question with its answer; the image then takes the caption's
place. Differs from the paper: the teacher is small, so it has learnt the form from examples instead
of reading them in its prompt, and not all that it writes is believed:

    village    kept is what the checker finds true of the scene, which the teacher doesn't see
    own data   no truth is known. The teacher answers each of its questions again --agree times
               from the caption; kept is an answer that more than half of these repeat
               (self-consistency: Wang et al. 2022, arXiv:2203.11171)

A image is asked the same thing once, and about no pair of colour and kind that is held out of
training. What the counts say: `true` of `readable` is how good the teacher is, `kept` what remains.

Run     python train_sft.py --preset reader                       # the teacher, from runs/sft
        python -m nanollm.image_teacher runs/reader --out teacher.jsonl
        python train_vlm.py --stage instruct --init runs/vlm-align --data teacher.jsonl \\
            --test_data village --out runs/vlm-teacher
        python -m nanollm.image_teacher runs/reader --data captions.jsonl --out teacher.jsonl
Expect  of 16,000 pairs about 2,000 images 99.3% are readable, 55.5% of these true, 46.7% of all
        kept (seed 0); a model that is trained on them alone gets 92.4% of the questions right
"""

import json
import os
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from data.village.image_examples import READER, TURNS, chat
from data.village.image_questions import TASKS, is_true, names_held_out, read, truth
from data.village.scenes import Scene
from nanollm.config import UserError, atomic_write, cli
from nanollm.formats import read_captions
from nanollm.generate import as_text, sample_completions
from nanollm.hub import load_model
from nanollm.run import check_file
from nanollm.runtime import start
from nanollm.vision.images import painted
from nanollm.vision.vlm import IMAGE

LONGEST = 96  # tokens of a question with its answer
FORM = re.compile(r"Question: (\S.*)\nAnswer: (\S.*)")
REASONS = ("unreadable", "false", "held out", "twice", "contradicted")  # why a pair is dropped


@dataclass
class Config:
    model: str = field(
        default="runs/reader", metadata={"positional": True}
    )  # the teacher: run folder or model folder of a text model
    # village: its captions, and the truth; or JSONL of {"image", "caption"}
    data: str = "village"
    out: str = "teacher.jsonl"  # dialogues with images, for train_vlm.py --data
    samples: int = 4  # questions written per caption, at temperature 1
    limit: int = 2000  # images, the first of --data; 0 for all
    agree: int = 4  # own data: answers that vote on each kept one; 0: believe the teacher
    image_size: int = 96  # pixels per side of the village's images
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision of the layers


class Pair(NamedTuple):
    """What the teacher wrote about the image that the record {"image", "caption"} is of."""

    record: dict
    question: str
    answer: str


# --- the teacher ---------------------------------------------------------------------------------


def prompts_of(records, tokenizer):
    """Ids that ask the teacher for a question about each caption."""
    asked = [chat([READER.format(c=record["caption"])]) for record in records]
    return [tokenizer.render(messages, generation_prompt=True)[0] for messages in asked]


def write_pairs(model, tokenizer, records, samples, generator=None):
    """`samples` completions of the teacher per record, as (record, text); text None without an end."""
    sampling = {"samples": samples, "generator": generator}
    prompts = prompts_of(records, tokenizer)
    completions = sample_completions(model, tokenizer, prompts, LONGEST, **sampling)
    return [
        (records[n // samples], ended_text(tokenizer, ids)) for n, ids in enumerate(completions)
    ]


def ended_text(tokenizer, ids):
    return as_text(tokenizer, ids) if ids[-1] in tokenizer.stop_ids else None


def agreeing(model, tokenizer, pairs, counts, votes, generator=None):
    """The pairs whose answer more than half of `votes` further samples repeat, word for word; in
    `counts`, as sift gives them, the others become "contradicted".
    """
    begun = [tokenizer.encode(f"Question: {pair.question}\nAnswer:") for pair in pairs]
    prompts = [p + b for p, b in zip(prompts_of([pair.record for pair in pairs], tokenizer), begun)]
    sampling = {"samples": votes, "generator": generator}
    completions = sample_completions(model, tokenizer, prompts, LONGEST, **sampling)
    said = [normal(ended_text(tokenizer, ids) or "") for ids in completions]
    kept = []
    for n, pair in enumerate(pairs):
        if said[n * votes : (n + 1) * votes].count(normal(pair.answer)) > votes / 2:
            kept.append(pair)
        else:
            counts[task_of(pair.question)].update({"kept": -1, "contradicted": 1})
    return kept


def fitting(records, tokenizer, context):
    """The records whose caption leaves room in the context for question and answer."""
    prompts = prompts_of(records, tokenizer)
    return [r for r, ids in zip(records, prompts) if len(ids) + LONGEST <= context]


# --- what is kept --------------------------------------------------------------------------------


def parse(text):
    """(question, answer) of a completion in the form that the teacher learnt, or None."""
    found = FORM.fullmatch(text.strip()) if text else None
    return found.groups() if found and IMAGE not in text else None  # that would be a image


def normal(text):
    return " ".join(text.lower().split())


def task_of(question):
    asked = read(question)
    return asked.task if asked else "other"


def reason_against(pair, scene, known):
    """Why the pair is dropped, or None. `known`: what was asked of this image; grows."""
    thing = normal(pair.question)
    if scene is not None:
        if not is_true(scene, pair.question, pair.answer):
            return "false"
        if names_held_out(f"{pair.question} {pair.answer}"):
            return "held out"
        # other words for the same thing: the earlier answer would give away the later
        asked = read(pair.question)
        thing = asked._replace(wording=None), truth(scene, asked)
    if thing in known:
        return "twice"
    known.add(thing)
    return None


def sift(written, scenes=None):
    """(pairs that are kept, {task: Counter of why pairs were dropped, and "kept"}).

    `written`: what write_pairs gives. `scenes`: {image: Scene}, the truth; without it nothing is
    found false or held out.
    """
    kept, counts, known = [], defaultdict(Counter), defaultdict(set)
    for record, text in written:
        parsed = parse(text)
        if parsed is None:
            counts["unreadable"]["unreadable"] += 1
            continue
        pair, image = Pair(record, *parsed), record["image"]
        reason = reason_against(pair, scenes[image] if scenes else None, known[image])
        counts[task_of(pair.question)][reason or "kept"] += 1
        if reason is None:
            kept.append(pair)
    return kept, counts


def dialogues(pairs, folder):
    """Records {"image", "messages"} of up to TURNS questions about a image, in the order of the
    pairs; the image's path counts from the folder of the file that they will stand in.
    """
    by_image = defaultdict(list)
    for pair in pairs:
        by_image[pair.record["image"]].append(pair)
    made = []
    for image, asked in by_image.items():
        path = os.path.relpath(Path(image).resolve(), Path(folder).resolve())
        for first in range(0, len(asked), TURNS):
            part = asked[first : first + TURNS]
            turns = [text for pair in part for text in (pair.question, pair.answer)]
            turns[0] = f"{IMAGE}\n{turns[0]}"
            made.append({"image": Path(path).as_posix(), "messages": chat(turns)})
    return made


# --- the tool ------------------------------------------------------------------------------------


def load_records(cfg):
    """(records {"image", "caption"} of the first --limit images, {image: Scene} or None)."""
    scenes = None
    if cfg.data == "village":
        folder = painted(cfg.image_size)
        records = read_captions(folder / "captions_train.jsonl")
        truths = json.loads((folder / "scenes_train.json").read_text(encoding="utf-8"))
        scenes = {str(folder / each["image"]): Scene.from_dict(each) for each in truths}
    else:
        records = read_captions(cfg.data)
    images = list(dict.fromkeys(record["image"] for record in records))
    if not images:
        raise UserError(f"{cfg.data} holds no captions")
    wanted = set(images[: cfg.limit or None])
    return [record for record in records if record["image"] in wanted], scenes


def summary(counts, seconds, checked):
    """What the counts say, and a table of them by task."""
    total = sum(counts.values(), Counter())
    written = total.total()
    readable = written - total["unreadable"]
    true = readable - total["false"]
    said = f"{written:,} written in {seconds:.0f} s"
    said += f", {readable:,} readable ({readable / written:.1%})"
    if checked:
        said += f", {true:,} of these true ({true / max(1, readable):.1%})"
    lines = [f"{said}, {total['kept']:,} kept ({total['kept'] / written:.1%} of all)"]
    columns = [reason for reason in (*REASONS, "kept") if total[reason]]
    lines.append(f"{'task':12}" + "".join(f"{column:>14}" for column in columns))
    for task in sorted(counts, key=(*TASKS, "other", "unreadable").index):
        cells = "".join(f"{counts[task][column]:>14,}" for column in columns)
        lines.append(f"{task if task != 'unreadable' else '-':12}{cells}")
    return "\n".join(lines)


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    if cfg.agree < 0:
        raise UserError(f"--agree must be at least 0, not {cfg.agree}")
    check_file(cfg.out, cfg.data)
    model, tokenizer = load_model(cfg.model)
    rt.prepare(model, train=False)
    every, scenes = load_records(cfg)
    records = fitting(every, tokenizer, model.cfg.max_position_embeddings)
    if not records:
        raise UserError(
            f"no caption of {cfg.data} leaves {LONGEST} tokens for question and answer in the "
            f"teacher's context of {model.cfg.max_position_embeddings}"
        )
    print(f"{len(records)} captions, {len(every) - len(records)} more are too long for the teacher")
    generator, begin = torch.Generator(rt.device).manual_seed(cfg.seed), time.monotonic()
    pairs, counts = sift(write_pairs(model, tokenizer, records, cfg.samples, generator), scenes)
    if scenes is None:
        rule = "what the teacher repeats is kept" if cfg.agree else "all that is readable is kept"
        print(f"nothing says what is true of these images: {rule}")
        if cfg.agree:
            pairs = agreeing(model, tokenizer, pairs, counts, cfg.agree, generator)
    print(summary(counts, time.monotonic() - begin, scenes is not None))
    if not pairs:
        raise UserError(
            f"nothing that {cfg.model} wrote can be kept, so {cfg.out} is not written; a teacher "
            "is made by: python train_sft.py --preset reader"
        )
    made = dialogues(pairs, Path(cfg.out).parent)
    atomic_write(Path(cfg.out), "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in made))
    print(f"{cfg.out}: {len(pairs):,} questions in {len(made):,} dialogues; train_vlm.py --data")


if __name__ == "__main__":
    cli(main, Config)
