"""The GPT that every script trains: a decoder shaped like Llama and Qwen3.

    x = x + Attention(RMSNorm(x))        grouped-query attention, rotary positions, causal
    x = x + SwiGLU(RMSNorm(x))           SwiGLU(x) = W_down (silu(W_gate x) * W_up x)

Decoder: Vaswani et al. 2017 (arXiv:1706.03762); norms before each branch, as in GPT-2: Xiong et al.
2020 (2002.04745); RMSNorm: Zhang & Sennrich 2019 (1910.07467); RoPE: Su et al. 2021 (2104.09864);
SwiGLU: Shazeer 2020 (2002.05202); grouped-query attention: Ainslie et al. 2023 (2305.13245);
QK-norm: Henry et al. 2020 (2010.04245), placed as in Qwen3.

Module names equal those of Hugging Face's Llama and Qwen3, so a state dict needs no mapping.
Precision: parameters are fp32 masters; `model.compute_dtype` says in which precision the layers
compute. Shapes: B batch, T tokens, S cached tokens, C channels, H heads, G key-value heads, D head
size, V vocabulary.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanollm.config import UserError


@dataclass
class GPTConfig:
    """The shape of a model; the names are those of a Hugging Face config.json (checkpoint.py)."""

    vocab_size: int = 2048  # V
    hidden_size: int = 128  # C
    intermediate_size: int = 384  # width of the MLP
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 4  # G: H / G query heads share one key-value head
    head_dim: int = 32  # D
    max_position_embeddings: int = 512  # the context: the longest T
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # how Llama 3 stretches RoPE: see rope_frequencies
    tie_word_embeddings: bool = True
    qk_norm: bool = True  # Qwen3's: RMSNorm on every query and key head
    attention_bias: bool = False  # Qwen2's: biases on q, k, v
    is_causal: bool = True  # False: a token sees what comes after it, too (BERT)

    def __post_init__(self):
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise ValueError(f"{H} heads can't share {G} key-value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd, but RoPE rotates pairs")


def shape_of(cfg):
    """The flags of a script that makes a model, as GPTConfig names them."""
    C, H, G = cfg.channels, cfg.heads, getattr(cfg, "kv_heads", None) or cfg.heads
    if C % (2 * H) or H % G:
        raise UserError(
            f"--channels {C} must be an even multiple of --heads {H}, and that of --kv_heads {G}"
        )
    return {
        "hidden_size": C,
        "intermediate_size": cfg.mlp or -(-C * 8 // 3 // 64) * 64,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": C // H,
    }


# --- positions and masks -------------------------------------------------------------------------


def rope_frequencies(cfg):
    """Angle per position of each pair of channels, theta^(-2i/D) for i < D/2; returns (D/2,).

    Su et al. 2021, section 3.2.2. Llama 3 stretches RoPE for contexts longer than the L tokens of
    pretraining: long waves by `factor`, short ones not at all, those between by their turns in L
    tokens (Grattafiori et al. 2024, arXiv:2407.21783).
    """
    D, scaling = cfg.head_dim, cfg.rope_scaling
    freqs = 1.0 / cfg.rope_theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    if scaling is None:
        return freqs
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a short wave, 0: a long one
    return keep * freqs + (1 - keep) * freqs / scaling["factor"]


def rotation_table(cfg):
    """cos and sin of every position's angles, (S, D) each, laid out for `rotate`."""
    angles = torch.outer(torch.arange(cfg.max_position_embeddings).float(), rope_frequencies(cfg))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + D/2}) of x (B, H, T, D) by its angle: (a, b) -> (a cos - b sin,
    b cos + a sin), one product with (a, b) and one with the halves swapped; cos, sin (., 1, T, D).
    """
    x = x.float()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def document_mask(documents, causal=True):
    """The attention mask of packed rows: a token sees itself and what came before in its document,
    without `causal` also what comes after.

    documents (B, T): the number of the document that each token belongs to. Returns (B, 1, T, T)
    bool, True where attention is allowed.
    """
    same = documents[:, :, None] == documents[:, None, :]
    return (same.tril() if causal else same)[:, None]


def see_prefix(mask, V, T, device):
    """The mask when V keys that every token sees stand in front: (..., T, V + S) for (..., T, S).

    They belong to no document, so each document of a packed row has them in front of itself.
    """
    if mask is None and T == 1:  # a decoding step: everything is visible
        return None
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return F.pad(mask, (V, 0), value=True)


def attend(q, k, v, mask, causal=True):
    """softmax(q k^T / sqrt(D)) v; q (B, H, T, D), k and v (B, G, S, D). Without a mask a token sees
    what came before it, unless `causal` is False.
    """
    if q.shape[1] != k.shape[1]:  # H / G query heads share one key-value head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    causal = causal and mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention_dtype(device, compute_dtype):
    """The precision of queries, keys and values: fp32 but on CUDA, for torch's CPU kernel needs
    three to four times as long in bf16.
    """
    return compute_dtype if device.type == "cuda" else torch.float32


class KVCache:
    """Keys and values of the tokens so far, in two buffers of fixed size (layers, B, G, S, D).

    Before each forward pass the owner, generate.py, says where the new tokens go (`slots`, (T,)
    int64) and how many slots attention looks at (`visible`).
    """

    def __init__(self, cfg, batch, size, device, dtype):
        shape = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads, size, cfg.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.slots, self.visible = None, size

    def append(self, layer, k, v):
        """Store k, v (B, G, T, D) in the slots; returns all that is visible, (B, G, visible, D)."""
        self.k[layer].index_copy_(2, self.slots, k)
        self.v[layer].index_copy_(2, self.slots, v)
        return self.k[layer, :, :, : self.visible], self.v[layer, :, :, : self.visible]

    def select(self, rows):
        """Keep these rows of the batch (int64)."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


