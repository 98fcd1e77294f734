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
        self.known = []  # names of all adapters
        self.active = None  # the name of one, or None for the base alone
        self.rows = None  # or of each row its own: (B,) numbers of names in known, -1 for none


class LoRALinear(Around):
    """A Linear or NF4Linear with adapters by name around it; x (..., in) -> (..., out)."""

    def __init__(self, base, choice):
        super().__init__(base)
        self.choice = choice
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector, self.scale = nn.ParameterDict(), {}

    def add(self, name, rank, scale, dora):
        A = torch.empty(rank, self.base.in_features)
        self.lora_A[name] = nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_B[name] = torch.zeros(self.base.out_features, rank)
        self.scale[name] = scale
        if dora:
            self.lora_magnitude_vector[name] = self.base.weight.detach().float().norm(dim=1)

    def forward(self, x):
        y, choice = self.base(x), self.choice
        if choice.rows is None:
            return y + self.lora_delta(choice.active, x, y) if choice.active in self.lora_A else y
        if len(choice.rows) != len(x):
            raise UserError(f"{len(choice.rows)} rows have an adapter, but the batch has {len(x)}")
        out = y
        for name in self.lora_A:
            mine = (choice.rows == choice.known.index(name)).view(-1, *[1] * (x.dim() - 1))
            out = out + torch.where(mine, self.lora_delta(name, x, y), 0)
        return out

    def lora_delta(self, name, x, y):
        """What an adapter adds to y = W x + bias."""
        A, B = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        update = F.linear(F.linear(x, A), B) * self.scale[name]
        if name not in self.lora_magnitude_vector:
            return update
        with torch.no_grad():
            norm = self.direction(name).norm(dim=1)
        gain = self.lora_magnitude_vector[name] / norm
        product = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        return (gain - 1).to(x.dtype) * product + gain.to(x.dtype) * update

    def direction(self, name):
        """W + s B A in fp32, (out, in)."""
        product = self.lora_B[name].float() @ self.lora_A[name].float()
        return self.base.weight.float() + self.scale[name] * product

    @torch.no_grad()
    def weight_with(self, name):
        """The one matrix that does the same as base and adapter, in fp32; (out, in)."""
        if name not in self.lora_A:
            return self.base.weight.float().clone()
        weight = self.direction(name)
        if name in self.lora_magnitude_vector:
            weight = (self.lora_magnitude_vector[name] / weight.norm(dim=1))[:, None] * weight
        return weight

    def plain(self, merged):
        if not merged:
            return self.base
        if self.choice.rows is not None:  # of each row its own: they stay apart
            unwrap(self, merged)
            return self
        return dense(self.weight_with(self.choice.active), self.base.bias)


# --- a model's adapters --------------------------------------------------------------------------


def linears(model):
    """{name: layer} of everything that an adapter can go around, or is around already: of a vision
    tower the layers that have a part in what is read.
    """
    beside = ("projector.", "score")
    if hasattr(model, "vision"):
        unread = range(model.tower_depth, len(model.vision.encoder.layers))
        beside += tuple(f"vision.encoder.layers.{i}." for i in unread)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (Linear, NF4Linear, LoRALinear))
        and not (name.endswith(".base") or name.startswith(beside))
    }


