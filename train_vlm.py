"""A vision-language model: a language model learns to see, in three stages.

    clip      both towers: images and captions become vectors that lie close together
              loss = (CE(s, diagonal) + CE(s^T, diagonal)) / 2,  s_ij = t x_i . y_j,
              t = exp(logit_scale); Radford et al. 2021, CLIP, arXiv:2103.00020, figure 3
              or --loss siglip: -1/B sum_ij log sigmoid(z_ij (s_ij + b)),  z_ii = 1, else -1
              Zhai et al. 2023, 2303.15343, algorithm 1
              an image may have several captions (Flickr30k and COCO: five): another of its own is
              no negative, clip_loss leaves it out, and to siglip_loss it is a pair (z_ij = 1)
    align     the projector alone: it makes tokens of the language model out of the tower's features
    instruct  projector and language model (--train_vision: the tower, too), by questions; with
              --adapter projector and adapter, which is put on the language model (--targets all),
              on the tower (vision), or on both (all,vision)
              loss = - sum_t m_t log p(x_t | images, x_<t) / sum_t m_t, as in train_sft.py
              Liu et al. 2023, LLaVA, 2304.08485, section 4.2; Liu et al. 2023, 2310.03744

The model is nanollm/vision/vlm.py, its towers are in vit.py and clip.py there. Against forgetting,
rows of text alone (--replay) stand in the batches of the last stage; LLaVA (2304.08485) has none.
To show that the model uses the image, compare it with one that cannot see: the no-image baseline
(--no_images) is trained on grey images, of the village's in half the steps, for what can be guessed
is learnt soon. It is found in the folder --out with -no_images behind it.

Differs from the papers: matrices are trained by Muon, a new projector is calibrated and learns at
a tenth of the rate (optim.PROJECTOR), a batch of clip has hard negatives, siglip's t is 100 at most
as clip's is, and the projector reads the features of the last layer, class token included (LLaVA:
of the last but one, without).

Run     python train_vlm.py                           # all three, and the baseline: runs/vlm
        python train_vlm.py --stage all --resume      # after a kill: finished stages are kept
        python train_vlm.py --stage clip --out runs/clip
        python train_vlm.py --stage align --vision runs/clip --out runs/align
        python train_vlm.py --stage instruct --init runs/align --out runs/instruct
        python train_vlm.py --stage align --preset downloaded --data llava.jsonl --out runs/align \\
            --init path/to/SmolLM2-360M-Instruct --vision path/to/clip-vit-base-patch32
        python -m nanollm.chat runs/vlm --image scene.png
Needs   runs/sft                                             (python train_sft.py)
Expect  of the images 99% get the right one of 64 captions. Of 480 questions about images (one core
        of an AMD EPYC, bf16, seeds 0, 1 and 2) 97.7%, 97.5%, 98.1% are right, 36% by the no-image
        baseline (seed 0); 91.9%, 89.8%, 87.0% about pairs of colour and kind that no training image
        shows, their colour in 94%, 75%, 71%; of those without images 97% -> 96%, 97%, 97%. In fp32
        (seed 0) images 95.2%, pairs 82.0%, their colour 67%, without images 95%.
        Which pair goes wrong differs from seed to seed, most often blue candles, called purple. The
        tower knows better: a linear readout of an object's patches names 83% to 100% of the unseen
        pairs' colours (seed 0). But while image tokens say little, the language model learns by
        rote which colours a kind has. So align takes 600 steps: after 150 the colour was right in
        72%, after 600 in 81%, and with 1,200 instead of 975 of instruct in 91% (seed 0, validation
        images). Twelve times the rates align faster, but in tokens too large to count by (81%).
        Scenes of up to four groups: --stage instruct --init runs/vlm --most_groups 2. From seed 1,
        800 steps give 80.0% of the questions about scenes with two groups in a half, and 1,000 more
        from there 87.5% (total 73%, colour 77%, existence and place 98% to 100%), texts 96%
        An adapter on the tower lets a model see in another way and leaves its language alone. Set
        image_std to -0.5 in preprocessor_config.json of a copy of runs/vlm: it sees negatives, and
        of 144 questions (of nine tasks) 21% are right. Then --stage instruct --init runs/negative
        --replay 0 --steps 100 --test_examples 16 --dtype fp32 --rank 8 --alpha 16 (seed 0, one
        core), of the adapters with --optimizer adamw --lr 5e-3, untuned:
                                                 trained  images  without (96% before)
        --adapter lora --targets vision          106,752  54%     96%
        --adapter bottleneck --targets vision     50,496  42%     96%
        --adapter lora (the tower is frozen)     114,944  37%     95%
        --train_vision (all is trained)        2,045,056  37%     11%
Watch   loss           clip: log(batch_size) = 4.9 at first, below 1 after 100 steps; align: from 8
                       to 1.0 nats per trained token, high because the language model is frozen;
                       instruct: below 0.5 after 50 steps, then slowly to 0.2, most of it plain text
        text_to_image  of held-out captions, the share whose nearest image of 64 is the right one
        image_to_text  the same of images; 1.6% by chance, above 90% after 250 steps
        cosine         of a held-out pair; rises towards 1
        val_loss       nats per token of held-out completions: 0.01 with images, 0.09 without; no
                       lower than without: the model doesn't look, so train clip or align longer
        val_accuracy   of 8 questions of each task about validation images, not the test's
        grad_norm      clip: up to 16 in the first 100 steps, then 3 to 6; align: 9 to 2; instruct:
                       below 1; rising: lower the learning rates
        lr             learning rate of the first group of parameters
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather
from torch.nn.utils.rnn import pad_sequence

from data.village import examples as village
from data.village import images as village_images
from data.village.scenes import SMALLEST
from nanollm.batches import Packed, Sampler, pack_chats, row_length
from nanollm.checkpoint import existing_folder
from nanollm.config import (
    LARGE,
    OpenShare,
    Share,
    TrainConfig,
    UserError,
    Whole,
    atomic_write,
    cli,
    lock,
    read_json,
    save_config,
)
from nanollm.formats import IMAGE, Unusable, need, usable
from nanollm.gpt import document_mask
from nanollm.hub import load_model, save_model
from nanollm.metrics import (
    accuracy_by_task,
    accuracy_table,
    first_of_each_task,
    mean_accuracy,
    question_of,
)
from nanollm.optim import PROJECTOR, SCHEDULES, build_optimizer
from nanollm.peft.adapters import start_adapter, trainable
from nanollm.peft.method import Settings
from nanollm.records import read_captions, read_chats, read_examples, read_image_chats
from nanollm.rollouts import prompt_of, with_room
from nanollm.run import Run, check_folders, effect, holds_a_run, move_aside
from nanollm.runtime import start
from nanollm.tokenizer import Tokenizer
from nanollm.vision.clip import CLIP, TextConfig, save_clip
from nanollm.vision.images import GREY, ImageStore, Preprocessing
from nanollm.vision.vit import VisionConfig, ViT, load_vision
from nanollm.vision.vlm import build_vlm
from train_sft import BEGINS, load_text, replay_count, replay_rows, sft_loss, validation_loss


@dataclass
class Config(Settings, TrainConfig):
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: 224 pixels, one GPU; downloaded:
    # for a model of 0.1 to 1B parameters
    preset: str = "tiny"
    # clip, align, instruct; or all: the three and the no-image baseline, in folders beside --out
    stage: Literal["all", "clip", "align", "instruct"] = "all"
    # -- Start
    # language model (clip takes its tokenizer); for instruct the run folder of align
    init: str = "runs/sft"
    vision: str | None = None  # for align: folder of a vision tower, ours or Hugging Face's
    # -- Data
    # village: its images; or JSONL of {"image", "caption"} (clip) or of dialogues with images,
    # ours or LLaVA's (see data/README.md)
    data: str = "village"
    images: Whole[1] = 6000  # how many the village paints for training
    most_groups: Literal[1, 2] = 1  # of objects in their sky, and on their ground
    val_data: str | None = None  # held-out records; default: the last --val_fraction of --data
    val_fraction: OpenShare = 0.05  # share of --data that is held out
    # what to test on. instruct: JSONL of examples with an "image", village, or village_val, to
    # choose settings by; default: village with its own --data, else nothing. clip: JSONL of
    # captions, or village; default: village with its own --data, else the held-out captions
    test_data: str | None = None
    test_examples: Whole[0] = 48  # examples per task, of text and of images; 0: all
    # for instruct, against forgetting: share of the rows without images, a quarter of them plain
    # text, the others dialogues; plain text is trained on at every token, so its share of the
    # trained tokens is larger
    replay: Share = 0.4
    text_data: str = "village"  # those dialogues: the village's, or a JSONL file
    replay_data: str | None = None  # that plain text, .txt or .jsonl; default: the village's
    no_images: bool = False  # for instruct: grey in place of each image, in training and tests
    # row length T; default: what 99% of the dialogues need, from 256 to 2048 and as far as the
    # model can read
    context: Whole[1] | None = None
    # -- Model
    image_size: Whole[1] = 96  # pixels per side that the vision tower reads
    patch_size: Whole[1] = 16  # pixels per side of a patch
    vision_layers: Whole[1] = 4  # of the vision tower
    vision_channels: Whole[1] = 128  # of the vision tower; 32 per head
    loss: Literal["clip", "siglip"] = "clip"  # of the first stage
    # for clip: captions on this many consecutive lines always share a batch; the village's are of
    # images that differ in one thing each, so that the tower has to look at everything. Default: 4
    # for the village, 1 for other data
    hard_negatives: Whole[1] | None = None
    # from the tower's features to the language model's tokens; pixel_shuffle joins four patches
    projector: Literal["linear", "mlp", "pixel_shuffle"] = "mlp"
    feature_layer: int = -1  # whose states the projector reads; -1: the last layer's; LLaVA: -2
    class_token: bool = True  # the projector reads the tower's summary of the image as well
    train_vision: bool = False  # for instruct: the vision tower learns too
    # -- Training
    out: str = "runs/vlm"
    steps: int | None = None  # optimizer steps; default: by stage
    # pairs (clip) or rows per optimizer step; default: by stage
    batch_size: int | None = None
    accumulate: int = 1  # parts that a process splits its rows into, to save memory; not for clip
    lr: float | None = None  # learning rate of AdamW; default: by stage
    muon_lr: float | None = None  # learning rate of Muon; default: by stage
    weight_decay: float | None = None  # on matrices and embeddings; default: by stage
    eval_every: int = 300


PRESETS = {
    "smoke": dict(images=100, steps=6, batch_size=8, eval_every=3, warmup=2, test_examples=2),
    "gpu": dict(image_size=224, patch_size=14, vision_layers=12, vision_channels=512)
    | dict(projector="pixel_shuffle", class_token=False, context=1024, compile=True),
    # a downloaded language model, and for align a downloaded tower (--vision): as LLaVA-1.5 (Liu et
    # al. 2023, arXiv:2310.03744); rates and batches are in DOWNLOADED
    "downloaded": dict(
        LARGE, context=1024, accumulate=64, feature_layer=-2, class_token=False, replay=0.0
    ),
}
BY_STAGE = {
    "clip": dict(steps=250, batch_size=128, muon_lr=0.01, lr=2e-3, weight_decay=1.0),
    "align": dict(steps=600, batch_size=8, muon_lr=0.05, lr=5e-3, weight_decay=0.0),
    "instruct": dict(steps=1200, batch_size=10, muon_lr=0.01, lr=3e-3, weight_decay=0.0),
}
# The same with --preset downloaded: of align the rate makes 1e-3 for the projector, which learns at
# optim.PROJECTOR times it; of clip, where it is trained, they are Radford et al.'s (2021)
DOWNLOADED = {
    "clip": dict(lr=5e-4, weight_decay=0.2),
    "align": dict(steps=500, batch_size=256, lr=1e-3 / PROJECTOR),
    "instruct": dict(steps=500, batch_size=128, lr=2e-5),
}
# what each stage learns from: how it is read, and the village's files
DATA = {
    "clip": (read_captions, "captions"),
    "align": (read_image_chats, "describe"),
    "instruct": (read_image_chats, "questions"),
}
# what --test_data of instruct may name: the village's questions, and those about new pairs
TESTS = {
    "village": ("questions_test", "combos_test"),
    "village_val": ("examples_val", "combos_val"),
}
LONGEST_CAPTION = 128  # in tokens


# --- data ----------------------------------------------------------------------------------------


def painted(cfg):
    """The folder of the village's images and what is said about them."""
    wanted = f"the village's images take at least {SMALLEST} pixels, not {cfg.image_size}"
    need(cfg.image_size >= SMALLEST, "--image_size", wanted)
    how = dict(n_train=cfg.images, most_groups=cfg.most_groups)
    return village_images.prepare(size=cfg.image_size, **how)