# --- layers --------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer that computes in the precision of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the mean over the last dimension, in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        h = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight.to(x.dtype) * h.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        C, H, G, D = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.head_dim, self.layer, self.causal = D, layer, cfg.is_causal
        self.q_proj = Linear(C, H * D, bias=cfg.attention_bias)
        self.k_proj = Linear(C, G * D, bias=cfg.attention_bias)
        self.v_proj = Linear(C, G * D, bias=cfg.attention_bias)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(D, cfg.rms_norm_eps) if cfg.qk_norm else None

    def project(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def fuse(self):
        self.project = fused(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x, cos, sin, mask, cache, prefix=None):
        """prefix: keys and values (2, G, V, D) in front of every row's own."""
        B, T, _ = x.shape
        # (B, T, H, D), and twice (B, T, G, D)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.project(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D), (B, G, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (y.to(attention_dtype(x.device, x.dtype)) for y in (q, k, v))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        if prefix is not None:
            front = prefix.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)
            k, v = torch.cat((front[0], k), dim=2), torch.cat((front[1], v), dim=2)
        y = attend(q, k, v, mask, self.causal).to(x.dtype)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU. Whoever puts another one here says in `hidden_act` what Hugging Face calls it; one
    with other matrices opens here alone: transformers would make up those that it misses.
    """

    hidden_act = "silu"

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)

    def fuse(self):
        self.project = fused(self.gate_proj, self.up_proj)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, mask, cache, prefix=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, prefix)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The stack of blocks between the embedding and the head: (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.prefix = None  # soft_prompts.py: makes keys and values in front of every layer's own
        cos, sin = rotation_table(cfg)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.checkpoint_activations = False  # recompute blocks in backward: less memory, more time

    def forward(self, x, positions=None, mask=None, cache=None):
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        prefix = [None] * len(self.layers)
        if self.prefix is not None:
            prefix = self.prefix(self, x.dtype)  # (layers, 2, G, V, D)
            V = prefix.shape[-2]
            positions, mask = positions + V, see_prefix(mask, V, x.shape[1], x.device)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B or 1, 1, T, D)
        for block, front in zip(self.layers, prefix):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, front, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, front)
        return self.norm(x)


# --- for sampling --------------------------------------------------------------------------------


def fused(*linears):
    """One matrix product that gives what several linear layers of one input give, as a tuple."""
    if not all(type(linear) is Linear for linear in linears):
        return lambda x: tuple(linear(x) for linear in linears)  # unmerged adapters stay apart
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    sizes = [linear.out_features for linear in linears]
    return lambda x: F.linear(x, weight, bias).split(sizes, dim=-1)


def unwrap(module, merged, but=()):
    """Replace, in place, the layers that an adapter or four bits changed by plain ones: the base's
    own, or with `merged` ones that compute the same, where such exist; none in the parts with an id
    in `but`.
    """
    for name, child in list(module.named_children()):
        if hasattr(child, "plain"):
            setattr(module, name, child.plain(merged))
        elif id(child) not in but:
            unwrap(child, merged, but)


# --- models --------------------------------------------------------------------------------------

TEXT_ONLY = "this model reads text only; for images take one with a vision tower (train_vlm.py)"


class GPT(nn.Module):
    """A causal language model: tokens (B, T) -> logits (B, T, V), at t those of the next token."""

    tokens_per_image = 0  # nanollm/vision/vlm.py reads images

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = torch.float32
        self.adapter = self.lora = None  # nanollm/peft: what is attached, and which LoRA speaks
        self.model = Decoder(cfg)
        tied = cfg.tie_word_embeddings
        self.lm_head = None if tied else Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        init_weights(self)

    def forward(self, tokens, positions=None, mask=None, cache=None, where=None):
        """positions (B, T) default to 0..T-1; mask as attend takes it; cache a KVCache. With
        `where` (B, T) bool the logits of those positions only, (n, V): the head costs a good part.
        """
        hidden = self.hidden(tokens, positions, mask, cache)
        return self.head(hidden if where is None else hidden[where])

    def hidden(self, tokens, positions=None, mask=None, cache=None):
        """What the head reads: (B, T, C)."""
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)
        return self.model(x, positions, mask, cache)

    def head(self, x):
        """(B, T, C) -> logits (B, T, V), with the embedding's own weights when they are tied."""
        if self.lm_head is None:
            return F.linear(x, self.model.embed_tokens.weight.to(x.dtype))
        return self.lm_head(x)

    @torch.no_grad()
    def merged(self):
        """A copy to sample with: weights cast once instead of at every step, adapters merged into
        them where they can be, and sister projections made one product.
        """
        dtype, tables = self.compute_dtype, (self.model.cos, self.model.sin)  # angles stay fp32
        kept = self.shared() | {id(table): table for table in tables}
        if not any(hasattr(module, "plain") for module in self.modules()):  # nothing to merge first
            kept |= {id(p): nn.Parameter(p.to(dtype), False) for p in self.parameters()}
        copied = copy.deepcopy(self, kept)
        unwrap(copied, merged=True, but=self.shared())
        for name, part in copied.named_children():
            if id(getattr(self, name)) not in self.shared():
                part.to(dtype)
        copied.model.cos, copied.model.sin = tables
        if self.model.prefix is not None:  # computed once, too
            copied.model.prefix = self.model.prefix.fixed(self.model, dtype)
        for module in list(copied.modules()):
            if hasattr(module, "fuse"):
                module.fuse()
        copied.eval()
        if copied.lora is None or copied.lora.rows is None:  # else each batch has rows of its own
            copied.merged = lambda: copied
        return copied

    def shared(self):
        """{id: part} of what a copy to sample with leaves as it is."""
        return {}

    def select_rows(self, rows):
        """The batch goes on with these rows (int64, may repeat): so do the adapters of each row."""
        if self.lora is not None and self.lora.rows is not None:
            self.lora.rows = self.lora.rows[rows]

    def gather_images(self, prompts, images):
        """The images of all prompts in one batch, for `hidden`; this model reads none."""
        if any(each is not None and len(each) for each in images or ()):
            raise UserError(TEXT_ONLY)

    def image_store(self):
        """An empty store of images as this model reads them."""
        raise UserError(TEXT_ONLY)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device


