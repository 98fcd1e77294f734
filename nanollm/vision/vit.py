"""The image encoder: a vision transformer (ViT) of CLIP's or of SigLIP's kind.

    x = patches W + positions                a image is cut into P x P patches, as words of a text
    x = x + Attention(LayerNorm(x))          every patch sees every patch
    x = x + MLP(LayerNorm(x))

ViT: Dosovitskiy et al. 2021 (arXiv:2010.11929). CLIP (Radford et al. 2021, 2103.00020) puts a class
token in front, whose last state stands for the image. SigLIP (Zhai et al. 2023, 2303.15343) has
no such token: a learnt query attends to the patches instead.

Module names equal those of Hugging Face's CLIPVisionModel and SiglipVisionModel, so a state dict
needs no mapping. Precision: fp32 master weights; `compute_dtype` says in which precision the layers
compute. Shapes: B images, P patch size, N patches, T = N or N + 1 tokens, C channels, H heads.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm import safetensors
from nanollm.checkpoint import existing_folder, load_weights, read_json
from nanollm.config import UserError, atomic_write
from nanollm.gpt import Linear
from nanollm.vision.encoder import MLP, Encoder, LayerNorm, attention, check_block, init_blocks
from nanollm.vision.images import Preprocessing

CLIP_KIND, SIGLIP_KIND = "clip_vision_model", "siglip_vision_model"
ARCHITECTURES = {CLIP_KIND: "CLIPVisionModel", SIGLIP_KIND: "SiglipVisionModel"}
WHOLE_MODELS = {"clip": CLIP_KIND, "siglip": SIGLIP_KIND}  # folders that hold a text tower too
# what a Hugging Face config.json means where it is silent
SILENT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
SILENT_OF_KIND = {
    CLIP_KIND: {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    SIGLIP_KIND: {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}


@dataclass
class VisionConfig:
    """The shape of a ViT; the names are those of a Hugging Face config.json."""

    image_size: int = 64  # side of the square image, in pixels
    patch_size: int = 8  # P
    hidden_size: int = 128  # C
    intermediate_size: int = 512  # width of the MLP
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"  # on a CPU faster than its two approximations
    model_type: str = CLIP_KIND

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {self.model_type!r} is not of {', '.join(ARCHITECTURES)}")
        if self.patch_size > self.image_size:
            raise ValueError(f"a patch of {self.patch_size} exceeds a image of {self.image_size}")
        check_block(self)

    @property
    def grid(self):
        """Patches per side; what is left over at the right and the bottom is not looked at."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self):
        return self.grid**2  # N


# --- the vision transformer ----------------------------------------------------------------------


class PatchEmbedding(nn.Conv2d):
    """(B, 3, size, size) -> (B, N, C): the convolution whose stride is its width, as a product of
    matrices, which on a CPU in bf16 takes half the time (1.9 ms to 3.5 ms, forward and backward of
    64 images of 64 x 64 pixels on one core).
    """

    def forward(self, images):
        P, side = self.kernel_size[0], images.shape[-1] // self.kernel_size[0]
        x = images[:, :, : side * P, : side * P]
        x = x.unflatten(3, (side, P)).unflatten(2, (side, P))  # (B, 3, side, P, side, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 3 P P)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.flatten(1).to(x.dtype), bias)


def sines_of_places(side, channels):
    """Sines and cosines of row and column, a quarter of the channels each, for side x side patches:
    (N, C). Positions start from these instead of small noise, so that a tower trained on little
    does not forget where things are (Beyer et al. 2022, arXiv:2205.01580, section 2).
    """
    quarter = channels // 4
    angles = torch.outer(torch.arange(side).float(), 100 ** -torch.linspace(0, 1, quarter))
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, C / 2)
    rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    return F.pad(torch.cat((rows, columns), dim=1), (0, channels - 4 * quarter))


class Embeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, clip = cfg.hidden_size, cfg.model_type == CLIP_KIND
        self.class_embedding = nn.Parameter(torch.randn(C) * C**-0.5) if clip else None
        self.patch_embedding = PatchEmbedding(
            cfg.num_channels, C, cfg.patch_size, stride=cfg.patch_size, bias=not clip
        )
        self.position_embedding = nn.Embedding(cfg.num_patches + clip, C)
        with torch.no_grad():
            self.position_embedding.weight[: int(clip)] = 0
            self.position_embedding.weight[int(clip) :] = sines_of_places(cfg.grid, C)

    def forward(self, images):
        x = self.patch_embedding(images)  # (B, N, C)
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        return x + self.position_embedding.weight.to(x.dtype)  # (B, T, C)


class PoolingAttention(nn.Module):
    """Attention with one matrix for queries, keys and values, as torch's MultiheadAttention has."""

    def __init__(self, cfg):
        super().__init__()
        C, self.heads = cfg.hidden_size, cfg.num_attention_heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * C, C) * C**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C))
        self.out_proj = Linear(C, C)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query, x):
        weights, biases = self.in_proj_weight.to(x.dtype), self.in_proj_bias.to(x.dtype)
        q, k, v = (
            F.linear(y, w, b) for y, w, b in zip((query, x, x), weights.chunk(3), biases.chunk(3))
        )
        return self.out_proj(attention(q, k, v, self.heads))