def load_records(cfg):
    """(training, held-out) records of the stage."""
    read, name = DATA[cfg.stage]
    if cfg.data == "village":
        train, val = (read(painted(cfg) / f"{name}_{part}.jsonl") for part in ("train", "val"))
    elif cfg.val_data:
        train, val = read(cfg.data), read(cfg.val_data)
    else:
        train, val = split_by_image(read(cfg.data), cfg.val_fraction)
    if not train or not val:
        raise UserError(f"{cfg.data} has too few records to hold some out; name --val_data")
    return as_shown(cfg, train), as_shown(cfg, val)


def as_shown(cfg, records):
    """The records, with --no_images a grey image in place of each."""
    if not cfg.no_images:
        return records
    return [record | {"images": [GREY] * len(record["images"])} for record in records]


def split_by_image(records, fraction):
    """[training, held-out] records: the last `fraction` of the images is held out, each with all
    that is said of it, so that none is trained on.
    """
    of_each = [record["images"] if "images" in record else [record["image"]] for record in records]
    images = [*dict.fromkeys(image for own in of_each for image in own)]
    held_out = {*images[int(len(images) * (1 - fraction)) :]}
    parts = [[], []]
    for record, own in zip(records, of_each):
        parts[not held_out.isdisjoint(own)].append(record)
    return parts