class ScalarGPT(nn.Module):
    """One number per token: tokens (B, T) -> (B, T) in fp32. A reward model, or a critic.

    Named as Hugging Face's LlamaForSequenceClassification with one label. The head starts at
    N(0, 1 / (C + 1)) (Stiennon et al. 2020, arXiv:2009.01325). `shift` is taken off every number:
    a reward model's mean, so that rewards lie around zero.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.shift = cfg, 0.0
        self.compute_dtype = torch.float32
        self.adapter = self.lora = None
        self.model = Decoder(cfg)
        self.score = Linear(cfg.hidden_size, 1, bias=False)
        init_weights(self)
        nn.init.normal_(self.score.weight, std=(cfg.hidden_size + 1) ** -0.5)

    def forward(self, tokens, positions=None, mask=None):
        """As GPT's, without a cache."""
        x = self.model(self.model.embed_tokens(tokens).to(self.compute_dtype), positions, mask)
        return self.score(x.float())[..., 0] - self.shift

    device = GPT.device


def init_weights(model):
    """The one place where a fresh GPT's weights are set; norms start at one and biases at zero.

    Embedding and head: N(0, std^2), std 0.02, or 2.56 / C where C > 128, so that logits start near
    zero at every width. Matrices: N(0, 1/fan_in), which keeps the size of activations. The last
    matrix of each branch (o_proj, down_proj): zero, so that every block starts as the identity
    (Zhang et al. 2019, arXiv:1901.09321; Yang et al. 2022, 2203.03466, also for the 1 / C).
    """
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
            nn.init.zeros_(p)
        elif "embed_tokens" in name or "lm_head" in name:
            nn.init.normal_(p, std=min(0.02, 2.56 / p.shape[1]))
        elif p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)


def count_parameters(model):
    """Number of parameters, and of those that sit in matrix products which every token passes
    (each costs 6 FLOP per token trained): without a vision tower, through which images go.
    """
    total = sum(p.numel() for p in model.parameters())
    through = sum(p.numel() for p in model.model.parameters())
    if model.lm_head is not None:  # else the embedding is the head as well
        through -= model.model.embed_tokens.weight.numel()
        through += sum(p.numel() for p in model.lm_head.parameters())
    return total, through
