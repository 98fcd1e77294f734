"""A vision-language model: a language model learns to see, in three stages.

    clip      pictures and captions become vectors that lie close together (nanollm/clip.py)
              loss = (CE(s, diagonal) + CE(s^T, diagonal)) / 2,  s_ij = t x_i . y_j
              Radford et al. 2021, CLIP, arXiv:2103.00020, figure 3; or --loss siglip:
              Zhai et al. 2023, 2303.15343, equation 1
    align     the vision tower's features become tokens of the language model: a projector alone
              learns, from captions; everything else is frozen
    instruct  projector and language model learn from questions about pictures
              loss = - sum_t m_t log p(x_t | pictures, x_<t) / sum_t m_t, as in train_sft.py
              Liu et al. 2023, LLaVA, 2304.08485, section 4.2; Liu et al. 2023, 2310.03744

The model is nanollm/vlm.py, the tower nanollm/vision.py. Rows of text alone (--replay) stand in the
batches of the last stage, against forgetting. A model proves that it looks by the one that can't:
--blind trains it in the same way on grey pictures; what that one gets right can be guessed.

Run     python train_vlm.py                           # all three, and the blind model: runs/vlm
        python train_vlm.py --stage clip --out runs/clip
        python train_vlm.py --stage align --vision runs/clip --out runs/align
        python train_vlm.py --stage instruct --init runs/align --out runs/seeing
        python train_vlm.py --stage align --vision path/to/clip-vit-base-patch32 --out runs/align
        python -m nanollm.chat runs/vlm --image scene.png
Needs   runs/sft                                             (python train_sft.py)
Expect  see README.md: accuracy by kind of question, with the right picture, another and none
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data import village_pictures
from nanollm.adapter_runs import start_adapter
from nanollm.clip import (
    CLIP,
    TextConfig,
    caption_tokens,
    clip_loss,
    retrieval,
    save_clip,
    siglip_loss,
)
from nanollm.config import UserError, cli, save_config
from nanollm.data import Sampler
from nanollm.evaluate import first_of_each_family, read_items, table, village_of
from nanollm.formats import read_chats, split_documents
from nanollm.gpt import document_mask
from nanollm.hub import load_model
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.picture_data import (
    GREY,
    PictureStore,
    pack_picture_chats,
    read_captions,
    read_picture_chats,
)
from nanollm.pictures import Preprocessing
from nanollm.run import Run, check_folders, set_aside
from nanollm.runtime import start
from nanollm.tokenizer import Tokenizer
from nanollm.vision import VisionConfig
from nanollm.vlm import VLM
from nanollm.vlm_figures import (
    blind_figures,
    keep_samples,
    picture_figures,
    picture_table,
    summary,
    text_figures,
)
from nanollm.vlm_files import build_vlm
from train_sft import sft_loss


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: 224 pixels, one GPU
    preset: str = "tiny"
    # clip, align, instruct, or all: the three and the blind model, in folders beside --out
    stage: Literal["all", "clip", "align", "instruct"] = "all"
    # -- Start
    # language model (clip takes its tokenizer); for instruct the run folder of align
    init: str = "runs/sft"
    vision: str | None = None  # for align: folder of a vision tower, ours or Hugging Face's
    # -- Data
    # village: its pictures; or JSONL of {"image", "caption"} (clip) or of dialogues with pictures,
    # ours or LLaVA's (see data/README.md)
    data: str = "village"
    val_data: str | None = None  # held-out records; default: the last --val_fraction of --data
    val_fraction: float = 0.05  # share of --data that is held out
    # test items; default, and village: the village's own, where --data is the village's
    test_data: str | None = None
    test_items: int = 48  # items per family, of text and of pictures
    text_data: str = "village"  # for instruct: dialogues of text alone, against forgetting
    replay: float = 0.25  # share of the rows that these are
    blind: bool = False  # for instruct: a grey picture in place of each
    context: int | None = None  # row length T; default: 256, or the model's context if shorter
    # -- Model
    picture_size: int = 64  # pixels per side that the vision tower reads
    patch_size: int = 8  # pixels per side of a patch
    vision_layers: int = 4
    vision_channels: int = 128
    loss: Literal["clip", "siglip"] = "clip"  # of the first stage
    projector: Literal["linear", "mlp", "pixel_shuffle"] = "mlp"
    feature_layer: int = -2  # whose states the projector reads, as LLaVA; -1: the last layer's
    train_vision: bool = False  # for instruct: the vision tower learns too
    # for instruct: train an adapter instead of the language model (lora, dora, qlora)
    adapter: str | None = None
    rank: int = 16  # r of the adapter
    alpha: float = 32.0  # what it learns counts alpha / r
    # -- Training
    out: str = "runs/vlm"  # run folder to write
    steps: int | None = None  # optimizer steps; default: by stage
    batch_size: int | None = None  # pairs (clip) or rows per optimizer step; default: by stage
    accumulate: int = 1  # parts that a process splits its rows into, to save memory; not for clip
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    lr: float | None = None  # learning rate of Muon; default: by stage
    adam_lr: float | None = None  # learning rate of AdamW; default: by stage
    weight_decay: float = 0.0  # on matrices and embeddings
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 20  # steps of linear warm-up
    clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 100  # steps between evaluations, each followed by a checkpoint
    # -- Machine
    seed: int = 0  # of new parameters and of the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    # precision of the layers; weights stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False  # torch.compile: about half a minute to start, then faster
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


PRESETS = {
    "smoke": {
        "steps": 6,
        "batch_size": 8,
        "eval_every": 3,
        "warmup": 2,
        "test_items": 2,
    },
    "tiny": {},
    "gpu": {
        "picture_size": 224,
        "patch_size": 14,
        "vision_layers": 12,
        "vision_channels": 512,
        "projector": "pixel_shuffle",
        "context": 1024,
        "compile": True,
    },
}
CAPTION = 128  # tokens of the longest caption
BY_STAGE = {
    "clip": {"steps": 120, "batch_size": 128, "lr": 0.01, "adam_lr": 2e-3},
    "align": {"steps": 100, "batch_size": 16, "lr": 0.0, "adam_lr": 3e-3},
    "instruct": {"steps": 400, "batch_size": 16, "lr": 0.007, "adam_lr": 1e-3},
}


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    if cfg.stage == "all":
        all_stages(cfg, rt)
    else:
        STAGES[cfg.stage](with_defaults(cfg), rt)
    rt.close()


def with_defaults(cfg):
    """The settings with those of the stage where none were given."""
    own = BY_STAGE[cfg.stage]
    return dataclasses.replace(cfg, **{k: v for k, v in own.items() if getattr(cfg, k) is None})


def all_stages(cfg, rt):
    """The three stages and the blind model, one after the other, each in a folder of its own."""
    out = cfg.out
    check_folders(cfg.init, out)
    plan = {
        f"{out}-clip": {"stage": "clip"},
        f"{out}-align": {"stage": "align", "vision": f"{out}-clip"},
        f"{out}-blind": {"stage": "instruct", "init": f"{out}-align", "blind": True},
        out: {"stage": "instruct", "init": f"{out}-align"},
    }
    if rt.main and not cfg.resume:
        for folder in map(Path, plan):
            if folder.exists() and any(folder.iterdir()):
                set_aside(folder)
        Path(out).mkdir(parents=True)
        save_config(cfg, Path(out) / "train_config.json")
    rt.barrier()
    for folder, flags in plan.items():
        if cfg.resume and (Path(folder) / "result.json").exists():
            continue
        rt.print(f"\n{flags['stage']}{' blind' * ('blind' in flags)}: {folder}")
        resume = cfg.resume and (Path(folder) / "state.pt").exists()
        one = dataclasses.replace(cfg, out=folder, resume=resume, **flags)
        STAGES[one.stage](with_defaults(one), rt)


# --- data ----------------------------------------------------------------------------------------


def load_records(cfg, read, village_name):
    """(training records, held-out records) of the village's files of this name, or of --data."""
    if cfg.data == "village":
        folder = village_pictures.prepare(size=cfg.picture_size)
        return [read(folder / f"{village_name}_{part}.jsonl") for part in ("train", "val")]
    train = read(cfg.data)
    if cfg.val_data:
        return train, read(cfg.val_data)
    return [split_documents(train, part, cfg.val_fraction) for part in ("train", "val")]


