"""Low-rank adapters: the weights stay as they are, and a product of two thin matrices is trained.

    LoRA     y = W x + s B A x,  s = alpha / r           Hu et al. 2021, arXiv:2106.09685, eq. 3
    rsLoRA   s = alpha / sqrt(r)                         Kalajdzievski 2023, 2312.03732
    DoRA     y = m / ||W + s B A|| (W + s B A) x         Liu et al. 2024, 2402.09353, eq. 5 and 11
    QLoRA    W in four bits (nf4.py)                     Dettmers et al. 2023, 2305.14314
    LoRA+    B learns faster than A                      Hayou et al. 2024, 2402.12354; see optim.py

A (r, in) starts as a linear layer of torch does, B (out, r) at zero, m at the norm of each row of
W: at first nothing changes. The norm counts as a constant in backward. Files are peft's.

A model may carry several adapters by name. `use` says which one speaks: one, none, or one for each
row of the batch.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.gpt import Linear, ScalarGPT
from nanollm.peft.nf4 import NF4Linear, dense, quantise_linears

BASE = "base_model.model."
KEY = re.compile(r"(base_model\.model\..+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# What is trained as a whole beside an adapter: a reward model's head, a VLM's projector.
WHOLE = ("score", "projector")
# Names of a VLM's parts, and what peft calls them, whose base is a LlavaForConditionalGeneration.
PARTS = {"model.": "model.language_model.", "projector.": "model.multi_modal_projector."}
UNKNOWN = (  # what peft can and we cannot
    "bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias",
    "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
UNASKED = (None, False, "none", {}, [])


class Choice:
    """Which adapter the layers of a model apply, and how each was made; shared by its layers."""

    def __init__(self):
        self.settings = {}  # name -> the adapter_config.json of that adapter
        self.active = None  # its name, or None for the base alone
        self.names, self.rows = [], None  # rows (B,): each row's number in names, -1 for none


class LoRALinear(nn.Module):
    """A linear layer with adapters by name around it; x (..., in) -> (..., out)."""

    def __init__(self, base, choice):
        super().__init__()
        self.base, self.choice = base, choice  # base: a Linear or an NF4Linear, frozen
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.magnitude, self.scale = nn.ParameterDict(), {}
        self.register_buffer("merged", None, persistent=False)

    def add(self, name, rank, scale, dora):
        device = next(self.base.buffers(), self.base.weight).device
        A = torch.empty(rank, self.in_features, device=device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.scale[name] = scale
        if dora:
            self.magnitude[name] = nn.Parameter(self.norm(name))

    def forward(self, x):
        if self.merged is not None:
            bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
            return F.linear(x, self.merged.to(x.dtype), bias)
        y, choice = self.base(x), self.choice
        if choice.rows is None:
            return y + self.lora_delta(choice.active, x, y) if choice.active in self.lora_A else y
        if len(choice.rows) != len(x):
            raise UserError(f"{len(choice.rows)} rows have an adapter, but the batch has {len(x)}")
        out = y
        for number, name in enumerate(choice.names):
            if name in self.lora_A:
                mine = (choice.rows == number).view(-1, *[1] * (x.dim() - 1))
                out = out + torch.where(mine, self.lora_delta(name, x, y), 0)
        return out

    def lora_delta(self, name, x, y):
        """What an adapter adds to y = W x + bias."""
        A, B = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        update = F.linear(F.linear(x, A), B) * self.scale[name]
        if name not in self.magnitude:
            return update
        gain = self.magnitude[name] / self.norm(name)
        product = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        return (gain - 1).to(x.dtype) * product + gain.to(x.dtype) * update

    @torch.no_grad()
    def direction(self, name):
        """W + s B A in fp32, (out, in)."""
        product = self.lora_B[name].float() @ self.lora_A[name].float()
        return self.base.weight.float() + self.scale[name] * product

    def norm(self, name):
        """Of each row of `direction`, (out,), without gradient."""
        return self.direction(name).norm(dim=1)

    @torch.no_grad()
    def weight_with(self, name):
        """The one matrix that does the same as base and adapter, in fp32; (out, in)."""
        if name not in self.lora_A:
            return self.base.weight.float().clone()
        weight = self.direction(name)
        if name in self.magnitude:
            weight = (self.magnitude[name] / weight.norm(dim=1))[:, None] * weight
        return weight

    def plain(self, merged):
        """The base itself, or with `merged` a Linear with the active adapter in it."""
        if not merged:
            return self.base
        if self.choice.rows is not None:  # every row its own: they stay apart
            self.base = self.base.plain(True) if isinstance(self.base, NF4Linear) else self.base
            return self
        return dense(self.weight_with(self.choice.active), self.base.bias)


# --- a model's adapters --------------------------------------------------------------------------


def layers(model):
    """{name: LoRALinear} of a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linears(model):
    """{name: layer} of everything that an adapter can go around, or is around already: of a VLM
    the language model's alone.
    """
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".base") or name.startswith(("vision.", "projector.")):
            continue
        if isinstance(module, (Linear, NF4Linear, LoRALinear)):
            found[name] = module
    return found


