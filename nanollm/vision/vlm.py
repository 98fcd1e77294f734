"""The vision-language model: a GPT that reads images where its text says <image>.

    image (3, H, W) -> ViT -> features (N, C_v) -> projector -> (n, C), n tokens of the GPT

In the token ids every image stands as n placeholders, and their embeddings are overwritten by the
projected features; everything else is the GPT as it was (Liu et al. 2023, LLaVA, arXiv:2304.08485).

Shapes: P images, N patches, n tokens per image, B rows, T tokens, C channels.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm import safetensors
from nanollm.checkpoint import config_json, config_of, grow_vocabulary, load_weights, write_configs
from nanollm.config import UserError, atomic_write, read_json
from nanollm.formats import IMAGE, need
from nanollm.gpt import GPT, Linear
from nanollm.tokenizer import Tokenizer
from nanollm.vision.images import ImageStore, Preprocessing
from nanollm.vision.vit import CLIP_KIND, ViT, load_tensors, vision_config_of

# projector -> LLaVA's name of what stands between its two layers
ACTIVATIONS = {"linear": "linear", "mlp": "gelu", "pixel_shuffle": "gelu"}


class Projector(nn.Module):
    """Features of patches (P, N, C_v) -> embeddings of the language model (P, n, C).

    linear: W x + b, n = N (Liu et al. 2023, arXiv:2304.08485)
    mlp: W2 gelu(W1 x + b1) + b2, n = N (LLaVA-1.5, Liu et al. 2023, 2310.03744)
    pixel_shuffle: r x r neighbouring patches side by side in the channels, then the mlp, so that
    n = N / r^2 (Shi et al. 2016, 1609.05158, backwards; as in InternVL, Chen et al. 2024,
    2404.16821)

    Patches stand in raster order, and so do the groups of them.
    """

    def __init__(self, vision_size, text_size, kind="mlp", r=2):
        super().__init__()
        self.kind, self.r = kind, r if kind == "pixel_shuffle" else 1
        self.linear_1 = Linear(self.r**2 * vision_size, text_size)
        self.linear_2 = None if kind == "linear" else Linear(text_size, text_size)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def tokens(self, patches):
        """n for N patches; raises UserError where their grid can't be grouped by r x r."""
        side = math.isqrt(patches)
        if self.r > 1 and (side**2 != patches or side % self.r):
            raise UserError(
                f"pixel_shuffle wants a square grid of patches whose side {self.r} divides, not "
                f"{patches} patches; choose another image or patch size, or the projector mlp"
            )
        return patches // self.r**2

    def group(self, x):
        """(P, N, C) -> (P, n, r r C): what stands side by side."""
        P, N, C = x.shape
        n, r, side = self.tokens(N), self.r, math.isqrt(N)
        if r == 1:
            return x
        x = x.view(P, side // r, r, side // r, r, C).transpose(2, 3)
        return x.reshape(P, n, r * r * C)  # rows of groups, in each r rows of r patches

    def forward(self, x):
        x = self.linear_1(self.group(x))
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))

    @torch.no_grad()
    def calibrate(self, x, size):
        """Adapt a new projector to features x (P, N, C_v), so that what comes out has root mean
        square `size`, as the embeddings of words have. A tower's features have large means that say
        nothing of the image; unadapted, its tokens are many times larger than words, all alike to
        the layers that normalise them, and hardly changed by what layers add.

        Standardises the first layer's inputs by its own weights and scales the last layer
        (Kraehenbuehl et al. 2016, arXiv:1511.06856, section 3).
        """
        groups = self.group(x.float()).flatten(0, 1)
        first, last = self.linear_1, self.linear_2 or self.linear_1
        first.weight.div_(groups.std(0) + 1e-6)
        first.bias.copy_(-first.weight @ groups.mean(0))
        scale = size / self(x.float()).square().mean().sqrt()
        last.weight.mul_(scale)
        last.bias.mul_(scale)


