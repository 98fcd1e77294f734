"""CLIP's two towers: an image and its caption become vectors that lie close together (Radford et
al. 2021, arXiv:2103.00020). The losses are in train_vlm.py.

Module names equal those of Hugging Face's CLIPModel. Shapes: B pairs, T tokens, C channels, E
channels of the shared space.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm import safetensors
from nanollm.config import atomic_write
from nanollm.gpt import Linear
from nanollm.vision.vit import Encoder, LayerNorm, ViT, init_blocks

MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: more than 100 is unstable


@dataclass
class TextConfig:
    """The shape of the text tower; the names are those of a Hugging Face config.json."""

    vocab_size: int = 2048  # V
    hidden_size: int = 128  # C
    intermediate_size: int = 512  # width of the MLP
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 64  # the longest T
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    eos_token_id: int = 1  # its first place in a caption is where the text is read off


class TextEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens):
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextTower(nn.Module):
    """Tokens (B, T) -> (B, C): the state at the first end token, which has seen the whole text.

    Attention is causal, so what pads a row behind its end token has no effect.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = torch.float32
        self.embeddings = TextEmbeddings(cfg)
        self.encoder = Encoder(cfg, causal=True)
        self.final_layer_norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        init_blocks(self.encoder)

    def forward(self, tokens):
        x = self.encoder(self.embeddings(tokens).to(self.compute_dtype))
        ends = (tokens == self.cfg.eos_token_id).int().argmax(1)
        return self.final_layer_norm(x[torch.arange(len(tokens), device=tokens.device), ends])


class CLIP(nn.Module):
    """An image tower and a text tower, each with a linear map into a space of E channels.

    With `sigmoid` it is trained by SigLIP's loss: then it has a `logit_bias`, which starts at -10,
    and its scale starts at 10, as nearly all cells of the loss are no pair.
    """

    def __init__(self, vision_cfg, text_cfg, projection_dim=128, sigmoid=False):
        super().__init__()
        self.projection_dim = projection_dim  # E
        self.text_model = TextTower(text_cfg)
        self.vision_model = ViT(vision_cfg)
        self.visual_projection = Linear(vision_cfg.hidden_size, projection_dim, bias=False)
        self.text_projection = Linear(text_cfg.hidden_size, projection_dim, bias=False)
        for projection in (self.visual_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None

    def encode_images(self, images):
        """(B, 3, size, size) -> (B, E) fp32, each row of length 1."""
        return F.normalize(self.visual_projection(self.vision_model(images)).float(), dim=-1)

    def encode_texts(self, tokens):
        """(B, T), each row with an end token -> (B, E) fp32, each row of length 1."""
        return F.normalize(self.text_projection(self.text_model(tokens)).float(), dim=-1)

    def forward(self, images, tokens):
        """Both embeddings."""
        return self.encode_images(images), self.encode_texts(tokens)

    @torch.no_grad()
    def limit_scale(self):
        """After each optimizer step: the scale may not exceed 100 (Radford et al. 2021)."""
        self.logit_scale.clamp_(max=MAX_LOG_SCALE)

    @property
    def compute_dtype(self):
        return self.vision_model.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype):
        self.vision_model.compute_dtype = self.text_model.compute_dtype = dtype

    @property
    def device(self):
        return self.logit_scale.device


def save_clip(clip, tokenizer, folder, preprocessing):
    """Write a folder that transformers' CLIPModel opens, its tokenizer and preprocessing too;
    load_vision takes the vision tower out of it.

    It reads a text off at the first end token as we do, unless that has the id 2: then it takes the
    highest id for the end, as old files of CLIP want it.
    """
    folder, width = Path(folder), {"projection_dim": clip.projection_dim}
    ids = {"model_type": "clip_text_model", "bos_token_id": None, "pad_token_id": tokenizer.pad_id}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "text_config": asdict(clip.text_model.cfg) | ids | width,
        "vision_config": asdict(clip.vision_model.cfg) | width,
        "torch_dtype": "float32",
    }
    tokenizer.save(folder)
    preprocessing.save(folder)
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    weights = {name: p.detach().cpu() for name, p in clip.state_dict().items()}
    safetensors.save_file(weights, folder / "model.safetensors")