class Pairs:
    """Images and their captions. Every image is opened now, so that a damaged one is found now.

    An image may have several captions, and a caption several images: `positives` knows them.
    """

    def __init__(self, records, store, tokenizer):

        def encoded(record):
            ids = (*tokenizer.encode(record["caption"]), tokenizer.end_id)
            if len(ids) > LONGEST_CAPTION:
                raise Unusable(f"more than {LONGEST_CAPTION} tokens")
            return record["image"], ids

        records = usable(records, encoded, "captions", "shorten or drop them")
        images, self.tokens = zip(*records)
        self.store, self.pad_id, numbers = store, tokenizer.pad_id, {}
        self.images = torch.tensor(store.numbers(images))
        equal = [numbers.setdefault(ids, len(numbers)) for ids in self.tokens]
        self.captions = torch.tensor(equal)  # the same number for the same text
        self.known = (self.images * len(self) + self.captions).sort().values

    def __len__(self):
        return len(self.tokens)

    def batch(self, chosen, device):
        """Images (B, 3, H, W) and captions (B, T), padded behind their end token."""
        images = self.store.images(self.images[chosen].tolist())
        rows = [torch.tensor(self.tokens[i]) for i in chosen]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        return images.to(device), tokens.to(device)

    def positives(self, chosen, device):
        """(B, B) bool: do the data hold the image of row i with the caption of column j?"""
        wanted = self.images[chosen, None] * len(self) + self.captions[chosen]
        place = torch.searchsorted(self.known, wanted).clamp(max=len(self) - 1)
        return (self.known[place] == wanted).to(device)