class VLM(GPT):
    """A GPT with a vision tower, a projector, and the id of the token <image>.

    `images` (P, 3, H, W) are given in the order in which their placeholders stand in the batch,
    row after row. Rows of text alone have none, and a batch of such rows needs no images. What
    `encode_images` has made of images may stand for them.
    """

    def __init__(self, cfg, vision, projector, image_id, feature_layer=-2, class_token=False):
        """vision: a ViT; projector: a kind; feature_layer: which of the ViT's hidden states;
        class_token: the class token's as well, in front of the patches' (CLIP's kind of tower).
        """
        super().__init__(cfg)
        layers = vision.cfg.num_hidden_layers
        if feature_layer not in range(-layers - 1, layers + 1):
            raise UserError(
                f"the vision tower has {layers} layers; its features can't be those of layer "
                f"{feature_layer}"
            )
        if class_token and (vision.cfg.model_type != CLIP_KIND or projector == "pixel_shuffle"):
            raise UserError(
                "add --no_class_token: pixel_shuffle joins neighbouring patches, and a class "
                "token, which SigLIP's towers don't have, is nobody's neighbour"
            )
        self.vision, self.image_id, self.feature_layer = vision, image_id, feature_layer
        self.class_token = class_token
        self.projector = Projector(vision.cfg.hidden_size, cfg.hidden_size, projector)
        # n; raises where the projector doesn't fit the patches
        self.tokens_per_image = self.projector.tokens(vision.cfg.num_patches + class_token)
        self.preprocessing = None  # from a Pillow image to what the vision tower reads

    def shared(self):
        return {id(self.vision): self.vision}  # it reads each image once: neither copied nor cast

    def image_store(self):
        """An empty ImageStore that keeps images as this model reads them."""
        return ImageStore(self.preprocessing)

    def gather_images(self, prompts, images):
        """(P, 3, H, W) on the model's device: the images of all prompts in order; None for none.

        prompts: lists of ids; images: for each a tensor (n, 3, H, W) or None; or None altogether.
        Raises UserError where a prompt has other images than placeholders.
        """
        if images is None:
            return None
        for number, (prompt, each) in enumerate(zip(prompts, images, strict=True)):
            P = 0 if each is None else len(each)
            self.check_placeholders(f"prompt {number}", prompt.count(self.image_id), P)
        shown = [each for each in images if each is not None and len(each)]
        return torch.cat(shown).to(self.device) if shown else None

    def check_placeholders(self, name, places, P):
        """Raise UserError unless there are as many places as P images take."""
        n = self.tokens_per_image
        counts = f"{places} placeholders, but {P} images of {n} tokens each need {P * n}"
        need(places == P * n, name, counts)

    def forward(self, tokens, positions=None, mask=None, cache=None, where=None, images=None):
        """As GPT's; images as the class says."""
        hidden = self.hidden(tokens, positions, mask, cache, images)
        return self.head(hidden if where is None else hidden[where])

    def hidden(self, tokens, positions=None, mask=None, cache=None, images=None):
        """What the head reads: (B, T, C)."""
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)
        decoding = cache is not None and tokens.shape[1] == 1 and images is None
        if not decoding:  # counting would make a GPU wait
            x = self.merge_image_features(x, tokens, images)
        return self.model(x, positions, mask, cache)

    def merge_image_features(self, x, tokens, images):
        """Embeddings x (B, T, C) of the tokens, those of placeholders overwritten by features."""
        where, P = tokens == self.image_id, 0 if images is None else len(images)
        self.check_placeholders("the batch", int(where.sum()), P)
        if P:
            return x.masked_scatter(where[..., None], self.image_features(images).to(x.dtype))
        if self.training and torch.is_grad_enabled():
            # DDP waits for a gradient of all that is trained, here it is zero
            unused = [*self.vision.parameters(), *self.projector.parameters()]
            x = x + sum(0.0 * p.sum() for p in unused if p.requires_grad)
        return x

    def encode_images(self, images):
        """(P, 3, H, W) -> what the projector reads, (P, N, C_v). A frozen tower needs to encode an
        image but once, however often it is read; train_vlm.py encodes it anew at every step.
        """
        self.vision.compute_dtype = self.compute_dtype
        features = self.vision.features(images, self.feature_layer, self.class_token)
        return features.to(self.compute_dtype)

    def image_features(self, images):
        """(P, 3, H, W), or (P, N, C_v) from `encode_images`, -> (P, n, C)."""
        return self.projector(self.encode_images(images) if images.dim() == 4 else images)

    @torch.no_grad()
    def calibrate(self, images):
        """Adapt a new projector to the tower's features of these images (P, 3, H, W)."""
        size = self.model.embed_tokens.weight.square().mean().sqrt()
        self.projector.calibrate(self.encode_images(images), size)

    @property
    def tower_depth(self):
        """How many layers of the tower have a part in what is read."""
        return self.feature_layer % (len(self.vision.encoder.layers) + 1)

    def train_parts(self, vision=False, projector=True, language=False):
        """Say which parts are trained; the others are frozen. What of the vision tower lies behind
        the layer whose features are read is frozen in any case: it would get no gradient.
        """
        self.requires_grad_(False)
        tower, parts = self.vision, [self.projector] * projector
        parts += [self.model, self.lm_head] * language
        layers = tower.encoder.layers[: self.tower_depth]
        parts += [tower.embeddings, tower.pre_layrnorm, *layers] * vision
        for part in parts:
            if part is not None:
                part.requires_grad_(True)


# --- folders --------------------------------------------------------------------------------------


# our names -> those in a file
PREFIXES = {
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision.": "vision_tower.",
    "projector.": "multi_modal_projector.",
}
# what a config.json of LLaVA's means where it is silent
LLAVA_DEFAULTS = {
    "projector": "mlp",
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
}
LLAVA, OURS = "llava", "nanollm_vlm"  # model_type; the second is for what transformers has not


