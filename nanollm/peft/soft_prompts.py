"""Soft prompts: V trained virtual tokens in front of the text; the model itself stays as it is.

Every method here is a module that gives keys and values (layers, 2, G, V, D), which each layer's
attention sees in front of the text's own:

    prefix   K, V = MLP(P), P (V, C); saved without the MLP    Li & Liang 2021, arXiv:2101.00190
    ptuning  K, V trained themselves (P-Tuning v2)             Liu et al. 2021, 2110.07602
    prompt   K, V that the model makes of embeddings P (V, C)  Lester et al. 2021, 2104.08691

A causal model reads what stands in front without looking at what follows. So the embeddings of
prompt tuning can be read once per batch, and their keys and values serve every row, every document
of a packed row, and every step of generation: no layer tells this from V more tokens in the row.

The keys of prefix and ptuning are those after RoPE; the text's first token stands at position V.
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn

from nanollm.config import UserError
from nanollm.gpt import rotation_table


class Recorder:
    """Stands where a KVCache would: keeps keys and values of each layer, with their gradients."""

    def __init__(self):
        self.layers = []

    def append(self, layer, k, v):
        self.layers.append(torch.stack((k[0], v[0])))  # (2, G, V, D)
        return k, v


def keys_and_values(decoder, embeddings):
    """What the layers make of embeddings (V, C) at positions 0..V-1: (layers, 2, G, V, D)."""
    V, recorder = len(embeddings), Recorder()
    x, cos, sin = embeddings[None], decoder.cos[None, None, :V], decoder.sin[None, None, :V]
    for block in decoder.layers:
        x = block(x, cos, sin, None, recorder)
    return torch.stack(recorder.layers)


class KeysAndValues(nn.Module):
    """P-Tuning v2: keys and values are the parameters."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)  # (layers, 2, G, V, D)

    def forward(self, decoder, dtype):
        return self.values

    def fixed(self, decoder, dtype):
        """The same without what only training needs."""
        return KeysAndValues(self.values.detach())


class PrefixMLP(nn.Module):
    """Prefix tuning: K, V = W2 tanh(W1 P + b1) + b2, which trains more steadily than keys and
    values themselves. They are all that is saved, and all that generation needs.
    """

    def __init__(self, V, C, hidden, shape):
        super().__init__()
        self.shape = shape  # layers, 2, G, D
        self.embedding = nn.Embedding(V, C)
        self.transform = nn.Sequential(
            nn.Linear(C, hidden), nn.Tanh(), nn.Linear(hidden, math.prod(shape))
        )

    def forward(self, decoder, dtype):
        flat = self.transform(self.embedding.weight)  # (V, layers * 2 * G * D)
        return unflatten(flat, self.shape)

    def fixed(self, decoder, dtype):
        return KeysAndValues(self(decoder, dtype).detach().clone())


class PromptEmbeddings(nn.Module):
    """Prompt tuning: the model reads V trained embeddings in front of the text."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = nn.Parameter(embedding)  # (V, C)

    def forward(self, decoder, dtype):
        return keys_and_values(decoder, self.embedding.to(dtype))

    @torch.no_grad()
    def fixed(self, decoder, dtype):
        return KeysAndValues(self(decoder, dtype))


# --- attaching, saving, loading ------------------------------------------------------------------


def add(model, method, settings):
    """Put V = settings.virtual_tokens virtual tokens in front; raises UserError for less than one,
    and for as many as the model's context has positions.

    Embeddings start as those of random tokens of the vocabulary, and the keys and values of ptuning
    as what the model makes of such: words do better than noise (Li & Liang 2021, section 7.4;
    Lester et al. 2021, section 3.2).
    """
    V, cfg, decoder = settings.virtual_tokens, model.cfg, model.model
    if V < 1:
        raise UserError(f"--virtual_tokens must be at least 1, not {V}")
    if V >= cfg.max_position_embeddings:
        raise UserError(
            f"--virtual_tokens {V} fill the model's context of {cfg.max_position_embeddings}"
        )
    make_room(model, V)
    words = decoder.embed_tokens.weight.detach()
    words = words[torch.randint(cfg.vocab_size, (V,)).to(words.device)].clone()  # (V, C)
    if method == "prompt":
        decoder.prefix = PromptEmbeddings(words)
    elif method == "ptuning":
        with torch.no_grad():
            decoder.prefix = KeysAndValues(keys_and_values(decoder, words))
    else:
        mlp = PrefixMLP(V, cfg.hidden_size, settings.hidden, shape_of(cfg))
        decoder.prefix = mlp.to(words.device)


def make_room(model, V):
    """Longer tables of RoPE, so that texts may be as long as before."""
    longer = replace(model.cfg, max_position_embeddings=model.cfg.max_position_embeddings + V)
    model.model.cos, model.model.sin = (x.to(model.device) for x in rotation_table(longer))


def shape_of(cfg):
    """(layers, 2, G, D): what one virtual token has in keys and values."""
    return cfg.num_hidden_layers, 2, cfg.num_key_value_heads, cfg.head_dim


def unflatten(flat, shape):
    """(V, layers * 2 * G * D), as peft saves them, -> (layers, 2, G, V, D)."""
    return flat.view(len(flat), *shape).permute(1, 2, 3, 0, 4)


def files(model):
    """(adapter_config.json, tensors) as peft saves them."""
    prefix, cfg = model.model.prefix, model.cfg
    if isinstance(prefix, PromptEmbeddings):
        tensor, kind = prefix.embedding.detach(), "PROMPT_TUNING"
        own = {"token_dim": cfg.hidden_size, "num_attention_heads": cfg.num_attention_heads}
        own |= {"prompt_tuning_init": "RANDOM"}
    else:
        values = prefix.fixed(model.model, torch.float32).values.detach()
        tensor, kind = values.permute(3, 0, 1, 2, 4).flatten(1), "PREFIX_TUNING"
        width = cfg.num_key_value_heads * cfg.head_dim
        own = {"token_dim": width, "num_attention_heads": cfg.num_key_value_heads}
        own |= {"encoder_hidden_size": width, "prefix_projection": False}
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": len(tensor),
        "num_layers": cfg.num_hidden_layers,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        **own,
    }
    return config, {"prompt_embeddings": tensor.contiguous().cpu()}


def load(model, config, tensors, where="the adapter"):
    """Attach what `files` or peft has saved; returns the method's name.

    A prefix comes back without its MLP, so it goes on as P-Tuning v2. Raises UserError for an
    adapter of another base.
    """
    prompt, cfg = config["peft_type"] == "PROMPT_TUNING", model.cfg
    width = cfg.hidden_size if prompt else math.prod(shape_of(cfg))
    tensor = tensors.get("prompt_embeddings")
    if tensor is None or tensor.dim() != 2 or 0 in tensor.shape:
        raise UserError(f"{where} lacks the tensor prompt_embeddings of shape [V, {width}]")
    if tensor.shape[1] != width:
        raise UserError(
            f"{where}: prompt_embeddings has shape {list(tensor.shape)}, but the model wants "
            f"[V, {width}]: the adapter was trained on another base"
        )
    make_room(model, len(tensor))
    tensor = tensor.to(model.device, torch.float32)
    if prompt:
        model.model.prefix = PromptEmbeddings(tensor)
        return "prompt"
    model.model.prefix = KeysAndValues(unflatten(tensor, shape_of(cfg)).clone())
    return "ptuning"
