"""Soft prompts: V trained virtual tokens in front of the text; the model itself stays as it is.

Each is a module that gives keys and values (layers, 2, G, V, D), which every layer's attention sees
in front of the text's own:

    prefix   K, V = MLP(P), P (V, C); saved without the MLP    Li & Liang 2021, arXiv:2101.00190
    ptuning  K, V trained themselves (P-Tuning v2)             Liu et al. 2021, 2110.07602
    prompt   K, V that the model makes of embeddings P (V, C)  Lester et al. 2021, 2104.08691

A causal model reads what stands in front without looking at what follows. So the embeddings of
prompt tuning can be read once per batch, and their keys and values serve every row, every document
of a packed row, and every step of generation: no layer tells this from V more tokens in the row.

The keys of prefix and ptuning are those after RoPE; the text's first token stands at position V.
"""

from dataclasses import replace

import torch
import torch.nn as nn

from nanollm.gpt import rotation_table
from nanollm.peft.method import Method, Settings


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


def flatten(values):
    """(layers, 2, G, V, D) -> (V, layers * 2 * G * D), as peft saves them."""
    return values.permute(3, 0, 1, 2, 4).flatten(1)


def unflatten(flat, decoder):
    """(V, layers * 2 * G * D) -> (layers, 2, G, V, D)."""
    shape = len(flat), len(decoder.layers), 2, -1, decoder.cos.shape[1]
    return flat.view(shape).permute(1, 2, 3, 0, 4)


# --- what stands in front ------------------------------------------------------------------------


class Front(nn.Module):
    """Makes keys and values of V virtual tokens."""

    def saved(self):
        """What peft's files hold: (V, layers * 2 * G * D), of prompt tuning (V, C)."""
        raise NotImplementedError

    def forward(self, decoder, dtype):
        return unflatten(self.saved(), decoder)

    @torch.no_grad()
    def fixed(self, decoder, dtype):
        """The same without what only training needs, computed once."""
        return KeysAndValues(flatten(self(decoder, dtype)))


class KeysAndValues(Front):
    """P-Tuning v2: keys and values are the parameters."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)  # (V, layers * 2 * G * D)

    def saved(self):
        return self.values


class PrefixMLP(Front):
    """Prefix tuning: K, V = W2 tanh(W1 P + b1) + b2, which trains more steadily than keys and
    values themselves. They are all that is saved: so it comes back, and goes on, as P-Tuning v2.
    """

    def __init__(self, V, C, hidden, out):
        super().__init__()
        self.embedding = nn.Embedding(V, C)
        self.transform = nn.Sequential(nn.Linear(C, hidden), nn.Tanh(), nn.Linear(hidden, out))

    def saved(self):
        return self.transform(self.embedding.weight)


class PromptEmbeddings(Front):
    """Prompt tuning: the model reads V trained embeddings in front of the text."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = nn.Parameter(embedding)  # (V, C)

    def saved(self):
        return self.embedding

    def forward(self, decoder, dtype):
        return keys_and_values(decoder, self.embedding.to(dtype))


# --- the methods ---------------------------------------------------------------------------------


def new_front(method, decoder, words, settings):
    """What a method puts in front at first; words: the embeddings (V, C) of some tokens."""
    if method == "prompt":
        return PromptEmbeddings(words)
    if method == "ptuning":
        with torch.no_grad():
            return KeysAndValues(flatten(keys_and_values(decoder, words)))
    width = len(decoder.layers) * 2 * decoder.layers[0].self_attn.k_proj.out_features
    return PrefixMLP(*words.shape, settings.hidden, width)


class SoftPrompt(Method):
    soft, others = True, ("model.prefix.", ".lora_")  # the first it saves as what they make

    def __init__(self, method):
        self.method = method
        self.peft_type = "PROMPT_TUNING" if method == "prompt" else "PREFIX_TUNING"

    def add(self, model, settings, name):
        """Put V = settings.virtual_tokens virtual tokens in front.

        Those of prompt start as the embeddings of random tokens of the vocabulary, and the keys and
        values of ptuning as what the model makes of such: words do better than noise (Li & Liang
        2021, section 7.4; Lester et al. 2021, section 3.2). Prefix starts from noise.
        """
        V, cfg, decoder = settings.virtual_tokens, model.cfg, model.model
        # longer tables of RoPE, so that texts may be as long as before
        longer = replace(cfg, max_position_embeddings=cfg.max_position_embeddings + V)
        decoder.cos, decoder.sin = (table.to(model.device) for table in rotation_table(longer))
        words = torch.randint(cfg.vocab_size, (V,)).to(model.device)
        words = decoder.embed_tokens.weight.detach()[words]  # a copy, (V, C)
        decoder.prefix = new_front(self.method, decoder, words, settings)
        heads, width = cfg.num_key_value_heads, cfg.num_key_value_heads * cfg.head_dim
        if self.method == "prompt":
            heads, width = cfg.num_attention_heads, cfg.hidden_size
        return {
            "num_virtual_tokens": V,
            "num_layers": cfg.num_hidden_layers,
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "token_dim": width,
        }

    def settings(self, model, config, tensors, folder):
        return Settings(virtual_tokens=config["num_virtual_tokens"])

    def parameters(self, model):
        return {"prompt_embeddings": model.model.prefix.saved(), **super().parameters(model)}