def load_test(cfg, read, village_name):
    """Test records: --test_data, or the village's of this name; None where there are none."""
    if (cfg.test_data or cfg.data) == "village":
        return read(village_pictures.prepare(size=cfg.picture_size) / f"{village_name}.jsonl")
    return read(cfg.test_data) if cfg.test_data else None


def load_items(cfg):
    """{"pictures", "combos", "texts"}: test items of the last stage; none in the others."""
    items = dict.fromkeys(("pictures", "combos", "texts"), ())
    if cfg.stage != "instruct":
        return items
    items["pictures"] = load_test(cfg, read_items, "questions_test") or ()
    if (cfg.test_data or cfg.data) == "village":
        items["combos"] = load_test(cfg, read_items, "combos_test")
    if cfg.text_data == "village":
        items["texts"] = read_items(village_of(cfg.init) / "sft_test.jsonl")
    return {name: first_of_each_family(each, cfg.test_items) for name, each in items.items()}


def load_texts(cfg):
    """Dialogues of text alone."""
    if cfg.text_data == "village":
        return read_chats(village_of(cfg.init) / "sft_train.jsonl")
    return read_chats(cfg.text_data)


# --- clip ----------------------------------------------------------------------------------------


def gathered(x, world):
    """Rows (B / world, E) of every process -> (B, E), with gradients: a contrastive loss compares
    across the whole batch. Each process computes the same loss, and its gradient comes from its own
    rows in every copy; DDP's mean over the copies is then the gradient of one.
    """
    return x if world == 1 else torch.cat(torch.distributed.nn.functional.all_gather(x))