def build_vlm(language, tokenizer, vision, preprocessing, projector="mlp", layer=-2, token=False):
    """(VLM, its tokenizer) of a text model (GPT) and a vision tower, as load_vision gives it, each
    with its weights, and a new projector between them; layer and token: feature_layer, class_token
    of VLM. A tokenizer without <image>, as downloaded ones are, gets it, and the vocabulary grows.

    Raises UserError where the projector doesn't fit the patches.
    """
    if isinstance(language, VLM) or language.adapter:
        raise UserError(
            "a vision tower goes on a whole text model, not on one that has a tower or an adapter"
        )
    tokenizer = tokenizer.with_tokens([IMAGE])
    if tokenizer.vocab_size > language.cfg.vocab_size:
        language = grow_vocabulary(language, tokenizer.vocab_size)
    vlm = VLM(language.cfg, vision, projector, tokenizer.special[IMAGE], layer, token)
    vlm.load_state_dict(language.state_dict(), strict=False)
    vlm.preprocessing = preprocessing
    return vlm, tokenizer


def save_vlm(vlm, tokenizer, folder):
    """Write a model folder; transformers' LlavaForConditionalGeneration and AutoProcessor open it,
    save with pixel_shuffle. Each file is replaced atomically, the weights last.

    A linear projector is LLaVA's without activation, and with the identity as second layer.
    """
    folder, vision = Path(folder), vlm.vision.cfg
    clip, known = vision.model_type == CLIP_KIND, vlm.projector.r == 1
    text = config_json(vlm.cfg, tokenizer, vlm.model.norm.weight.dtype)
    # which tokens of the tower are features: "default" leaves the class token out
    strategy = "default" if clip and not vlm.class_token else "full"
    config = {
        "architectures": ["LlavaForConditionalGeneration" if known else "VLM"],
        "model_type": LLAVA if known else OURS,
        "projector": vlm.projector.kind,
        "projector_hidden_act": ACTIVATIONS[vlm.projector.kind],
        "multimodal_projector_bias": True,
        "image_token_index": vlm.image_id,
        "image_seq_length": vlm.tokens_per_image,
        "vision_feature_layer": vlm.feature_layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": vlm.cfg.tie_word_embeddings,
        **{name: text[name] for name in ("eos_token_id", "pad_token_id", "torch_dtype")},
        "text_config": text,
        "vision_config": dataclasses.asdict(vision) | ({} if clip else {"vision_use_head": False}),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(clip),
    }
    tokenizer.save(folder)
    vlm.preprocessing.save(folder)
    write_configs(config, tokenizer, folder)
    if known:
        atomic_write(folder / "processor_config.json", json.dumps(processor, indent=2) + "\n")
    tensors = {name: p.detach().cpu() for name, p in vlm.state_dict().items()}
    if vlm.projector.kind == "linear":
        bias = torch.zeros_like(tensors["projector.linear_1.bias"])
        tensors["projector.linear_2.weight"] = torch.eye(len(bias), dtype=bias.dtype)
        tensors["projector.linear_2.bias"] = bias
    tensors = {renamed(name, PREFIXES): tensor for name, tensor in tensors.items()}
    safetensors.save_file(tensors, folder / "model.safetensors")


def renamed(name, prefixes):
    """The name with the first of the prefixes that it has replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_vlm(folder):
    """(VLM in fp32 on the CPU, Tokenizer) from a folder that save_vlm or transformers'
    LlavaForConditionalGeneration has written. Raises UserError for what isn't implemented.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    values = LLAVA_DEFAULTS | {"image_token_index": values.get("image_token_id")} | values
    text, vision = values.get("text_config"), values.get("vision_config")
    there = isinstance(text, dict) and isinstance(vision, dict)
    need(there, path, "it must have a text_config and a vision_config")
    tokenizer, vision = Tokenizer.load(folder), vision_config_of(vision, path)
    kind, clip = values["projector"], vision.model_type == CLIP_KIND
    implemented = {
        "model_type": (LLAVA, OURS),
        "projector": tuple(ACTIVATIONS),
        "projector_hidden_act": (ACTIVATIONS.get(kind),),
        "vision_feature_select_strategy": ("default", "full") if clip else ("full",),
        "image_token_index": (tokenizer.special.get(IMAGE, f"that of {IMAGE}"),),
    }
    for name, choices in implemented.items():
        must, value = " or ".join(map(str, choices)), values.get(name)
        need(value in choices, path, f"{name} must be {must}, not {value!r}")
    vlm = VLM(
        config_of(text, path),
        ViT(vision),
        kind,
        values["image_token_index"],
        values["vision_feature_layer"],
        class_token=clip and values["vision_feature_select_strategy"] == "full",
    )
    back = {"vision_tower.vision_model.": "vision."} | {new: old for old, new in PREFIXES.items()}
    tensors = {renamed(name, back): x for name, x in load_tensors(folder).items()}
    if kind == "linear":
        tensors = {name: x for name, x in tensors.items() if ".linear_2." not in name}
    load_weights(vlm, tensors, folder)
    vlm.preprocessing = Preprocessing.from_folder(folder, vision.image_size)
    return vlm, tokenizer
