"""The image encoder: a vision transformer (ViT) of CLIP's or of SigLIP's kind.

    x = patches W + positions                cut into P x P patches, as a text into words
    x = x + Attention(LayerNorm(x))          every patch sees every patch
    x = x + MLP(LayerNorm(x))                MLP(x) = W_2 activation(W_1 x + b_1) + b_2

ViT: Dosovitskiy et al. 2021 (arXiv:2010.11929). CLIP (Radford et al. 2021, 2103.00020) puts a class
token in front, whose last state stands for the image. SigLIP (Zhai et al. 2023, 2303.15343) has
no such token: a learnt query attends to the patches instead, which is left out, for a VLM reads the
patches themselves. The stack of blocks, Encoder, is that of CLIP's text tower, too.

Module names equal those of Hugging Face's CLIPVisionModel and SiglipVisionModel, so a state dict
needs no mapping. Precision: fp32 master weights; `compute_dtype` says in which precision the layers
compute. Shapes: B images, P patch size, N patches, T = N or N + 1 tokens, C channels, H heads, D
head size.
"""

import re
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanollm import safetensors
from nanollm.checkpoint import existing_folder, load_weights
from nanollm.config import read_json
from nanollm.formats import need
from nanollm.gpt import Linear, attention_dtype
from nanollm.vision.images import Preprocessing

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
CLIP_KIND, SIGLIP_KIND = "clip_vision_model", "siglip_vision_model"
WHOLE_MODELS = {"clip": CLIP_KIND, "siglip": SIGLIP_KIND}  # folders that hold a text tower too
# what a Hugging Face config.json means where it is silent
COMMON = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
COMMON |= dict(num_attention_heads=12, image_size=224)
CLIP_VALUES = dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
SIGLIP_VALUES = dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
DEFAULTS = {CLIP_KIND: COMMON | CLIP_VALUES, SIGLIP_KIND: COMMON | SIGLIP_VALUES}


@dataclass
class VisionConfig:
    """The shape of a ViT; the names are those of a Hugging Face config.json."""

    image_size: int = 64  # side of the square image, in pixels
    patch_size: int = 8  # P
    hidden_size: int = 128  # C
    intermediate_size: int = 512  # width of the MLP
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"  # on a CPU faster than its two approximations
    model_type: str = CLIP_KIND

    @property
    def grid(self):
        """Patches per side; what is left over at the right and the bottom is not looked at."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self):
        return self.grid**2  # N


# --- the stack of blocks -------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias in fp32, handed back in x's precision."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def attention(q, k, v, heads, causal=False):
    """softmax(q k^T / sqrt(D)) v for q (B, T, C) and k, v (B, S, C), each head on D = C / H of the
    channels; returns (B, T, C).
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not causal:
        # written out, it takes half the time of torch's kernel in fp32, which is the faster one
        y = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v
    else:
        exact = (x.to(attention_dtype(x.device, x.dtype)) for x in (q, k, v))
        y = F.scaled_dot_product_attention(*exact, is_causal=causal).to(q.dtype)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, cfg, causal):
        super().__init__()
        self.heads, self.causal = cfg.num_attention_heads, causal
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear(cfg.hidden_size, cfg.hidden_size))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, self.causal))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.activation = ACTIVATIONS[cfg.hidden_act]
        self.fc1 = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, cfg, causal):
        super().__init__()
        self.layer_norm1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = Attention(cfg, causal)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of blocks: (B, T, C) -> (B, T, C). With `depth` only the first so many run."""

    def __init__(self, cfg, causal=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(cfg, causal) for _ in range(cfg.num_hidden_layers))
        self.checkpoint_activations = False  # recompute each block in the backward pass

    def forward(self, x, depth=None):
        for block in self.layers[:depth]:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def init_blocks(encoder):
    """CLIP's initialisation: N(0, 1 / C) for what reads the channels, and what writes to them
    divided by sqrt(2 layers), so that their sum keeps its size with depth. Biases are zero.
    """
    for block in encoder.layers:
        width = block.mlp.fc1.in_features**-0.5
        shrink = (2 * len(encoder.layers)) ** -0.5
        for name, p in block.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.normal_(p, std=width * shrink)
            elif name.endswith("fc1.weight"):
                nn.init.normal_(p, std=width * 2**-0.5)
            elif name.endswith("proj.weight"):
                nn.init.normal_(p, std=width)
            elif name.endswith("bias"):
                nn.init.zeros_(p)


# --- the vision transformer ----------------------------------------------------------------------


class PatchEmbedding(nn.Conv2d):
    """(B, 3, size, size) -> (B, N, C): the convolution whose stride is its width, as a product of
    matrices, which on a CPU in bf16 takes half the time.
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
        self.patch_embedding = PatchEmbedding(3, C, cfg.patch_size, cfg.patch_size, bias=not clip)
        self.position_embedding = nn.Embedding(cfg.num_patches + clip, C)
        with torch.no_grad():
            self.position_embedding.weight[: int(clip)] = 0
            self.position_embedding.weight[int(clip) :] = sines_of_places(cfg.grid, C)

    def forward(self, images):
        x = self.patch_embedding(images)  # (B, N, C)
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        return x + self.position_embedding.weight.to(x.dtype)  # (B, T, C)


