"""Low-rank adapters: the weights stay as they are, and a product of two thin matrices is trained.
The script lora.py gives the equations of LoRA, rsLoRA, DoRA and QLoRA, and their sources.

A (r, in) starts as a linear layer of torch does (as in peft; in the paper Gaussian), B (out, r) at
zero, m at the norm of each row of W (DoRA's paper writes W transposed): at first nothing changes.
The norm counts as a constant in backward (DoRA's eq. 11). Files are peft's.

A model may carry several adapters by name. `use` says which one speaks: one, none, or one for each
row of the batch.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.gpt import Linear, unwrap
from nanollm.peft.method import BASE, Around, Method, Settings, peft_name
from nanollm.peft.nf4 import NF4Linear, dense

UNKNOWN = (  # what peft can and we cannot
    "bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias",
    "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
UNASKED = (None, False, "none", {}, [])


# --- the layer -----------------------------------------------------------------------------------


class Choice:
    """Which adapter the layers of a model apply; shared by its layers."""

    def __init__(self):
        self.known = []  # names of all adapters; their places there are their numbers
        self.active = -1  # the number of one, or -1 for the base alone
        self.rows = None  # or of each row its own: (B,) numbers


class LoRALinear(Around):
    """A Linear or NF4Linear, or one with adapters around it already, with an adapter around it;
    x (..., in) -> (..., out).
    """

    def __init__(self, base, choice, number, rank, scale, dora=False):
        super().__init__(base)
        self.choice, self.number, self.scale = choice, number, scale
        self.in_features = base.in_features
        A = torch.empty(rank, self.in_features)
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        magnitude = nn.Parameter(self.weight.detach().float().norm(dim=1)) if dora else None
        self.lora_magnitude_vector = magnitude

    @property
    def weight(self):
        """W, (out, in)."""
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        y, choice = self.base(x), self.choice
        if choice.rows is not None:
            mine = (choice.rows == self.number).view(-1, *[1] * (x.dim() - 1))
            return y + torch.where(mine, self.lora_delta(x, y), 0)
        return y + self.lora_delta(x, y) if choice.active == self.number else y

    def lora_delta(self, x, y):
        """What the adapter adds to y = W x + bias."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        update = F.linear(F.linear(x, A), B) * self.scale
        if self.lora_magnitude_vector is None:
            return update
        with torch.no_grad():
            norm = self.direction().norm(dim=1)
        gain = self.lora_magnitude_vector / norm
        product = y if self.bias is None else y - self.bias.to(y.dtype)
        return (gain - 1).to(x.dtype) * product + gain.to(x.dtype) * update

    def direction(self):
        """W + s B A in fp32, (out, in)."""
        return self.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merged_weight(self):
        """The one matrix that does the same as base and adapter, in fp32; (out, in)."""
        weight = self.direction()
        if self.lora_magnitude_vector is not None:
            weight = (self.lora_magnitude_vector / weight.norm(dim=1))[:, None] * weight
        return weight

    def plain(self, merged):
        if merged and self.choice.rows is not None:  # of each row its own: they stay apart
            unwrap(self, merged)
            return self
        if merged and self.choice.active == self.number:
            return dense(self.merged_weight(), self.bias)
        return self.base.plain(merged) if hasattr(self.base, "plain") else self.base


# --- a model's adapters --------------------------------------------------------------------------


def linears(model):
    """Names of all layers that an adapter can go around, or is around already: of a vision tower
    those that have a part in what is read.
    """
    beside = ("projector.", "score")
    if hasattr(model, "vision"):
        unread = range(model.tower_depth, len(model.vision.encoder.layers))
        beside += tuple(f"vision.encoder.layers.{i}." for i in unread)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear, NF4Linear, LoRALinear))
        and not name.endswith(".base")
        and not name.startswith(beside)
    ]


def is_meant(name, target):
    """Is the layer of this name one of the target's: "all" of the language model's blocks, "vision"
    of the tower's, the name of a layer, or the end of names outside of the tower?
    """
    in_tower = name.startswith("vision.")
    if target == "vision":
        return in_tower
    if target == "all":
        return ".layers." in name and not in_tower
    return name == target or name.endswith("." + target) and not in_tower