def load_tests(cfg, model, tokenizer, store):
    """{"images", "new_pairs" of colour and kind, "texts"}: test examples of the last stage, and
    "val", those asked during training, of the village's validation images. Raises UserError for
    what would stop the tests: better now than after training.
    """
    tests = {"images": [], "new_pairs": [], "texts": [], "val": []}
    if cfg.stage == "instruct":
        if cfg.data == "village":
            val = read_examples(painted(cfg) / "examples_val.jsonl")
            tests["val"] = as_shown(cfg, first_of_each_task(val, 8))
        if names := TESTS.get(cfg.test_data or cfg.data):
            paths = (painted(cfg) / f"{name}.jsonl" for name in names)
            tests["images"], tests["new_pairs"] = map(read_examples, paths)
        elif cfg.test_data:
            tests["images"] = read_examples(cfg.test_data)
        if cfg.text_data == "village" and not cfg.no_images:
            tests["texts"] = read_examples(village.of_run(cfg.init) / "sft_test.jsonl")
    ids_of = partial(prompt_of, model=model, tokenizer=tokenizer)
    for name, examples in tests.items():
        examples = first_of_each_task(examples, cfg.test_examples)
        tests[name] = with_room(examples, ids_of, model, 1, name)
    for example in tests["images"] + tests["new_pairs"] + tests["val"]:
        store.numbers(example.get("images", ()))  # opens them: a damaged one is found
    return tests


# --- clip: both towers, from images and captions --------------------------------------------------


