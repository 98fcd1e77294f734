"""What stands around the training loops of train_vlm.py: stages, shapes, data.

run_stages        one stage, or all of them and the blind model, each in a folder of its own
new_clip          of the shape that the flags ask for
load_pairs        images with their captions, for CLIP
load_dialogues    dialogues about images; load_texts: of text alone
load_items        what the model is asked before and after the last stage
"""

import dataclasses
from pathlib import Path

import torch

from data import village
from nanollm.batches import row_length
from nanollm.config import UserError, save_config
from nanollm.formats import (
    read_captions,
    read_chats,
    read_examples,
    read_image_chats,
    split_documents,
)
from nanollm.metrics import first_of_each_task
from nanollm.peft.adapters import check_method
from nanollm.rollouts import prompt_of
from nanollm.run import check_folders, holds_a_run, make_way
from nanollm.vision.clip import CLIP, TextConfig, caption_tokens
from nanollm.vision.images import GREY, painted, show_images
from nanollm.vision.vit import VisionConfig, ViT
from nanollm.vision.vlm import VLM, image_id_of, load_language

CAPTION = 128  # tokens of the longest caption
SHAPE = ("projector", "feature_layer", "class_token")  # of what align adds to the tower
# stages where these flags mean something
GOES_WITH = {
    "vision": ["align"],
    "blind": ["instruct"],
    "train_vision": ["instruct", "all"],
    "adapter": ["instruct", "all"],
    **dict.fromkeys(SHAPE, ["align", "all"]),
}


# --- stages --------------------------------------------------------------------------------------


def run_stages(cfg, rt, train, defaults, preset):
    """Train --stage; "all": the three and the blind model, one after the other.

    train: {stage: what trains it, called with (cfg, rt)}; defaults: {stage: {flag: its value where
    none was given}}; preset: {flag: the value that --preset sets}. With --resume, finished stages
    of "all" are kept.
    """
    check_flags(cfg, defaults, preset)
    if cfg.stage != "all":
        return run_stage(cfg, rt, train, defaults)
    plan = planned(cfg)
    if not cfg.resume:
        check_plan(cfg, plan)
        rt.barrier()  # before folders are moved, every process has looked at them
        if rt.main:
            for each in plan:
                make_way(Path(each.out))
            save_config(cfg, Path(cfg.out) / "train_config.json")
    rt.barrier()
    for each in plan:
        if not (cfg.resume and (Path(each.out) / "result.json").exists()):
            rt.print(f"\n{each.stage}{' blind' * each.blind}: {each.out}")
            run_stage(each, rt, train, defaults)


def planned(cfg):
    """The settings of each run of --stage all."""
    out = cfg.out
    runs = (
        {"stage": "clip", "out": f"{out}-clip", "test_data": None},
        {"stage": "align", "out": f"{out}-align", "vision": f"{out}-clip"},
        {"stage": "instruct", "out": f"{out}-blind", "init": f"{out}-align", "blind": True},
        {"stage": "instruct", "init": f"{out}-align"},
    )
    return [dataclasses.replace(cfg, **flags) for flags in runs]


def run_stage(cfg, rt, train, defaults):
    """One stage. With --resume, one that was stopped before its first checkpoint begins anew."""
    for folder in filter(None, (cfg.init, cfg.vision)):
        check_folders(folder, cfg.out)
    known = any((Path(cfg.out) / name).exists() for name in ("state.pt", "result.json"))
    own = {k: v for k, v in defaults[cfg.stage].items() if getattr(cfg, k) is None}
    torch.manual_seed(cfg.seed)  # new parameters are the same, whatever ran before
    train[cfg.stage](dataclasses.replace(cfg, resume=cfg.resume and known, **own), rt)