def named(model, targets):
    """Names of the layers that `targets` means, separated by commas. Raises UserError where one
    matches nothing.
    """
    known, chosen = linears(model), []
    for target in map(str.strip, targets.split(",")):
        found = [name for name in known if is_meant(name, target)]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in known})
            raise UserError(
                f"--targets {target or 'nothing'} matches no linear layer; there are "
                f"{', '.join(ends)} (a tied head is the embedding, which takes no adapter)"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def targets_of(model, tensors, end, folder):
    """The layers around which the tensors in an adapter's files stand, as `named` takes them; `end`
    is how one of each layer's own is called.
    """
    names = {peft_name(model, name) + end: name for name in linears(model)}
    found = [names[name] for name in tensors if name in names]
    if not found:
        raise UserError(
            f"{folder} holds no matrices for layers of the model: the adapter was trained on "
            "another base"
        )
    return ",".join(found)


def use(model, names):
    """Switch: the name of an adapter for the whole batch, None for the base alone, or a list with
    one or the other for every row. Raises UserError for a name that isn't there.
    """
    choice = model.lora or Choice()
    numbers = {None: -1} | {name: number for number, name in enumerate(choice.known)}
    several = isinstance(names, (list, tuple))
    for name in names if several else [names]:
        if name not in numbers:
            known = ", ".join(choice.known) or "none beside the one merged into it"
            raise UserError(f"the model has no adapter {name!r}; it has {known}")
    choice.active, choice.rows = -1, None
    if several:
        choice.rows = torch.tensor([numbers[name] for name in names], device=model.device)
    else:
        choice.active = numbers[names]


# --- the methods ---------------------------------------------------------------------------------


class LoRA(Method):
    peft_type, mergeable, others = "LORA", True, ("model.prefix.",)
    dora = quantised = False

    def add(self, model, settings, name):
        """Put an adapter of this name around the layers that settings.targets means, and use it."""
        chosen = named(model, settings.targets)
        if self.quantised:
            quantise(model)
        choice = model.lora = model.lora or Choice()
        number, rank, alpha = len(choice.known), settings.rank, settings.alpha
        scale = alpha / math.sqrt(rank) if settings.rslora else alpha / rank
        for where in chosen:
            layer = LoRALinear(model.get_submodule(where), choice, number, rank, scale, self.dora)
            model.set_submodule(where, layer)
        choice.known.append(name)
        use(model, name)
        targets = sorted({where.rpartition(".")[2] for where in chosen})
        if hasattr(model, "vision"):  # whose tower has layers of the same names
            targets = [peft_name(model, where).removeprefix(BASE) for where in chosen]
        config = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        config |= {"use_rslora": settings.rslora, "use_dora": self.dora}
        if self.quantised:
            config["base_quantization"] = "nf4"  # not peft's
        return config

    def matches(self, config):
        kind = bool(config.get("use_dora")), config.get("base_quantization") == "nf4"
        return super().matches(config) and kind == (self.dora, self.quantised)

    def settings(self, model, config, tensors, folder):
        """Raises UserError where the adapter needs what isn't implemented."""
        for name in UNKNOWN:
            if config.get(name) not in UNASKED:
                raise UserError(f"{folder}: {name} = {config[name]!r} is not implemented")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and re.match("pissa|olora|corda|loftq|lora_ga", start):
            raise UserError(
                f"{folder}: {start} has changed the base's weights; convert it with peft"
            )
        return Settings(
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=targets_of(model, tensors, ".lora_A.weight", folder),
            rslora=bool(config.get("use_rslora")),
        )

    def parameters(self, model):
        """A and B are layers of peft's, with a weight each."""
        found = super().parameters(model).items()
        return {re.sub(r"(\.lora_[AB])$", r"\1.weight", name): p for name, p in found}


class DoRA(LoRA):
    dora = True


class QLoRA(LoRA):
    quantised = True


def quantise(model):
    """Put the linear layers of the language model's blocks into four bits, in place."""
    for where in named(model, "all"):
        layer = model.get_submodule(where)
        if type(layer) is Linear:
            model.set_submodule(where, NF4Linear(layer))
