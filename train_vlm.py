"""A vision-language model: a language model learns to see, in three stages.

    clip      images and captions become vectors that lie close together (nanollm/vision/clip.py)
              loss = (CE(s, diagonal) + CE(s^T, diagonal)) / 2,  s_ij = t x_i . y_j
              Radford et al. 2021, CLIP, arXiv:2103.00020, figure 3; or --loss siglip:
              Zhai et al. 2023, 2303.15343, equation 1
    align     the vision tower's features become tokens of the language model: a projector alone
              learns, from descriptions; everything else is frozen
    instruct  projector and language model learn from questions about images
              loss = - sum_t m_t log p(x_t | images, x_<t) / sum_t m_t, as in train_sft.py
              Liu et al. 2023, LLaVA, 2304.08485, section 4.2; Liu et al. 2023, 2310.03744

The model is nanollm/vision/vlm.py, the tower nanollm/vision/vit.py; nanollm/vlm_runs.py reads the data and
runs the stages one after the other. Rows of text alone (--replay) stand in the batches of the last
stage, against forgetting. A model proves that it looks by the one that can't: --blind trains it in
the same way on grey images; what that one gets right can be guessed.

Run     python train_vlm.py                           # all three, and the blind model: runs/vlm
        python train_vlm.py --stage all --resume      # after a kill: finished stages are kept
        python train_vlm.py --stage clip --out runs/clip
        python train_vlm.py --stage align --vision runs/clip --out runs/align
        python train_vlm.py --stage instruct --init runs/align --out runs/seeing
        python train_vlm.py --stage align --vision path/to/clip-vit-base-patch32 --out runs/align
        python -m nanollm.chat runs/vlm --image scene.png
Needs   runs/sft                                             (python train_sft.py)
Expect  see README.md: accuracy by kind of question, with the right image, another and none
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from nanollm.batches import Sampler, Windows
from nanollm.config import UserError, cli
from nanollm.gpt import document_mask
from nanollm.hub import load_model
from nanollm.metrics import table
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.peft.adapters import start_adapter
from nanollm.run import Run
from nanollm.runtime import start
from nanollm.tokenizer import Tokenizer
from nanollm.vision.clip import clip_loss, of_all_processes, save_clip, siglip_loss
from nanollm.vision.images import ImageStore, Preprocessing, pack_image_chats
from nanollm.vision.vlm import VLM, build_vlm
from nanollm.vlm_figures import (
    blind_figures,
    image_figures,
    image_table,
    keep_samples,
    retrieved,
    summary,
    text_figures,
    with_others_images,
)
from nanollm.vlm_runs import (
    image_row_length,
    load_dialogues,
    load_examples,
    load_pairs,
    load_texts,
    new_clip,
    run_stages,
)
from train_sft import load_replay, replay_rows, sft_loss, validation_loss


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
    # village: its images; or JSONL of {"image", "caption"} (clip) or of dialogues with images,
    # ours or LLaVA's (see data/README.md)
    data: str = "village"
    images: int = 6000  # how many the village paints for training
    val_data: str | None = None  # held-out records; none: the last --val_fraction of --data
    val_fraction: float = 0.05  # share of --data that is held out
    # images to be tested on: test examples, each with an "image" (instruct), or captions (clip), or
    # village; none: the village's own, or for another --data no test
    test_data: str | None = None
    test_examples: int = 48  # items per task, of text and of images
    # for instruct, against forgetting: share of the rows without images, a quarter of them plain
    # text, the others dialogues
    replay: float = 0.4
    text_data: str = "village"  # those dialogues: the village's, or a JSONL file
    replay_data: str = "village"  # that plain text: the village's, or a .txt or .jsonl file
    blind: bool = False  # for instruct: grey in place of each image, in training and tests
    context: int | None = None  # row length T; none: 256, or the model's context if shorter
    # -- Model
    image_size: int = 96  # pixels per side that the vision tower reads
    patch_size: int = 16  # pixels per side of a patch
    vision_layers: int = 4  # of the vision tower
    vision_channels: int = 128  # of the vision tower; 32 per head
    loss: Literal["clip", "siglip"] = "clip"  # of the first stage
    # for clip: so many captions that stand one below the other in the file come into a batch
    # together; the village's are of images that differ in one thing each, so that the tower has
    # to look at everything
    hard_negatives: int = 4
    # from the tower's features to the language model's tokens; pixel_shuffle joins four patches
    projector: Literal["linear", "mlp", "pixel_shuffle"] = "mlp"
    feature_layer: int = -1  # whose states the projector reads; -1: the last layer's; LLaVA: -2
    class_token: bool = True  # the projector reads the tower's summary of the image as well
    train_vision: bool = False  # for instruct: the vision tower learns too
    # for instruct: train an adapter instead of the language model (lora, dora, qlora)
    adapter: str | None = None
    rank: int = 16  # r of the adapter
    alpha: float = 32.0  # what it learns counts alpha / r
    # -- Training
    out: str = "runs/vlm"  # run folder to write
    steps: int | None = None  # optimizer steps; none: by stage
    batch_size: int | None = None  # pairs (clip) or rows per optimizer step; none: by stage
    accumulate: int = 1  # parts that a process splits its rows into, to save memory; not for clip
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    muon_lr: float | None = None  # learning rate of Muon; none: by stage
    lr: float | None = None  # learning rate of AdamW; none: by stage
    weight_decay: float | None = None  # on matrices and embeddings; none: by stage
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 20  # steps of linear warm-up
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 300  # steps between evaluations, each followed by a checkpoint
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
        "images": 100,
        "steps": 6,
        "batch_size": 8,
        "eval_every": 3,
        "warmup": 2,
        "test_examples": 2,
    },
    "tiny": {},
    "gpu": {
        "image_size": 224,
        "patch_size": 14,
        "vision_layers": 12,
        "vision_channels": 512,
        "projector": "pixel_shuffle",
        "class_token": False,
        "context": 1024,
        "compile": True,
    },
}
BY_STAGE = {  # where a flag says none
    "clip": {"steps": 250, "batch_size": 128, "muon_lr": 0.01, "lr": 2e-3, "weight_decay": 1.0},
    "align": {"steps": 150, "batch_size": 8, "muon_lr": 0.05, "lr": 5e-3, "weight_decay": 0.0},
    "instruct": {"steps": 850, "batch_size": 10, "muon_lr": 0.01, "lr": 3e-3, "weight_decay": 0.0},
}


# --- clip ----------------------------------------------------------------------------------------


def contrastive_loss(clip, images, texts):
    if clip.logit_bias is None:
        return clip_loss(images, texts, clip.logit_scale)
    return siglip_loss(images, texts, clip.logit_scale, clip.logit_bias)


def train_clip(cfg, rt):
    tokenizer = Tokenizer.load(cfg.init)
    preprocessing = Preprocessing(size=cfg.image_size)
    train, val, test = load_pairs(cfg, ImageStore(preprocessing), tokenizer)
    rt.print(f"{len(train)} captions of {len(train.numbers.unique())} images")
    model = new_clip(cfg, tokenizer)
    parameters = sum(p.numel() for p in model.vision_model.parameters())
    rt.print(f"vision tower of {parameters:,} parameters")

    share = rt.share(cfg.batch_size)
    run = Run(cfg, rt, cfg.steps)
    ddp_model = rt.prepare(model, cfg.compile)
    optimizers = build_optimizers(model, cfg.optimizer, cfg.muon_lr, cfg.lr, cfg.weight_decay)
    sampler, scaler = Sampler(len(train) // cfg.hard_negatives, cfg.seed), rt.scaler()
    trained = [model, optimizers, [sampler], scaler]
    run.restore(*trained)

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        batch = sampler.take(cfg.batch_size // cfg.hard_negatives)[:, None] * cfg.hard_negatives
        batch = (batch + torch.arange(cfg.hard_negatives)).flatten()[share]
        x, y = map(of_all_processes, ddp_model(*train.batch(batch, rt.device)))
        loss = contrastive_loss(model, x, y)
        scaler.scale(loss).backward()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        run.check_finite(loss.item())
        if rt.dtype != torch.float16:  # there the scaler skips such steps
            run.check_finite(norm.item(), "gradient")
        optimizers.step(scaler)
        model.limit_scale()
        run.advance()

        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            run.log(show=("loss",), loss=loss.item(), grad_norm=norm.item())
        if run.step % cfg.eval_every == 0 or last:
            found = retrieved(model, val)
            run.check_finite(found["cosine"], "cosine of held-out pairs")
            run.log(**found, show=tuple(found))
            run.export(model, tokenizer, partial(save_clip, preprocessing=preprocessing))
            run.checkpoint(*trained)
    run.close()
    run.draw_curves("loss", y_label="contrastive loss")
    found = retrieved(model, test)
    speed = run.speed() | {"images_per_second": cfg.steps * cfg.batch_size / run.elapsed}
    run.write_result(**found, **speed)
    among = min(64, len(test))
    rt.print(
        f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s; the right one among {among} held-out:"
        f" image to text {found['image_to_text']:.1%}, text to image "
        f"{found['text_to_image']:.1%} (chance {1 / among:.1%})"
    )


# --- align and instruct --------------------------------------------------------------------------


def start_model(cfg, rt):
    """(model, tokenizer), and of the model only what the stage trains is not frozen."""
    if cfg.stage == "align":
        how = (cfg.projector, cfg.feature_layer, cfg.class_token)
        model, tokenizer = build_vlm(cfg.init, cfg.vision, *how)
        model.train_parts()
        return model, tokenizer
    model, tokenizer = load_model(cfg.init)
    if not isinstance(model, VLM):
        raise UserError(
            f"{cfg.init} holds a language model without eyes; --stage instruct begins from the "
            "run folder of --stage align (and all stages go on with --stage all --resume)"
        )
    start_adapter(model, cfg, rt)
    if not cfg.adapter:
        model.train_parts(vision=cfg.train_vision, language=True)
    return model, tokenizer


def packed_logits(model, rows, store):
    """Logits (B, T, V) of packed rows with their images."""
    images = store.images(rows.image_numbers())
    if images is not None:
        images = images.to(rows.tokens.device)
    return model(rows.tokens, rows.positions, document_mask(rows.documents), images=images)


def train_language(cfg, rt):
    n_texts = round(cfg.replay * cfg.batch_size) if cfg.stage == "instruct" else 0
    n_plain = round(n_texts / 4)
    model, tokenizer = start_model(cfg, rt)
    T = image_row_length(cfg, model)
    store = ImageStore(model.preprocessing)
    logits_of = partial(packed_logits, store=store)
    held_out_loss = partial(validation_loss, model, logits_of=logits_of)
    chats, val_chats = load_dialogues(cfg)
    pack = partial(pack_image_chats, tokenizer=tokenizer, T=T, vlm=model, store=store, rt=rt)
    train_rows, val_rows = pack(chats, name="training"), pack(val_chats, name="held-out")
    sizes = [len(train_rows)]
    if n_texts:
        text_rows = pack(load_texts(cfg), name="text")
        windows = Windows(load_replay(cfg, tokenizer)[0], T - 1)
        sizes += [len(text_rows), windows.n]
    examples = load_examples(cfg, model, tokenizer)
    for example in (*examples["images"], *examples["combos"]):
        store.numbers(example["images"])  # now, so that a damaged one is found now

    share = rt.share(cfg.batch_size)
    if cfg.stage == "align":
        model.calibrate(store.images(train_rows.image_numbers()[:256]))
    run = Run(cfg, rt, cfg.steps)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizers = build_optimizers(model, cfg.optimizer, cfg.muon_lr, cfg.lr, cfg.weight_decay)
    samplers = [Sampler(n, cfg.seed + i) for i, n in enumerate(sizes)]
    scaler = rt.scaler()
    trained = [model, optimizers, samplers, scaler]
    before = run.restore(*trained)
    if not before:
        before = {"texts": text_figures(model, tokenizer, examples["texts"]), "images": 0}
    since = 0

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        rows = train_rows[samplers[0].take(cfg.batch_size - n_texts)]
        if n_texts:
            rows = rows.join(text_rows[samplers[1].take(n_texts - n_plain)])
            rows = rows.join(replay_rows(windows, samplers[2].take(n_plain), tokenizer.eot_id))
        before["images"] += len(rows.image_numbers())
        rows = rows[share].to(rt.device)
        count = rt.sum(rows.mask[:, 1:].sum().item())  # trained tokens of the whole batch
        loss = 0.0
        parts = torch.arange(len(rows)).chunk(cfg.accumulate)
        for i, numbers in enumerate(parts):
            part = rows[numbers]
            with rt.accumulating(ddp_model, more=i + 1 < len(parts)):
                logits = logits_of(ddp_model, part)
                part_loss = sft_loss(logits, part.tokens, part.mask) / count
                # times the number of processes, by which DDP's mean divides
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        loss = rt.sum(loss.item())
        run.check_finite(loss)
        if rt.dtype != torch.float16:  # there the scaler skips such steps
            run.check_finite(norm.item(), "gradient")
        optimizers.step(scaler)
        run.advance()

        since += cfg.batch_size * T
        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            figures = {"grad_norm": norm.item(), "images": before["images"]}
            run.log(since, show=("loss",), loss=loss, **figures)
            since = 0
        if run.step % cfg.eval_every == 0 or last:
            model.eval()
            val_loss = held_out_loss(val_rows)
            model.train()
            run.check_finite(val_loss, "held-out loss")
            run.log(val_loss=val_loss, show=("val_loss",))
            run.export(model, tokenizer)
            run.checkpoint(*trained, **before)
    run.close()
    run.draw_curves("loss", "val_loss")
    result = run.speed()
    if not cfg.blind:  # whose images are all the same
        model.eval()
        shown = {"right": val_rows, "another": with_others_images(val_rows)}
        result["val_loss"] = {name: held_out_loss(rows) for name, rows in shown.items()}
        rt.print(
            f"held-out answers: {result['val_loss']['right']:.4f} nats per token with the right "
            f"image, {result['val_loss']['another']:.4f} with another's"
        )
    finish(cfg, rt, run, model, tokenizer, store, examples, before, result)


def finish(cfg, rt, run, model, tokenizer, store, examples, before, result):
    """Measure, print what was learnt, and keep it in result.json."""
    texts = text_figures(model, tokenizer, examples["texts"])
    result["texts"] = {"before": before["texts"], "after": texts}
    if texts:
        rt.print(table({"text before": before["texts"], "after": texts}))
    if examples["images"]:
        found, completions = image_figures(model, tokenizer, store, examples, cfg.blind)
        blind = None if cfg.blind else blind_figures(cfg.out)
        result |= {"images": found, "blind": blind}
        rt.print(image_table(found, blind))
        rt.print(summary(found, blind))
        if rt.main:
            keep_samples(run.folder / "images.json", examples["images"], completions)
    run.write_result(**result)
    rt.print(
        f"{cfg.out}: {run.step} steps in {run.elapsed:.0f} s, median "
        f"{run.speed()['tokens_per_second']:,.0f} tokens/s"
    )


# --- all stages ----------------------------------------------------------------------------------

STAGES = {"clip": train_clip, "align": train_language, "instruct": train_language}


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    run_stages(cfg, rt, STAGES, BY_STAGE, PRESETS[cfg.preset])
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