def check_flags(cfg, defaults, preset):
    """Refuse flags that would change nothing, and those that can't go together."""
    for name, stages in GOES_WITH.items():
        given = getattr(cfg, name) != preset.get(name, getattr(type(cfg), name))
        if cfg.resume and name in SHAPE:
            continue  # the last stage of "all" goes on with the settings of all
        if given and cfg.stage not in stages:
            raise UserError(f"--{name} goes with --stage {' or '.join(stages)}, not {cfg.stage}")
    if cfg.stage == "align" and not cfg.vision:
        raise UserError("--stage align needs --vision, the folder of a vision tower")
    if cfg.train_vision and cfg.adapter:
        raise UserError("--train_vision goes with no --adapter, whose folder holds no vision tower")
    if cfg.adapter:
        check_method(cfg.adapter)
    if not 0 <= cfg.replay < 1:
        raise UserError(f"--replay {cfg.replay} is no share: it lies between 0 and 1, 1 excluded")
    pairs, rows = (cfg.batch_size or defaults[s]["batch_size"] for s in ("clip", "instruct"))
    if cfg.stage in ("instruct", "all") and round(cfg.replay * rows) >= rows:
        raise UserError(
            f"--replay {cfg.replay} leaves none of the {rows} rows of a batch to images; lower "
            "it, or raise --batch_size"
        )
    if cfg.stage in ("clip", "all"):
        vision_config(cfg)
        if pairs % cfg.hard_negatives:
            raise UserError(
                f"--hard_negatives {cfg.hard_negatives} doesn't divide --batch_size {pairs}"
            )


def check_plan(cfg, plan):
    """Find what would stop a later stage before the first one has written anything."""
    for each in plan:
        check_folders(cfg.init, each.out)
        holds_a_run(Path(each.out))
    language, tokenizer = load_language(cfg.init)
    vision, image_id = ViT(vision_config(cfg)), image_id_of(tokenizer)
    vlm = VLM(language.cfg, vision, cfg.projector, image_id, cfg.feature_layer, cfg.class_token)
    image_row_length(cfg, vlm)
    if cfg.data != "village":
        for read in (read_captions, read_image_chats):
            load_records(cfg, read, None)
    load_examples(cfg, vlm, tokenizer)


# --- shapes --------------------------------------------------------------------------------------


def vision_config(cfg):
    """The shape of the vision tower that the flags ask for."""
    C = cfg.vision_channels
    heads = max(1, C // 32)
    if cfg.image_size % cfg.patch_size:
        raise UserError(
            f"--patch_size {cfg.patch_size} doesn't divide --image_size {cfg.image_size}; "
            "patches must cover the image, its right and lower edge too"
        )
    if C > 32 and C % 32:
        raise UserError(f"--vision_channels {C} must be a multiple of 32, the channels of a head")
    return VisionConfig(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_size=C,
        intermediate_size=4 * C,
        num_hidden_layers=cfg.vision_layers,
        num_attention_heads=heads,
    )


def new_clip(cfg, tokenizer):
    """A CLIP with new parameters, whose text tower reads this tokenizer's ids."""
    text = TextConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=CAPTION,
        eos_token_id=tokenizer.end_id,
    )
    return CLIP(vision_config(cfg), text, sigmoid=cfg.loss == "siglip")


def image_row_length(cfg, model):
    """T as data.row_length has it; raises UserError where a image leaves no room for text, too."""
    T, image = row_length(cfg, model), model.tokens_per_image
    if T <= image:
        raise UserError(
            f"a image takes {image} tokens, too many for rows of {T}; raise --context, or "
            "choose larger patches or --projector pixel_shuffle"
        )
    return T


# --- data ----------------------------------------------------------------------------------------


def load_records(cfg, read, village_name):
    """(training records, held-out records) of the village's files of this name, or of --data."""
    if cfg.data == "village":
        folder = painted(cfg.image_size, n_train=cfg.images)
        return [read(folder / f"{village_name}_{part}.jsonl") for part in ("train", "val")]
    known = read(cfg.data)
    if cfg.val_data:
        return known, read(cfg.val_data)
    train, val = (split_documents(known, part, cfg.val_fraction) for part in ("train", "val"))
    if not train or not val:
        raise UserError(
            f"{cfg.data} has too few records ({len(known)}) for --val_fraction {cfg.val_fraction}; "
            "add some, or name --val_data"
        )
    return train, val