def caption_ids(tokenizer, records):
    """(N, T) ids of the records' captions."""
    return caption_tokens(tokenizer, [record["caption"] for record in records], CAPTION)


def contrastive_loss(clip, pictures, texts):
    if clip.logit_bias is None:
        return clip_loss(pictures, texts, clip.logit_scale)
    return siglip_loss(pictures, texts, clip.logit_scale, clip.logit_bias)


@torch.no_grad()
def retrieved(clip, store, records, tokens, among=64):
    """Top-1 retrieval among `among` held-out pairs, the mean over as many such groups as there are.
    """
    clip.eval()
    n = min(among, len(records))
    groups = []
    for i in range(0, len(records) - n + 1, n):
        pictures = store.of([r["image"] for r in records[i : i + n]]).to(clip.device)
        groups.append(retrieval(*clip(pictures, tokens[i : i + n].to(clip.device))))
    clip.train()
    return {key: sum(group[key] for group in groups) / len(groups) for key in groups[0]}


def train_clip(cfg, rt):
    check_folders(cfg.init, cfg.out)
    tokenizer = Tokenizer.load(cfg.init)
    preprocessing = Preprocessing(size=cfg.picture_size)
    store = PictureStore(preprocessing)
    records = load_records(cfg, read_captions, "captions")
    captions = partial(caption_ids, tokenizer)
    tokens = [captions(part) for part in records]
    numbers = torch.tensor(store.numbers([r["image"] for r in records[0]]))
    lengths = (tokens[0] != tokenizer.pad_id).sum(1)
    C = cfg.vision_channels
    model = CLIP(
        VisionConfig(
            image_size=cfg.picture_size,
            patch_size=cfg.patch_size,
            hidden_size=C,
            intermediate_size=4 * C,
            num_hidden_layers=cfg.vision_layers,
            num_attention_heads=max(1, C // 32),
        ),
        TextConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=CAPTION,
            eos_token_id=tokenizer.end_id,
        ),
        sigmoid=cfg.loss == "siglip",
    )
    rt.print(
        f"{len(records[0])} captions of {len(store)} pictures; vision tower of "
        f"{sum(p.numel() for p in model.vision_model.parameters()):,} parameters"
    )
    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    called = rt.prepare(model, cfg.compile)
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.adam_lr, cfg.weight_decay)
    sampler, scaler = Sampler(len(records[0]), cfg.seed), rt.scaler()
    trained = [model, optimizers, [sampler], scaler]
    run.restore(*trained)

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        batch = sampler.take(cfg.batch_size)[share]
        pictures = store.pictures(numbers[batch].tolist()).to(rt.device)
        texts = tokens[0][batch, : lengths[batch].max()].to(rt.device)
        x, y = (gathered(each, rt.world) for each in called(pictures, texts))
        loss = contrastive_loss(model, x, y)
        scaler.scale(loss).backward()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        run.check_finite(loss.item())
        optimizers.step(scaler)
        model.limit_scale()
        run.advance()

        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            run.log(show=("loss",), loss=loss.item(), grad_norm=norm.item())
        if run.step % cfg.eval_every == 0 or last:
            found = retrieved(model, store, records[1], tokens[1])
            run.log(**found, show=tuple(found))
            run.export(model, tokenizer, partial(save_clip, preprocessing=preprocessing))
            run.checkpoint(*trained)
    run.close()
    run.draw_curves("loss", y_label="contrastive loss")
    test = load_test(cfg, read_captions, "captions_test") or records[1]
    found = retrieved(model, store, test, captions(test))
    speed = run.speed() | {"pictures_per_second": cfg.steps * cfg.batch_size / run.elapsed}
    run.write_result(**found, **speed)
    rt.print(
        f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s; the right one among 64 held-out: "
        f"picture to text {found['picture_to_text']:.1%}, text to picture "
        f"{found['text_to_picture']:.1%} (chance 1.6%)"
    )


