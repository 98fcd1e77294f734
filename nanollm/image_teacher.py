"""Questions about images, written by a text model that never sees them: it reads captions.

LLaVA's way to training data (Liu et al. 2023, arXiv:2304.08485, section 3): the teacher reads an
image in words and writes a question with its answer; then the image takes the caption's place. Our
teacher is small: it has learnt the form from examples, and not all that it writes is true. Of the
village's images is kept what the checker finds true of the scene, and no pair of colour and kind
that training never sees; of other images, as in LLaVA, every question with an answer.

Run     python train_sft.py --preset reader                       # the teacher, from runs/sft
        python -m nanollm.image_teacher runs/reader --out teacher.jsonl
        python train_vlm.py --stage instruct --init runs/vlm-align --data teacher.jsonl \
            --test_data village --out runs/vlm-teacher
Expect  of 16,000 pairs about 2,000 images 99.3% are readable, 55.5% of these true, 46.7% of all
        kept (seed 0); a model that is trained on them alone gets 92.4% of the questions right
        (of nine tasks, measured before `coloured` was the tenth)
"""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.village import images as village_images
from data.village.image_questions import is_true, names_held_out, read, truth
from data.village.images import READER, TURNS
from data.village.scenes import Scene
from data.village.tasks import chat
from nanollm.config import ModelConfig, UserError, Whole, cli
from nanollm.formats import IMAGE, write_jsonl
from nanollm.generate import as_text, sample_completions
from nanollm.hub import load_model
from nanollm.metrics import table
from nanollm.records import read_captions
from nanollm.rollouts import with_room
from nanollm.run import check_file
from nanollm.runtime import start

LONGEST = 96  # tokens of a question with its answer
FORM = re.compile(r"Question: (\S.*)\nAnswer: (\S.*)")


@dataclass
class Config(ModelConfig):
    # the teacher: run folder or model folder of a text model
    model: str = field(default="runs/reader", metadata={"positional": True})
    # village: its captions, and the truth; or JSONL of {"image", "caption"}
    data: str = "village"
    out: str = "teacher.jsonl"  # dialogues with images, for train_vlm.py --data
    samples: Whole[1] = 4  # questions written per caption, at temperature 1
    limit: Whole[0] = 2000  # images, the first of --data; 0: all
    image_size: Whole[1] = 96  # pixels per side of the village's images


def load_records(cfg):
    """(records {"image", "caption"} of the first --limit images, {image: Scene} or {})."""
    path, scenes = cfg.data, {}
    if cfg.data == "village":
        folder = village_images.prepare(size=cfg.image_size)
        path, truths = folder / "captions_train.jsonl", folder / "scenes_train.json"
        for each in json.loads(truths.read_text(encoding="utf-8")):
            scenes[str(folder / each["image"])] = Scene.from_dict(each)
    records = read_captions(path)
    images = dict.fromkeys(record["image"] for record in records)
    wanted = {*list(images)[: cfg.limit or None]}
    return [record for record in records if record["image"] in wanted], scenes


def sift(written, scenes):
    """([(image, question, answer)] that are kept, Counter of what became of all) of (image, text)
    that the teacher wrote. scenes: {image: Scene}, the truth; without it nothing is false.
    """
    kept, counts = {}, Counter()
    for image, text in written:
        found, scene = FORM.fullmatch(text.strip()), scenes.get(image)
        if not found or IMAGE in text:
            counts["unreadable"] += 1
        elif scene and not is_true(scene, *found.groups()):
            counts["false"] += 1
        elif scene and names_held_out(text):
            counts["held out"] += 1
        else:
            question, answer = found.groups()
            asked = " ".join(question.lower().split())
            if scene:  # in other words the same: the earlier answer would give away the later
                asked = read(question)._replace(wording=None), truth(scene, read(question))
            counts["twice" if (image, asked) in kept else "kept"] += 1
            kept.setdefault((image, asked), (image, question, answer))
    return list(kept.values()), counts


def dialogues(pairs):
    """Records of up to TURNS questions about an image each."""
    by_image = defaultdict(list)
    for image, *turns in pairs:
        by_image[str(Path(image).resolve())] += turns
    return [
        {"image": image, "messages": chat([f"{IMAGE}\n{first}", *others])}
        for image, turns in by_image.items()
        for first, *others in (turns[i : i + 2 * TURNS] for i in range(0, len(turns), 2 * TURNS))
    ]


def main(cfg):
    check_file(cfg.out, cfg.data)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    model, tokenizer = load_model(cfg.model)
    rt.prepare(model, train=False)
    generator = torch.Generator(rt.device).manual_seed(cfg.seed)

    def prompt(record):
        asked = chat([READER.format(c=record["caption"])])
        return tokenizer.render(asked, generation_prompt=True)[0]

    records, scenes = load_records(cfg)
    records = with_room(records, prompt, model, LONGEST, "captions")
    how = dict(max_new_tokens=LONGEST, samples=cfg.samples, generator=generator)
    made = sample_completions(model, tokenizer, list(map(prompt, records)), **how)
    ended = (ids if ids[-1] in tokenizer.stop_ids else [] for ids in made)
    images = [record["image"] for record in records for _ in range(cfg.samples)]
    pairs, counts = sift(zip(images, [as_text(tokenizer, ids) for ids in ended]), scenes)
    print(table(["questions written", f"{len(made):,}"], counts.items()))
    if not pairs:
        raise UserError(
            f"nothing that {cfg.model} wrote can be kept, so {cfg.out} is not written; a teacher "
            "is made by: python train_sft.py --preset reader"
        )
    chats = dialogues(pairs)
    write_jsonl(cfg.out, chats)
    print(f"{cfg.out}: {len(pairs):,} questions in {len(chats):,} dialogues; train_vlm.py --data")


if __name__ == "__main__":
    cli(main, Config)