def load_test(cfg, read, village_name):
    """Test records of --test_data, or the village's of this name, or none."""
    if (cfg.test_data or cfg.data) == "village":
        return read(painted(cfg.image_size, n_train=cfg.images) / f"{village_name}.jsonl")
    return read(cfg.test_data) if cfg.test_data else []


class Pairs:
    """Images and their captions, as CLIP reads them. Every image is opened now, so that a
    damaged one is found now.
    """

    def __init__(self, records, store, tokenizer):
        texts = [record["caption"] for record in records]
        self.tokens = caption_tokens(tokenizer, texts, CAPTION)  # (N, T)
        self.lengths = (self.tokens != tokenizer.pad_id).sum(1)
        self.store = store
        self.numbers = torch.tensor(store.numbers([record["image"] for record in records]))

    def __len__(self):
        return len(self.tokens)

    def batch(self, chosen, device):
        """Images (B, 3, H, W) and captions (B, T), T that of the longest of these."""
        images = self.store.images(self.numbers[chosen].tolist())
        return images.to(device), self.tokens[chosen, : self.lengths[chosen].max()].to(device)


def load_pairs(cfg, store, tokenizer):
    """(training, held-out, test) Pairs; without test data the held-out ones are the test."""
    train, val = load_records(cfg, read_captions, "captions")
    test = load_test(cfg, read_captions, "captions_test") or val
    if cfg.hard_negatives > len(train):
        raise UserError(
            f"--hard_negatives {cfg.hard_negatives} is more than the {len(train)} captions there are"
        )
    return [Pairs(records, store, tokenizer) for records in (train, val, test)]


def load_dialogues(cfg):
    """(training, held-out) dialogues with images: descriptions to align with, then questions."""
    name = "describe" if cfg.stage == "align" else "questions"
    train, val = load_records(cfg, read_image_chats, name)
    if cfg.blind:
        train, val = ([c | {"images": [GREY] * len(c["images"])} for c in p] for p in (train, val))
    return train, val


def load_texts(cfg):
    """Dialogues of text alone."""
    if cfg.text_data == "village":
        return read_chats(village.of_run(cfg.init) / "sft_train.jsonl")
    return read_chats(cfg.text_data)


def load_examples(cfg, model, tokenizer):
    """{"images", "combos", "texts"}: test examples of the last stage; none to align. Raises
    UserError for what the model can't be asked: better now than after training.
    """
    examples = dict.fromkeys(("images", "combos", "texts"), ())
    if cfg.stage == "align":
        return examples
    examples["images"] = load_test(cfg, read_examples, "questions_test")
    if (cfg.test_data or cfg.data) == "village":
        examples["combos"] = load_test(cfg, read_examples, "combos_test")
    if cfg.text_data == "village" and not cfg.blind:
        examples["texts"] = read_examples(village.of_run(cfg.init) / "sft_test.jsonl")
    examples = {
        name: first_of_each_task(each, cfg.test_examples) for name, each in examples.items()
    }
    limit = model.cfg.max_position_embeddings
    for example in (*examples["images"], *examples["combos"]):
        asked = repr(example["messages"][-1].get("content"))
        if not example.get("images"):
            raise UserError(f'--test_data: the item {asked} has no image; add its "image"')
        length = len(prompt_of(example, model, tokenizer))
        if length >= limit:
            raise UserError(
                f"--test_data: the item {asked} has {length} tokens with its images, the model "
                f"reads {limit}; shorten it"
            )
    if examples["images"] and not cfg.blind:
        show_images(examples["images"], None, "shuffled")  # each has another to be swapped with
    return examples