class ViT(nn.Module):
    """Images (B, 3, size, size) -> one vector per patch by `features`, or one each, (B, C)."""

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
        init_blocks(self.encoder)

    def forward(self, images):
        """The class token's last state (of CLIP's kind of tower), (B, C) in the compute precision:
        what Hugging Face calls pooler_output.
        """
        return self.post_layernorm(self.hidden(images)[:, 0])

    def features(self, images, layer=-2, class_token=False):
        """One vector per patch after block `layer`, (B, N, C), rows of the image from the top;
        with `class_token` the class token's in front of them, where the tower has one.

        Counted as Hugging Face's hidden_states: 0 is what enters the first block, -1 what leaves
        the last. LLaVA reads -2 (Liu et al. 2023, arXiv:2304.08485); blocks above don't run.
        """
        x = self.hidden(images, layer % (len(self.encoder.layers) + 1))
        return x if class_token or self.embeddings.class_embedding is None else x[:, 1:]

    def hidden(self, images, depth=None):
        """The tokens after `depth` blocks (all where None), (B, T, C)."""
        x = self.embeddings(images.to(self.compute_dtype))
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        return self.encoder(x, depth)


# --- model folders -------------------------------------------------------------------------------


def vision_config_of(values, path):
    """The VisionConfig that the values of a config.json mean, of a vision tower or a model that has
    one; `path` is where they stand.
    """
    kind = values.get("model_type")
    if kind in WHOLE_MODELS:
        values, kind = values.get("vision_config") or {}, WHOLE_MODELS[kind]
    known = ", ".join((*DEFAULTS, *WHOLE_MODELS))
    need(kind in DEFAULTS, path, f"model_type {kind!r} is not one of {known}")
    given = {key: value for key, value in values.items() if value is not None}
    values = DEFAULTS[kind] | given | {"model_type": kind}
    known, named = ", ".join(ACTIVATIONS), values["hidden_act"]
    need(named in ACTIVATIONS, path, f"hidden_act {named!r} is not one of {known}")
    return VisionConfig(**{field.name: values[field.name] for field in fields(VisionConfig)})


def load_vision(folder):
    """(ViT in fp32 on the CPU, its Preprocessing) from a folder that holds a CLIPVisionModel, a
    SiglipVisionModel, or a whole CLIPModel or SiglipModel, whose vision part is taken.
    """
    folder = existing_folder(folder)
    path = folder / "config.json"
    vit = ViT(vision_config_of(read_json(path), path))
    tensors = load_tensors(folder)
    # within a whole model, and in files of older versions, the names have a prefix
    prefix = "vision_model."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    load_weights(vit, tensors, folder)
    return vit, Preprocessing.from_folder(folder, vit.cfg.image_size)


def load_tensors(folder):
    """All tensors but SigLIP's pooling head, and the numbers 0, 1, 2 ... of the positions, which
    older files hold too.
    """
    tensors = safetensors.load_folder(folder).items()
    unread = re.compile(r"(^|vision_model\.|vision_tower\.)head\.|position_ids$")
    return {name: x for name, x in tensors if not unread.search(name)}