# --- align and instruct --------------------------------------------------------------------------


def start_model(cfg, rt):
    """(model, tokenizer), and of the model only what the stage trains is not frozen."""
    if cfg.stage == "align":
        if not cfg.vision:
            raise UserError("--stage align needs --vision, the folder of a vision tower")
        model, tokenizer = build_vlm(cfg.init, cfg.vision, cfg.projector, cfg.feature_layer)
        model.train_parts()
        return model, tokenizer
    model, tokenizer = load_model(cfg.init)
    if not isinstance(model, VLM):
        raise UserError(
            f"{cfg.init} holds a language model without eyes; --stage instruct begins from the "
            "run folder of --stage align"
        )
    start_adapter(model, cfg, rt)
    if not cfg.adapter:
        model.train_parts(vision=cfg.train_vision, language=True)
    return model, tokenizer


def load_dialogues(cfg):
    """(training, held-out) dialogues with pictures: descriptions, and then questions too."""
    train, val = load_records(cfg, read_picture_chats, "describe")
    if cfg.stage == "instruct" and cfg.data == "village":
        asked, asked_val = load_records(cfg, read_picture_chats, "questions")
        train, val = asked + train[::4], asked_val  # a few descriptions keep it describing
    if cfg.blind:
        train, val = ([c | {"images": [GREY] * len(c["images"])} for c in p] for p in (train, val))
    return train, val


def packed_logits(model, rows, store):
    """Logits (B, T, V) of packed rows with their pictures."""
    pictures = store.pictures(rows.picture_numbers())
    if pictures is not None:
        pictures = pictures.to(rows.tokens.device)
    mask = document_mask(rows.documents)
    return model(rows.tokens, rows.positions, mask, pictures=pictures)


@torch.no_grad()
def validation_loss(model, rows, store, batch=32):
    """Nats per trained token on held-out packed rows."""
    model.eval()
    total = 0.0
    for numbers in torch.arange(len(rows)).split(batch):
        part = rows.rows(numbers).to(model.device)
        total += sft_loss(packed_logits(model, part, store), part.tokens, part.mask).item()
    model.train()
    return total / rows.mask[:, 1:].sum().item()