def whole(model):
    """{name: parameter} of what is trained as a whole beside an adapter."""
    return {n: p for n, p in model.named_parameters() if n.split(".")[0] in WHOLE}


def wrap(model, names):
    """Put LoRALinears around these layers; returns them by name."""
    if model.lora is None:
        model.lora = Choice()
    for name in names:
        parent, _, last = name.rpartition(".")
        parent = model.get_submodule(parent)
        if not isinstance(getattr(parent, last), LoRALinear):
            setattr(parent, last, LoRALinear(getattr(parent, last), model.lora))
    return {name: model.get_submodule(name) for name in names}


def named(model, targets):
    """Names of the layers that `targets` means: "all" those of the blocks, or names or ends of
    names, separated by commas. Raises UserError where one matches nothing.
    """
    known = [name for name in linears(model) if name != "score"]
    if targets == "all":
        return [name for name in known if ".layers." in name]
    chosen = []
    for target in filter(None, map(str.strip, targets.split(","))):
        found = [name for name in known if name == target or name.endswith("." + target)]
        if not found and target in ("lm_head", "embed_tokens"):
            tied = " whose head is the embedding itself" if target == "lm_head" else ""
            raise UserError(f"--targets {target}: no adapter goes around the embedding{tied}")
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in known})
            raise UserError(f"--targets {target} matches no layer; there are {', '.join(ends)}")
        chosen += found
    if not chosen:
        raise UserError("--targets is empty; name linear layers, or all")
    return list(dict.fromkeys(chosen))


def freeze(model, name):
    """Only the adapter of this name is trained, and a reward model's head or a VLM's projector."""
    own = tuple(f".{part}.{name}" for part in ("lora_A", "lora_B", "magnitude"))
    beside = whole(model)
    for where, p in model.named_parameters():
        p.requires_grad = where.endswith(own) or where in beside


def add(model, method, settings, name="default"):
    """Add an adapter to the layers that settings.targets names, in place, and use it; method is
    lora, dora or qlora. Raises UserError where rank, alpha or targets don't fit.
    """
    if settings.rank < 1:
        raise UserError(f"--rank must be at least 1, not {settings.rank}")
    if not 0 < settings.alpha < math.inf:
        raise UserError(f"--alpha must be more than 0, not {settings.alpha}")
    chosen = named(model, settings.targets)
    if method == "qlora":
        quantise_linears(model)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(model, ScalarGPT) else "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": method == "dora",
        "target_modules": sorted({name.rpartition(".")[2] for name in chosen}),
        "modules_to_save": ["score"] if isinstance(model, ScalarGPT) else None,
        "inference_mode": True,
    }
    if hasattr(model, "vision"):
        ends = "|".join(config["target_modules"])
        config["target_modules"] = rf"model\.language_model\..*\.({ends})"
        config["modules_to_save"] = ["multi_modal_projector"]
    if method == "qlora":
        config["base_quantization"] = "nf4"  # not peft's: which base the adapter was trained on
    _add(model, config, chosen, name)
    freeze(model, name)
    use(model, name)


def _add(model, config, names, name):
    if not name.isidentifier():
        raise UserError(f"{name!r} is no name for an adapter; use letters, digits and _")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    for layer in wrap(model, names).values():
        layer.add(name, rank, scale, config.get("use_dora"))
    model.lora.settings[name] = config


def use(model, names):
    """Switch: the name of an adapter for the whole batch, None for the base alone, or a list with
    one or the other for every row. Raises UserError for a name that isn't there.
    """
    choice, rows = model.lora, names if isinstance(names, (list, tuple)) else [names]
    if unknown := [n for n in rows if n is not None and n not in choice.settings]:
        known = ", ".join(choice.settings)
        raise UserError(f"the model has no adapter {unknown[0]!r}; it has {known}")
    if any(layer.merged is not None for layer in layers(model).values()):
        raise UserError("an adapter is merged; unmerge it before another is used")
    choice.active, choice.rows = names, None
    if isinstance(names, (list, tuple)):
        choice.names = sorted(set(names) - {None})
        numbers = [choice.names.index(n) if n is not None else -1 for n in names]
        choice.active, choice.rows = None, torch.tensor(numbers, device=model.device)


