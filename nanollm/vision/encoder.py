"""The stack of blocks that reads a whole sequence at once; image and text towers are made of it.

    x = x + Attention(LayerNorm(x))
    x = x + MLP(LayerNorm(x))                MLP(x) = W_2 activation(W_1 x + b_1) + b_2

Pre-norm transformer with biases and LayerNorm (Vaswani et al. 2017, arXiv:1706.03762; Radford et
al. 2021, 2103.00020). Module names equal those of Hugging Face's CLIP and SigLIP. Shapes: B batch,
T tokens, C channels, H heads, D head size.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanollm.gpt import Linear, attention_dtype

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def check_block(cfg):
    """ValueError where a block of this shape can't be built."""
    if cfg.hidden_size % cfg.num_attention_heads:
        raise ValueError(f"{cfg.num_attention_heads} heads can't share {cfg.hidden_size} channels")
    if cfg.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {cfg.hidden_act!r} is not of {', '.join(ACTIVATIONS)}")


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
        # written out, it takes half the time of torch's kernel in fp32, which is the faster one:
        # 8 to 16 ms, forward and backward, for 64 images of 64 patches on one core
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
        self.checkpoint_activations = (
            False  # recompute each block in backward: less memory, more time
        )

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