def named(model, targets):
    """Names of the layers that `targets` means, separated by commas: "all" those of the language
    model's blocks, "vision" those of the tower's, or names, or ends of names outside of the tower.
    Raises UserError where one matches nothing.
    """
    tower = [name for name in linears(model) if name.startswith("vision.")]
    known, chosen = [name for name in linears(model) if name not in tower], []
    parts = {"all": [name for name in known if ".layers." in name], "vision": tower}
    for target in map(str.strip, targets.split(",")):
        found = [name for name in known if name.endswith("." + target)]
        found = parts.get(target) or [target] * (target in known + tower) or found
        if not found or not target:
            ends = sorted({name.rpartition(".")[2] for name in known})
            raise UserError(
                f"--targets {target or 'nothing'} matches no linear layer; there are "
                f"{', '.join(ends)} (a tied head is the embedding, which takes no adapter)"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def targets_of(model, tensors, end, where):
    """The layers around which the tensors in an adapter's files stand, as `named` takes them; `end`
    is how one of each layer's own is called.
    """
    names = {peft_name(model, name) + end: name for name in linears(model)}
    found = [names[name] for name in tensors if name in names]
    if not found:
        raise UserError(
            f"{where} holds no matrices for layers of the model: the adapter was trained on "
            "another base"
        )
    return ",".join(found)


def use(model, names):
    """Switch: the name of an adapter for the whole batch, None for the base alone, or a list with
    one or the other for every row. Raises UserError for a name that isn't there.
    """
    choice, several = model.lora or Choice(), isinstance(names, (list, tuple))
    for name in names if several else [names]:
        if name not in (None, *choice.known):
            known = ", ".join(choice.known) or "none beside the one merged into it"
            raise UserError(f"the model has no adapter {name!r}; it has {known}")
    choice.active, choice.rows = None if several else names, None
    if several:
        numbers = [-1 if name is None else choice.known.index(name) for name in names]
        choice.rows = torch.tensor(numbers, device=model.device)


# --- the methods ---------------------------------------------------------------------------------


class LoRA(Method):
    peft_type, mergeable, others = "LORA", True, ("model.prefix.",)
    dora = quantised = False

    def add(self, model, settings, name="default"):
        """Put an adapter of this name around the layers that settings.targets means, and use it."""
        chosen = named(model, settings.targets)
        for where in named(model, "all") if self.quantised else ():
            if type(layer := model.get_submodule(where)) is Linear:
                model.set_submodule(where, NF4Linear(layer))
        model.lora = model.lora or Choice()
        rank, alpha = settings.rank, settings.alpha
        scale = alpha / math.sqrt(rank) if settings.rslora else alpha / rank
        for where in chosen:
            layer = model.get_submodule(where)
            if not isinstance(layer, LoRALinear):
                layer = LoRALinear(layer, model.lora)
                model.set_submodule(where, layer)
            layer.add(name, rank, scale, self.dora)
        model.lora.known.append(name)
        use(model, name)
        targets = sorted({where.rpartition(".")[2] for where in chosen})
        if hasattr(model, "vision"):  # whose tower has layers of the same names
            targets = [peft_name(model, where).removeprefix(BASE) for where in chosen]
        config = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        config |= {"use_rslora": settings.rslora, "use_dora": self.dora}
        return config | ({"base_quantization": "nf4"} if self.quantised else {})  # not peft's

    def matches(self, config):
        kind = bool(config.get("use_dora")), config.get("base_quantization") == "nf4"
        return super().matches(config) and kind == (self.dora, self.quantised)

    def settings(self, model, config, tensors, where):
        """Raises UserError where the adapter needs what isn't implemented."""
        for name in UNKNOWN:
            if config.get(name) not in UNASKED:
                raise UserError(f"{where}: {name} = {config[name]!r} is not implemented")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and re.match("pissa|olora|corda|loftq|lora_ga", start):
            raise UserError(
                f"{where}: {start} has changed the base's weights; convert it with peft"
            )
        targets = targets_of(model, tensors, ".lora_A.weight", where)
        rank, alpha = config.get("r", 8), config.get("lora_alpha") or 8  # as in peft
        rslora = bool(config.get("use_rslora"))
        return Settings(rank=rank, alpha=alpha, targets=targets, rslora=rslora)

    def parameters(self, model):
        found = {}
        for name, p in super().parameters(model).items():
            name = re.sub(r"(\.lora_[AB])\.\w+$", r"\1.weight", name)
            found[re.sub(r"(\.lora_magnitude_vector)\.\w+$", r"\1", name)] = p
        return found


class DoRA(LoRA):
    dora = True


class QLoRA(LoRA):
    quantised = True