def merge(model):
    """Compute with one matrix per layer, the active adapter in it: as fast as without. The base's
    weights stay beside it, so that `unmerge` loses nothing. A merged adapter isn't trained.
    """
    if model.lora.rows is not None:
        raise UserError("adapters of single rows can't be merged; use one for the whole batch")
    for layer in layers(model).values():
        layer.merged = layer.weight_with(model.lora.active)


def unmerge(model):
    for layer in layers(model).values():
        layer.merged = None


# --- files ---------------------------------------------------------------------------------------


def peft_key(model, name):
    """What peft calls a tensor that we call `name`."""
    for ours, theirs in PARTS.items() if hasattr(model, "vision") else ():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    return BASE + name


def files(model, name="default"):
    """(adapter_config.json without its base, {key: tensor}) of an adapter, as peft writes them."""
    config, tensors = dict(model.lora.settings[name]), {}
    if any(p.requires_grad for n, p in model.named_parameters() if n.startswith("vision.")):
        raise UserError("an adapter is saved without the vision tower; freeze that, or train all")
    for where, layer in layers(model).items():
        if name in layer.lora_A:
            key = peft_key(model, where)
            tensors[f"{key}.lora_A.weight"] = layer.lora_A[name].detach()
            tensors[f"{key}.lora_B.weight"] = layer.lora_B[name].detach()
            if name in layer.magnitude:
                tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude[name].detach()
    tensors |= {peft_key(model, where): p.detach() for where, p in whole(model).items()}
    if isinstance(model, ScalarGPT):
        config["reward_shift"] = model.shift  # not peft's either
    return config, tensors


def load(model, config, tensors, name="default", where="the adapter"):
    """Add the adapter of these files to a model, and use it; returns its method. Raises UserError
    where it needs what isn't implemented, or belongs to another base.
    """
    for key in UNKNOWN:
        if config.get(key) not in UNASKED:
            raise UserError(f"{where}: {key} = {config[key]!r} is not implemented")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and re.match("pissa|olora|corda|loftq|lora_ga", start):
        raise UserError(f"{where}: {start} has changed the base's weights; convert it with peft")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise UserError(f"{where}: r = {rank!r} and lora_alpha = {alpha!r} are no rank and scale")
    beside = {peft_key(model, n): p for n, p in whole(model).items()}
    places = {peft_key(model, name): name for name in linears(model)}
    found = {places.get(m[1], m[1].removeprefix(BASE)) for m in map(KEY.fullmatch, tensors) if m}
    wanted = shapes(model, found, config, where)
    wanted |= {key: p.shape for key, p in beside.items()}
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        fault = "lacks" if odd[0] in wanted else "has a tensor that we can't use:"
        raise UserError(f"{where} {fault} {odd[0]}")
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            given = list(tensors[key].shape)
            raise UserError(
                f"{where}: {key} has shape {given}, but the model wants {list(shape)}: the adapter "
                "was trained on another base"
            )
    quantised = config.get("base_quantization") == "nf4"
    if quantised:
        quantise_linears(model)
    _add(model, config, sorted(found), name)
    parts = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in beside:
                beside[key].copy_(tensor)
                continue
            layer, part = KEY.fullmatch(key).groups()
            into = getattr(model.get_submodule(places[layer]), parts.get(part, "magnitude"))
            into[name].copy_(tensor)
    if isinstance(model, ScalarGPT):
        model.shift = float(config.get("reward_shift", 0.0))
    use(model, name)
    return "qlora" if quantised else "dora" if config.get("use_dora") else "lora"


def shapes(model, names, config, where):
    """{key: shape} of the tensors that an adapter around these layers must have."""
    known, wanted = linears(model), {}
    if not names:
        raise UserError(f"{where} holds no low-rank matrices")
    for layer in sorted(names):
        if layer not in known:
            raise UserError(
                f"{where} has matrices for {layer}, which the model hasn't: the adapter was "
                "trained on another base"
            )
        key, rank = peft_key(model, layer), config["r"]
        wanted[f"{key}.lora_A.weight"] = torch.Size((rank, known[layer].in_features))
        wanted[f"{key}.lora_B.weight"] = torch.Size((known[layer].out_features, rank))
        if config.get("use_dora"):
            wanted[f"{key}.lora_magnitude_vector"] = torch.Size((known[layer].out_features,))
    return wanted