def train_language(cfg, rt):
    check_folders(cfg.init, cfg.out)
    if not 0 <= cfg.replay < 1:
        raise UserError(f"--replay {cfg.replay} is no share: it lies between 0 and 1, 1 excluded")
    model, tokenizer = start_model(cfg, rt)
    T = cfg.context or min(256, model.cfg.max_position_embeddings)
    if T > model.cfg.max_position_embeddings:
        raise UserError(
            f"--context {T} is beyond the model's context of {model.cfg.max_position_embeddings}"
        )
    store = PictureStore(model.preprocessing)
    chats, val_chats = load_dialogues(cfg)
    pack = partial(pack_picture_chats, tokenizer=tokenizer, T=T, vlm=model, store=store, rt=rt)
    train_rows, val_rows = pack(chats, name="training"), pack(val_chats, name="held-out")
    n_texts = round(cfg.replay * cfg.batch_size) if cfg.stage == "instruct" else 0
    text_rows = pack(load_texts(cfg), name="text") if n_texts else train_rows
    items = load_items(cfg)

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    called = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.adam_lr, cfg.weight_decay)
    samplers = [Sampler(len(train_rows), cfg.seed), Sampler(len(text_rows), cfg.seed + 1)]
    scaler = rt.scaler()
    trained = [model, optimizers, samplers, scaler]
    before = run.restore(*trained)
    if not before:
        before = {"texts": text_figures(model, tokenizer, items["texts"])}
    since, seen = 0, 0

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        rows = train_rows.rows(samplers[0].take(cfg.batch_size - n_texts))
        rows = rows.join(text_rows.rows(samplers[1].take(n_texts))).rows(share).to(rt.device)
        count = rt.sum(rows.mask[:, 1:].sum().item())  # trained tokens of the whole batch
        loss = 0.0
        parts = torch.arange(len(rows)).chunk(cfg.accumulate)
        for i, numbers in enumerate(parts):
            part = rows.rows(numbers)
            with rt.accumulating(called, more=i + 1 < len(parts)):
                logits = packed_logits(called, part, store)
                part_loss = sft_loss(logits, part.tokens, part.mask) / count
                # times the number of processes, by which DDP's mean divides
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        loss = rt.sum(loss.item())
        run.check_finite(loss)
        optimizers.step(scaler)
        run.advance()

        since += cfg.batch_size * T
        seen += len(rows.picture_numbers())
        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            run.log(since, show=("loss",), loss=loss, grad_norm=norm.item(), pictures=seen)
            since = 0
        if run.step % cfg.eval_every == 0 or last:
            val_loss = validation_loss(model, val_rows, store)
            run.check_finite(val_loss, "held-out loss")
            run.log(val_loss=val_loss, show=("val_loss",))
            run.export(model, tokenizer)
            run.checkpoint(*trained, **before)
    finish(cfg, rt, run, model, tokenizer, store, items, before)


def finish(cfg, rt, run, model, tokenizer, store, items, before):
    """Measure, print what was learnt, and keep it in result.json."""
    run.close()
    run.draw_curves("loss", "val_loss")
    texts = text_figures(model, tokenizer, items["texts"])
    result = {"texts": {"before": before["texts"], "after": texts}, **run.speed()}
    if texts:
        rt.print(table({"text before": before["texts"], "after": texts}))
    if items["pictures"]:
        found, replies = picture_figures(
            model, tokenizer, store, items["pictures"], items["combos"], cfg.blind
        )
        blind = None if cfg.blind else blind_figures(cfg.out)
        result |= {"pictures": found, "blind": blind}
        rt.print(picture_table(found, blind))
        rt.print(summary(found, blind))
        if rt.main:
            keep_samples(run.folder / "pictures.json", items["pictures"], replies)
    run.write_result(**result)
    rt.print(
        f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s, median "
        f"{run.speed()['tokens_per_second']:,.0f} tokens/s"
    )


STAGES = {"clip": train_clip, "align": train_language, "instruct": train_language}

if __name__ == "__main__":
    cli(main, Config, PRESETS)