def clip_loss(image_embeddings, text_embeddings, log_scale, positives):
    """(CE(s, diagonal) + CE(s^T, diagonal)) / 2 with s = exp(log_scale) x y^T: each image finds
    its caption among B, each caption its image. x, y (B, E) of length 1; returns a number.

    positives (B, B) bool: is caption j one of image i? Beside the diagonal such cells are left out.

    Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """
    logits = log_scale.exp() * image_embeddings @ text_embeddings.T  # (B, B)
    others = positives & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(others, -torch.inf)  # right as well: no negatives
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def siglip_loss(image_embeddings, text_embeddings, log_scale, bias, positives):
    """-1/B sum_ij log sigmoid(z_ij (exp(log_scale) x_i . y_j + bias)), z_ij = 1 where caption j is
    one of image i, by `positives` (B, B) bool, and -1 otherwise: every cell is a question of its
    own, yes or no. x, y (B, E) of length 1.

    Zhai et al. 2023 (arXiv:2303.15343), algorithm 1.
    """
    logits = log_scale.exp() * image_embeddings @ text_embeddings.T + bias  # (B, B)
    signs = 2 * positives.float() - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def of_all_processes(embeddings):
    """The embeddings (B, E) of every process, stacked, (B processes, E): the losses compare
    each pair with all others, wherever they were computed. Gradients flow back to the process they
    came from.
    """
    if not dist.is_initialized():
        return embeddings
    return torch.cat(all_gather(embeddings))


@torch.no_grad()
def retrieval(image_embeddings, text_embeddings, positives):
    """Of N aligned pairs (N, E), the share whose nearest partner is a right one by `positives`
    (N, N), both ways, and the cosine of a pair. Where several lie equally near, the first of them
    counts as the nearest.
    """
    similarity = image_embeddings @ text_embeddings.T  # (N, N)
    pairs = torch.arange(len(similarity), device=similarity.device)
    return {
        "text_to_image": positives[similarity.argmax(0), pairs].float().mean().item(),
        "image_to_text": positives[pairs, similarity.argmax(1)].float().mean().item(),
        "cosine": similarity.diagonal().mean().item(),
    }


@torch.no_grad()
def held_out_retrieval(clip, pairs, among=64):
    """`retrieval` among `among` images and all their captions: the mean over as many such groups as
    there are.
    """
    images, groups = pairs.images.unique(), []
    n = min(among, len(images))
    for i in range(0, len(images) - n + 1, n):
        chosen = torch.isin(pairs.images, images[i : i + n]).nonzero()[:, 0]
        embeddings = clip(*pairs.batch(chosen, clip.device))
        groups.append(retrieval(*embeddings, pairs.positives(chosen, clip.device)))
    return {key: sum(group[key] for group in groups) / len(groups) for key in groups[0]}