class PoolingHead(nn.Module):
    """SigLIP's: a learnt query reads the patches, (B, N, C) -> (B, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, cfg.hidden_size))
        self.attention = PoolingAttention(cfg)
        self.layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x):
        y = self.attention(self.probe.to(x.dtype).expand(len(x), -1, -1), x)  # (B, 1, C)
        return (y + self.mlp(self.layernorm(y)))[:, 0]


class ViT(nn.Module):
    """Images (B, 3, size, size) -> one vector each, (B, C); `features` gives one per patch."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = torch.float32
        clip = cfg.model_type == CLIP_KIND
        self.embeddings = Embeddings(cfg)
        # the name is misspelt in Hugging Face's files too
        self.pre_layrnorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps) if clip else None
        self.encoder = Encoder(cfg)
        self.post_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.head = None if clip else PoolingHead(cfg)
        init_blocks(self.encoder)

    def forward(self, images):
        """What Hugging Face calls pooler_output, (B, C) in the compute precision."""
        x = self.hidden(images)
        if self.head is None:
            return self.post_layernorm(x[:, 0])
        return self.head(self.post_layernorm(x))

    def features(self, images, layer=-2, class_token=False):
        """One vector per patch after block `layer`, (B, N, C), rows of the image from the top;
        with `class_token` the class token's in front of them, where the tower has one.

        Counted as Hugging Face's hidden_states: 0 is what enters the first block, -1 what leaves
        the last. LLaVA reads -2 (Liu et al. 2023, arXiv:2304.08485); blocks above don't run.
        """
        states = len(self.encoder.layers) + 1
        if not -states <= layer < states:
            raise ValueError(f"layer {layer} is not of the {states} states of this ViT")
        x = self.hidden(images, layer % states)
        return x if class_token or self.embeddings.class_embedding is None else x[:, 1:]

    def hidden(self, images, depth=None):
        """The tokens after `depth` blocks (all where None), (B, T, C)."""
        size = self.cfg.image_size
        if tuple(images.shape[1:]) != (self.cfg.num_channels, size, size):
            wants = f"(B, {self.cfg.num_channels}, {size}, {size})"
            raise ValueError(f"images have shape {tuple(images.shape)} instead of {wants}")
        x = self.embeddings(images.to(self.compute_dtype))
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        return self.encoder(x, depth)

    @property
    def device(self):
        return self.embeddings.patch_embedding.weight.device


# --- model folders -------------------------------------------------------------------------------


def read_values(cls, values, path, **fixed):
    """The dataclass `cls` filled from a config.json's values; UserError where they don't fit."""
    known = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in fixed}
    given = {name: values[name] for name in known if values.get(name) is not None}
    for name, value in given.items():
        kind = type(known[name])
        if kind is str:
            fits = isinstance(value, str)
        else:
            positive = type(value) in (int, kind) and value > 0
            fits = positive or (value == 0 and name.endswith("_id"))
        if not fits:
            raise UserError(f"{path} is incomplete or inconsistent: {name} is {value!r}")
    try:
        return cls(**given, **fixed)
    except ValueError as e:
        raise UserError(f"{path} describes a model that is not implemented: {e}") from None


def read_vision_config(folder):
    """config.json of a vision tower, or of a model that has one -> VisionConfig."""
    path = Path(folder) / "config.json"
    return vision_config_of(read_json(path), path)


def vision_config_of(values, path):
    """The VisionConfig that these values of a config.json mean; `path` is where they stand."""
    kind = values.get("model_type")
    if kind in WHOLE_MODELS:
        values, kind = values.get("vision_config"), WHOLE_MODELS[kind]
        if not isinstance(values, dict):
            raise UserError(f"{path} has no vision_config")
    if kind not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *WHOLE_MODELS))
        raise UserError(f"{path}: model_type {kind!r} is not one of {known}")
    if values.get("vision_use_head") is False:
        raise UserError(f"{path}: a SigLIP without its pooling head is not implemented")
    values = SILENT | SILENT_OF_KIND[kind] | {k: v for k, v in values.items() if v is not None}
    return read_values(VisionConfig, values, path, model_type=kind)


def load_vision(folder):
    """(ViT in fp32 on the CPU, its Preprocessing) from a folder that holds a CLIPVisionModel, a
    SiglipVisionModel, or a whole CLIPModel or SiglipModel, whose vision part is taken.
    """
    folder = existing_folder(folder)
    vit = ViT(read_vision_config(folder))
    tensors = safetensors.load_folder(folder)
    # within a whole model, and in files of older versions, the names have a prefix
    prefix = "vision_model."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    load_weights(vit, without_ids(tensors), folder)
    return vit, load_preprocessing(folder, vit.cfg)


def without_ids(tensors):
    """Files of older versions hold the numbers 0, 1, 2 ... of the positions as tensors too."""
    return {name: x for name, x in tensors.items() if not name.endswith("position_ids")}


def load_preprocessing(folder, cfg):
    preprocessing, size = Preprocessing.from_folder(folder), cfg.image_size
    if preprocessing.size != (size, size):
        makes = " x ".join(map(str, preprocessing.size))
        raise UserError(f"{folder}: its preprocessing makes {makes} pixels, its ViT reads {size}")
    return preprocessing


def save_vision(vit, preprocessing, folder):
    """Write a folder that transformers' CLIPVisionModel or SiglipVisionModel opens, and whose
    preprocessing AutoImageProcessor opens; the weights last.
    """
    kind = ARCHITECTURES[vit.cfg.model_type]
    config = {"architectures": [kind], **dataclasses.asdict(vit.cfg), "torch_dtype": "float32"}
    write_folder(config, vit, preprocessing, folder)


def write_folder(config, model, preprocessing, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing.save(folder)
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
