"""Parameter-efficient fine-tuning: one way to attach, count, save and load every method.

    lora     y = W x + s B A x                                nanollm/peft/lora.py
    dora     the same, magnitude and direction apart          nanollm/peft/lora.py
    qlora    lora on base weights of four bits                nanollm/peft/lora.py, nanollm/peft/nf4.py
    adapter  y = h + U gelu(D h), h the output of a branch    here: Bottleneck
    prefix   keys and values in front of every layer          nanollm/peft/soft_prompts.py
    ptuning  the same, without an MLP behind them             nanollm/peft/soft_prompts.py
    prompt   embeddings in front of the text                  nanollm/peft/soft_prompts.py

The base stays as it is: `attach` freezes it, and only what it adds is trained and saved.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm import safetensors
from nanollm.checkpoint import ADAPTER_CONFIG, existing_folder, is_adapter, read_json, weights_hash
from nanollm.config import UserError, atomic_write
from nanollm.gpt import Linear, ScalarGPT, unwrap
from nanollm.peft import lora, soft_prompts

METHODS = ("lora", "dora", "qlora", "adapter", "prefix", "prompt", "ptuning")
WEIGHTS = "adapter_model.safetensors"
BASE_HASH = "base_sha256"  # in its metadata: hub.weights_hash of the base; peft writes none
TYPES = {  # of what is read in adapter_config.json; each may be missing or null
    "peft_type": str,
    "task_type": str,
    "base_quantization": str,
    "base_model_name_or_path": str,
    "use_dora": bool,
    "use_rslora": bool,
    "target_modules": (str, list),
    "modules_to_save": list,
    "reward_shift": (int, float),
}


@dataclass
class Settings:
    """What the methods can be told; each reads its own."""

    rank: int = 16  # r of lora, dora and qlora; the width of a bottleneck adapter
    alpha: float = 32.0  # lora, dora, qlora: s = alpha / r
    # lora, dora, qlora: names of linear layers, separated by commas; all: every one in the blocks
    targets: str = "all"
    rslora: bool = False  # s = alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732)
    virtual_tokens: int = 16  # V of prefix, prompt and ptuning
    hidden: int = 128  # prefix: width of the MLP that makes keys and values while training


# --- bottleneck adapters -------------------------------------------------------------------------


class Bottleneck(Linear):
    """The last linear layer of a branch with a bottleneck adapter behind it, before the residual.

        h = W x,  y = h + U gelu(D h)           D (r, C), U (C, r)

    U starts at zero, so that nothing changes at first. Houlsby et al. 2019 (arXiv:1902.00751),
    figure 2: one behind attention and one behind the MLP, in every block. W keeps its name in the
    state dict.
    """

    @classmethod
    def around(cls, linear, rank):
        C = linear.out_features
        new = cls(linear.in_features, C, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.down, new.up = Linear(C, rank), Linear(rank, C)
        nn.init.normal_(new.down.weight, std=C**-0.5)
        nn.init.zeros_(new.up.weight)
        nn.init.zeros_(new.down.bias)
        nn.init.zeros_(new.up.bias)
        return new.to(linear.weight.device)

    def forward(self, x):
        h = super().forward(x)
        return h + self.up(F.gelu(self.down(h)))

    def plain(self, merged):
        """This layer without its adapter, on the same weights; merging is not possible."""
        if merged:
            return self
        base = Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        base.weight, base.bias = self.weight, self.bias
        return base


def add_bottlenecks(model, rank):
    """Put an adapter behind attention and MLP of every block."""
    if rank < 1:
        raise UserError(f"--rank must be at least 1, not {rank}")
    for block in model.model.layers:
        block.self_attn.o_proj = Bottleneck.around(block.self_attn.o_proj, rank)
        block.mlp.down_proj = Bottleneck.around(block.mlp.down_proj, rank)


def bottleneck_parameters(model):
    return {n: p for n, p in model.named_parameters() if ".down." in n or ".up." in n}


def load_bottlenecks(model, config, tensors, where):
    """Attach the adapters that `files` has written."""
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: the adapter's width is {rank!r}, not a whole number from 1 on")
    add_bottlenecks(model, rank)
    own = bottleneck_parameters(model)
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in own.items()}:
        raise UserError(f"{where} holds an adapter of another base: its layers have other shapes")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


# --- the registry --------------------------------------------------------------------------------


def attach(model, method, settings=None, base=None):
    """Freeze the model and add the trainable parameters of a method, in place; returns the model.

    `base` is the folder that the model came from: what is saved names it, and its weights by their
    hash. Raises UserError where the settings don't fit the model. `model.adapter` is then the
    method's name.
    """
    settings = settings or Settings()
    if model.adapter:
        raise UserError(f"the model has an adapter ({model.adapter}) already; merge it first")
    model.base_parameters = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    if method in ("lora", "dora", "qlora"):
        lora.add(model, method, settings)
    elif method == "adapter":
        add_bottlenecks(model, settings.rank)
    elif method in ("prefix", "ptuning", "prompt"):
        soft_prompts.add(model, method, settings)
    else:
        raise UserError(f"unknown method {method!r}; methods are {', '.join(METHODS)}")
    model.adapter = method
    model.base_folder, model.base_hash = base, weights_hash(base) if base else None
    return model


def trainable(model):
    """(number of trained parameters, their share of the base's)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, trained / getattr(model, "base_parameters", trained)


# --- files ---------------------------------------------------------------------------------------


def files(model):
    """(config, tensors) of whatever is attached, in the forms of peft where it knows the method."""
    if model.adapter == "adapter":
        layers = [m for m in model.modules() if isinstance(m, Bottleneck)]
        config = {"peft_type": "BOTTLENECK", "r": layers[0].down.out_features}
        return config, {n: p.detach().cpu() for n, p in bottleneck_parameters(model).items()}
    if model.model.prefix is not None:
        return soft_prompts.files(model)
    return lora.files(model)


def save_adapter(model, folder, base):
    """Write adapter_config.json and adapter_model.safetensors, which name the base and hold
    nothing of it but the hash that `attach` took.
    """
    config, tensors = files(model)
    config = config | {"base_model_name_or_path": str(base)}
    known = getattr(model, "base_hash", None)
    metadata = {"format": "pt"} | ({BASE_HASH: known} if known else {})
    atomic_write(Path(folder) / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    safetensors.save_file(tensors, Path(folder) / WEIGHTS, metadata=metadata)


def read_adapter(folder, base):
    """(config, tensors) of the adapter in a folder. Raises UserError where there is none, where a
    setting has the wrong type, or where the weights in the folder `base` aren't those that it was
    trained on.
    """
    if not is_adapter(folder):
        raise UserError(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG} in it")
    config = read_json(folder / ADAPTER_CONFIG)
    for name, kind in TYPES.items():
        value = config.get(name)
        mixed = isinstance(value, list) and not all(isinstance(each, str) for each in value)
        if value is not None and (mixed or not isinstance(value, kind)):
            raise UserError(f"{folder / ADAPTER_CONFIG}: {name} can't be {value!r}")
    known = safetensors.read_header(folder / WEIGHTS)[1].get(BASE_HASH)
    if base and known and known != weights_hash(base):
        raise UserError(
            f"{folder} was trained on another base: {base} holds other weights; put it on those "
            "that it was trained on, or train it anew"
        )
    return config, safetensors.load_file(folder / WEIGHTS)


def load_adapter(model, folder, base=None):
    """Attach the adapter that lies in a folder, ours or peft's; returns the model. With `base`, the
    folder that the model came from, its weights must be those that the adapter was trained on.

    Raises UserError where the folder holds none, or one of another base.
    """
    folder = existing_folder(folder)
    config, tensors = read_adapter(folder, base)
    kind = config.get("peft_type")
    model.base_parameters = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    if kind == "BOTTLENECK":
        load_bottlenecks(model, config, tensors, folder)
        model.adapter = "adapter"
    elif kind in ("PREFIX_TUNING", "PROMPT_TUNING"):
        model.adapter = soft_prompts.load(model, config, tensors, folder)
    elif kind == "LORA":
        model.adapter = lora.load(model, config, tensors, where=folder)
    else:
        raise UserError(f"{folder / ADAPTER_CONFIG}: peft_type {kind!r} is not implemented")
    return model


# --- in training and sampling ---------------------------------------------------------------------


MERGEABLE = ("lora", "dora", "qlora")


def start_adapter(model, cfg, rt):
    """With --adapter: freeze the model and attach an adapter; only that is trained and saved. The
    head of a reward model is trained beside it.

    Raises UserError where the flags don't fit the model, or --init holds an adapter of a kind that
    can't be merged, on which nothing else can be trained.
    """
    if model.adapter:
        raise UserError(
            f"--init {cfg.init} holds an adapter ({model.adapter}) that can't be merged into its "
            "base; start from the base"
        )
    if not cfg.adapter:
        return
    check_method(cfg.adapter)
    if isinstance(model, ScalarGPT) and cfg.adapter in {*METHODS} - {*MERGEABLE}:
        raise UserError(
            f"--adapter {cfg.adapter} goes with no reward model and no critic of its own; they "
            f"take {', '.join(MERGEABLE)}"
        )
    model.to(rt.device)
    settings = Settings(rank=cfg.rank, alpha=cfg.alpha)
    attach(model, cfg.adapter, settings, cfg.init)
    trained, share = trainable(model)
    rt.print(f"{cfg.adapter}: {trained:,} parameters are trained, {share:.2%} of the model's")


def check_method(name):
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(f"--adapter {name} is no method; methods are {known}")


def reference(model):
    """The model as it is now, to compare with: a copy, or where an adapter is trained the base
    alone, which shares the frozen weights and so costs no memory.
    """
    shared = {}
    if model.adapter:
        tensors = (*model.parameters(), *model.buffers())
        # a VLM's projector is trained beside the adapter, and must not move here
        shared = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
    ref = copy.deepcopy(model, shared)
    unwrap(ref, merged=False)
    ref.model.prefix = ref.adapter = None
    return ref


def put_adapter(model, folder, base):
    """Load the adapter in a folder onto the model from the folder `base`: merged if it can be, else
    attached.
    """
    if model.adapter:
        raise UserError(
            f"{folder} can't be put on a model that has an adapter ({model.adapter}) already"
        )
    load_adapter(model, folder, base)
    if model.adapter in MERGEABLE:
        unwrap(model, merged=True)
        model.lora = None
        model.adapter = None
        model.requires_grad_(True)