def vision_config(cfg):
    """The shape of the vision tower that the flags ask for."""
    C = cfg.vision_channels
    heads = max(1, C // 32)
    if cfg.image_size % cfg.patch_size or C % heads:
        raise UserError(
            f"--patch_size {cfg.patch_size} must divide --image_size {cfg.image_size}, or the "
            f"border is never seen; and 32, the channels of a head, --vision_channels {C}"
        )
    return VisionConfig(cfg.image_size, cfg.patch_size, C, 4 * C, cfg.vision_layers, heads)


def train_clip(cfg, rt):
    check_folders(cfg.out, cfg.init)
    tokenizer = Tokenizer.load(existing_folder(cfg.init))
    preprocessing = Preprocessing(size=cfg.image_size)
    train, val = load_records(cfg)
    test = cfg.test_data
    if (test or cfg.data) == "village":
        test = painted(cfg) / "captions_test.jsonl"
    test, store = read_captions(test) if test else val, ImageStore(preprocessing)
    train, val, test = (Pairs(each, store, tokenizer) for each in (train, val, test))
    rt.print(f"{len(train)} captions of {len(train.images.unique())} images")
    ids = dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end_id)
    text = TextConfig(**ids, max_position_embeddings=LONGEST_CAPTION)
    model = CLIP(vision_config(cfg), text, sigmoid=cfg.loss == "siglip")

    share, K = rt.share(cfg.batch_size), cfg.hard_negatives
    if len(train) < K:
        raise UserError(f"--hard_negatives {K} needs as many captions; there are {len(train)}")
    run = Run(cfg, rt)
    ddp_model = rt.prepare(model, cfg.compile)
    for tower in (model.vision_model, model.text_model):
        tower.encoder.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler)
    schedule, sampler = SCHEDULES[cfg.schedule], Sampler(len(train) // K, cfg.seed)
    before = run.restore(model, optimizer, sampler) or held_out_retrieval(model, test)

    while run.step < cfg.steps:
        groups = sampler.take(cfg.batch_size // K)[:, None] * K
        chosen = (groups + torch.arange(K)).flatten()  # K captions in a row from each place
        embeddings = ddp_model(*train.batch(chosen[share], rt.device))
        x, y = map(of_all_processes, embeddings)  # (B, E) each, in the order of `chosen`
        positives = train.positives(chosen, rt.device)
        if model.logit_bias is None:
            loss = clip_loss(x, y, model.logit_scale, positives)
        else:
            loss = siglip_loss(x, y, model.logit_scale, model.logit_bias, positives)
        # every process has computed the whole loss, of which rt.backward expects its share
        loss = rt.backward(loss / rt.world)
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        model.limit_scale()
        run.advance(loss=rt.sum(loss), grad_norm=grad_norm, lr=optimizer.lr)

        if run.due(cfg.eval_every):
            run.evaluated(**held_out_retrieval(model, val))
            run.export(partial(save_clip, preprocessing=preprocessing), model, tokenizer)
            run.checkpoint(**before)
    run.close("loss", y_label="contrastive loss")
    after, among = held_out_retrieval(model, test), min(64, len(test.images.unique()))
    effects = [
        effect(f"the right {found}", before[key], after[key], "share")
        for key, found in (
            ("image_to_text", f"caption among those of {among} images"),
            ("text_to_image", f"image among {among}"),
        )
    ]
    images_per_second = cfg.steps * cfg.batch_size / run.elapsed
    run.write_result(effects, before=before, after=after, images_per_second=images_per_second)


# --- align: the projector, from descriptions; instruct: the language model too, from questions ----


def start_model(cfg, rt):
    """(model, tokenizer), with everything frozen but what this stage trains."""
    model, tokenizer = load_model(cfg.init)
    if cfg.stage == "align":
        how = (cfg.projector, cfg.feature_layer, cfg.class_token)
        model, tokenizer = build_vlm(model, tokenizer, *load_vision(cfg.vision), *how)
        model.train_parts(projector=True)
        return model, tokenizer
    if not hasattr(model, "vision"):
        raise UserError(
            f"{cfg.init} holds a language model without a vision tower; --stage instruct begins "
            "from the run folder of --stage align (and all stages go on with --stage all --resume)"
        )
    if not cfg.adapter:
        model.train_parts(vision=cfg.train_vision, projector=True, language=True)
    start_adapter(model, cfg, rt)  # --adapter: that and the projector are trained
    return model, tokenizer


def image_logits(model, rows, store):
    """Logits (B, T, V) of packed rows with their images: attention inside documents."""
    images = store.images(rows.image_numbers())
    if images is not None:
        images = images.to(rows.tokens.device)
    return model(rows.tokens, rows.positions, document_mask(rows.documents), images=images)


def train_language(cfg, rt):
    check_folders(cfg.out, cfg.init, cfg.vision)
    model, tokenizer = start_model(cfg, rt)
    store = model.image_store()
    n_texts = replay_count(cfg) if cfg.stage == "instruct" else 0
    n_plain = round(n_texts / 4)
    chats, val_chats = load_records(cfg)
    how = dict(rt=rt, image_tokens=model.tokens_per_image, store=store)
    length = partial(row_length, cfg.context, model)  # T, by the length of the dialogues
    train_rows = pack_chats(chats, tokenizer, length, "training", **how)
    T = train_rows.tokens.shape[1]
    val_rows = pack_chats(val_chats, tokenizer, T, "held-out", **how)
    sizes = [len(train_rows)]
    if n_texts:
        texts = village.of_run(cfg.init) / "sft_train.jsonl"
        texts = read_chats(texts if cfg.text_data == "village" else cfg.text_data)
        text_rows = pack_chats(texts, tokenizer, T, "text", **how)
        windows, _ = load_text(cfg, tokenizer, T)
        sizes += [len(text_rows), len(windows)]
    tests = load_tests(cfg, model, tokenizer, store)

    share = rt.share(cfg.batch_size)
    if cfg.stage == "align":
        # scale the new projector so that its tokens are as large as word embeddings
        model.calibrate(store.images(train_rows.image_numbers()[:256]))
    run = Run(cfg, rt)
    ddp_model = rt.prepare(model, cfg.compile)
    for part in (model.model, model.vision.encoder):
        part.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler)
    schedule = SCHEDULES[cfg.schedule]
    samplers = [Sampler(n, cfg.seed + i) for i, n in enumerate(sizes)]
    before = run.restore(model, optimizer, *samplers)
    before = before or {"texts": accuracy_by_task(model, tokenizer, tests["texts"])[0]}
    logits_of = partial(image_logits, store=store)

    while run.step < cfg.steps:
        rows = train_rows[samplers[0].take(cfg.batch_size - n_texts)]
        if n_texts:
            text = text_rows[samplers[1].take(n_texts - n_plain)]
            plain = replay_rows(windows, samplers[2].take(n_plain), tokenizer.begin[0])
            rows = Packed.join([rows, text, plain])
        rows = rows[share].to(rt.device)
        num_tokens = rt.sum(rows.mask[:, 1:].sum())  # trained on, in the whole batch
        loss = 0.0
        for part in rt.micro_batches(rows, cfg.accumulate, ddp_model):
            part_loss = sft_loss(logits_of(ddp_model, part), part.tokens, part.mask)
            loss += rt.backward(part_loss / num_tokens)  # a sum becomes a mean
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        run.advance(cfg.batch_size * T, loss=rt.sum(loss), grad_norm=grad_norm, lr=optimizer.lr)

        if run.due(cfg.eval_every):
            metrics = {"val_loss": validation_loss(model, val_rows, logits_of=logits_of)}
            if tests["val"]:
                asked, _ = accuracy_by_task(model, tokenizer, tests["val"], store=store)
                metrics["val_accuracy"] = mean_accuracy(asked)
            run.evaluated(**metrics)
            run.export(save_model, model, tokenizer)
            run.checkpoint(**before)
    run.close("loss", "val_loss", y_label="nats per token")
    finish(cfg, run, model, tokenizer, store, tests, before["texts"], val_rows)


def with_others_images(rows):
    """The packed rows, each image in the place of the one before it."""
    numbers = rows.image_numbers()
    numbers = iter(numbers[1:] + numbers[:1])
    return replace(rows, images=[[next(numbers) for _ in row] for row in rows.images])


# --- what was learnt -----------------------------------------------------------------------------


def measure(cfg, model, tokenizer, store, tests):
    """({column: accuracy by task}, completions to tests["images"]): with the model's own beginning,
    and with completions that begin with a thought or with the result.
    """
    ask, images = partial(accuracy_by_task, model, tokenizer, store=store), tests["images"]
    shown = "none" if cfg.no_images else "right"
    right, completions = ask(images, shown=shown)
    # "right": shown the right image; the no-image baseline is shown a grey one
    columns = {"right": right, "new_pairs": ask(tests["new_pairs"], shown=shown)[0]}
    if not cfg.no_images:
        # what has steps is asked with them and without
        sums = [e for e in images if e["check"] == "number" and e["task"] != "count"]
        columns |= {name: ask(sums, begin=begin)[0] for name, begin in BEGINS.items()}
    return columns, completions


def finish(cfg, run, model, tokenizer, store, tests, texts_before, val_rows):
    """Print what was learnt, and keep it in result.json, some of the completions in images.json."""
    columns, completions = measure(cfg, model, tokenizer, store, tests)
    baseline, guesses = baseline_of(cfg.out)
    after = accuracy_by_task(model, tokenizer, tests["texts"])[0]
    texts = {"before": texts_before, "after": after}
    for table in (columns | {"no_images": baseline}, texts):
        if table := {name: column for name, column in table.items() if column}:
            run.rt.print(accuracy_table(table))
    against = ", by the no-image baseline and the model" if baseline else ""
    compared = [
        ("questions about images" + against, baseline, columns["right"]),
        ("pairs never seen together", {}, columns["new_pairs"]),
        ("questions without images", texts_before, after),
    ]
    effects = [
        effect(name, mean_accuracy(old), mean_accuracy(new), "share")
        for name, old, new in compared
        if new
    ]
    loss = {}
    if not cfg.no_images:  # whose images are all the same
        for name, rows in (("another", with_others_images(val_rows)), ("right", val_rows)):
            loss[name] = validation_loss(model, rows, logits_of=partial(image_logits, store=store))
        name = "held-out completions, with another's image and with the right one"
        effects.append(effect(name, loss["another"], loss["right"], "nats per token", False))
    if tests["images"] and run.rt.main:
        keep_samples(run.folder / "images.json", tests["images"], completions, guesses)
    trained, _ = trainable(model)
    run.write_result(
        effects, val_loss=loss, images=columns, texts=texts, trained_parameters=trained
    )


def baseline_of(out):
    """(accuracy by task, {(image, question): completion}) of the no-image baseline beside a run."""
    result, images = (Path(f"{out}-no_images", name) for name in ("result.json", "images.json"))
    if not images.exists():
        return {}, {}
    samples = {(s["image"], s["question"]): s["completion"] for s in read_json(images)}
    return read_json(result)["images"]["right"], samples


def keep_samples(path, examples, completions, guesses, shown=3):
    """Write some questions of each task as JSON, with image and completion, for the report."""
    asked = [e | {"completion": text} for e, text in zip(examples, completions) if e.get("images")]
    samples = []
    for example in first_of_each_task(asked, shown):
        image, question = example["images"][0], question_of(example).replace(IMAGE, "").strip()
        sample = {"image": image, "question": question, "answer": example["answer"]}
        sample |= {"completion": example["completion"], "no_images": guesses.get((image, question))}
        samples.append(sample)
    atomic_write(path, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


# --- the stages ----------------------------------------------------------------------------------


def complete_settings(cfg):
    """The settings of a stage, its own defaults filled in; UserError for what can't go together."""
    own = BY_STAGE[cfg.stage] | (DOWNLOADED[cfg.stage] if cfg.preset == "downloaded" else {})
    own |= {"hard_negatives": 4 if cfg.data == "village" else 1}
    if cfg.no_images and cfg.data == "village":
        own["steps"] //= 2  # what can be guessed is learnt by then
    cfg = replace(cfg, **{k: v for k, v in own.items() if getattr(cfg, k) is None})
    fits = (cfg.stage == "align") == bool(cfg.vision)
    need(fits, "--vision", "the folder of a tower is what --stage align needs, and it alone")
    fits = cfg.stage == "instruct" or not cfg.no_images
    need(fits, "--no_images", "goes with --stage instruct alone")
    fits = cfg.stage != "clip" or cfg.batch_size % cfg.hard_negatives == 0
    need(
        fits, "--hard_negatives", f"{cfg.hard_negatives} must divide --batch_size {cfg.batch_size}"
    )
    fits = not (cfg.adapter and cfg.train_vision)
    need(
        fits, "--train_vision", "goes with no --adapter; --targets all,vision puts it on the tower"
    )
    return cfg


def prepare_folders(cfg, stages, rt):
    """Before the first of all stages: find what would stop a later one, and move earlier runs out
    of the way.
    """
    for each in stages:
        check_folders(each.out, cfg.init)
        holds_a_run(Path(each.out))  # raises where --out holds other files
        load_records(each)  # raises where records are unusable, or too few
    # a model of the final shape, untrained: do projector, --context and tests fit it?
    tower = ViT(vision_config(cfg)), Preprocessing(cfg.image_size)
    how = (cfg.projector, cfg.feature_layer, cfg.class_token)
    model, tokenizer = build_vlm(*load_model(cfg.init), *tower, *how)
    row_length(cfg.context, model)
    last = replace(stages[-1], init=cfg.init)  # whose own is still to be trained
    load_tests(last, model, tokenizer, model.image_store())
    rt.barrier()  # before folders are moved, every process has looked at them
    if rt.main:
        for each in stages:
            lock(each.out)
            move_aside(Path(each.out))
        save_config(cfg, Path(cfg.out) / "train_config.json")
    rt.barrier()


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    stages = [cfg]
    if cfg.stage == "all":
        clip, align, baseline = (f"{cfg.out}-{name}" for name in ("clip", "align", "no_images"))
        stages = [
            # the vision tower, beside one for text: from images and their captions
            replace(cfg, stage="clip", test_data=None, out=clip),
            # the projector between tower and language model, both frozen: from descriptions
            replace(cfg, stage="align", vision=clip, out=align),
            # projector and language model: from questions about images, here each a grey one
            replace(cfg, stage="instruct", init=align, no_images=True, out=baseline),
            # the same, from the images themselves
            replace(cfg, stage="instruct", init=align),
        ]
    stages = [complete_settings(each) for each in stages]
    if cfg.stage == "all" and not cfg.resume:
        prepare_folders(cfg, stages, rt)
    for each in stages:
        if cfg.stage == "all" and cfg.resume and (Path(each.out) / "result.json").exists():
            continue  # finished before the kill
        rt.print(f"\n{each.stage}{' without images' * each.no_images}: {each.out}")
        # one that was stopped before its first checkpoint begins anew
        each = replace(each, resume=cfg.resume and (Path(each.out) / "state.pt").exists())
        torch.manual_seed(cfg.seed)  # new parameters are the same, whatever ran before
        (train_clip if each.stage == "clip" else train_language)(each, rt)
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
