"""Parameter-efficient fine-tuning: one way to attach, count, save and load every method, of which
the script lora.py gives the equations.

A method is a class derived from Method (method.py), and a line in METHODS. The base stays as it is:
`attach` freezes it, and only what it adds is trained and saved. "lora+prompt" is both together: one
that can be merged, and virtual tokens that read what it has changed.
"""

import copy
import json
from pathlib import Path

import torch

from nanollm import safetensors
from nanollm.checkpoint import ADAPTER_CONFIG, existing_folder, is_adapter, weights_hash
from nanollm.config import UserError, atomic_write, read_json
from nanollm.gpt import ScalarGPT, unwrap
from nanollm.peft.bottleneck import Bottlenecks
from nanollm.peft.lora import DoRA, LoRA, QLoRA, use
from nanollm.peft.method import MODULES_TO_SAVE, Settings
from nanollm.peft.soft_prompts import SoftPrompt

METHODS = {
    "lora": LoRA(),
    "dora": DoRA(),
    "qlora": QLoRA(),
    "bottleneck": Bottlenecks(),
    "ptuning": SoftPrompt("ptuning"),  # before prefix: the files of both are the same
    "prefix": SoftPrompt("prefix"),
    "prompt": SoftPrompt("prompt"),
}
TOGETHER = [f"{a}+{b}" for a in METHODS if METHODS[a].mergeable for b in METHODS if METHODS[b].soft]

WEIGHTS = "adapter_model.safetensors"
BASE_HASH = "base_weights_hash"  # in the metadata of WEIGHTS; peft writes none


def attach(model, method, settings=None, base=None, name=None):
    """Freeze the model and add the trainable parameters of a method, in place; returns the model.
    What is trained as a whole beside an adapter stays trainable.

    `base` is the folder that the model came from: what is saved names it, and its weights by their
    hash. `model.adapter` is then the method's name. With a name of its own an adapter of the LoRA
    family stands beside others (lora.use).
    """
    check_method(method)
    if name:
        check_beside(model, method, name)
    elif model.adapter:
        raise UserError(f"the model has an adapter ({model.adapter}) already; merge it first")
    if base and is_adapter(base):  # peft would put the new one in the old one's place
        raise UserError(
            f"{base} holds an adapter, and no other is trained on one; merge it first: "
            f"python -m nanollm.hub export {base} --merge --out {base}_merged"
        )
    model.base_parameters = sum(p.numel() for p in model.parameters())
    device = model.device
    model.requires_grad_(False)
    parts = [METHODS[part] for part in method.split("+")]
    settings = settings or Settings()
    model.adapter_config = [part.add(model, settings, name or "default") for part in parts]
    for parameter, p in model.named_parameters():
        if parameter.split(".")[0] in MODULES_TO_SAVE:
            p.requires_grad_(True)
    model.to(device)
    model.adapter = method
    model.base_folder, model.base_hash = base, weights_hash(base) if base else None
    return model


def check_method(name):
    """Raise UserError for a --adapter that isn't there; None is no adapter."""
    if name not in (None, *METHODS, *TOGETHER):
        raise UserError(
            f"--adapter must be one of {', '.join(METHODS)}, two such as lora+prompt, or none, "
            f"not {name!r}"
        )


def check_beside(model, method, name):
    """Raise UserError where no adapter of this kind and name can stand beside others."""
    kinds = {method, model.adapter or method}
    if not METHODS[method].mergeable or hasattr(model, "projector"):
        raise UserError("only adapters of the LoRA family stand side by side, on a text model")
    if "qlora" in kinds and len(kinds) > 1:
        raise UserError(
            "an adapter for a base of four bits can't stand beside one for another base"
        )
    if model.lora and name in model.lora.known:
        raise UserError(f"adapters are called as their folders, and {name} is taken; rename one")


def trainable(model):
    """(number of trained parameters, their share of the base's)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, trained / getattr(model, "base_parameters", trained)


# --- files ---------------------------------------------------------------------------------------


def save_adapter(model, folder, base):
    """Write adapter_config.json and adapter_model.safetensors, which name the base and hold nothing
    of it but the hash of its weights. A base that is a folder is named by its absolute path, since
    peft takes a relative one from wherever it runs.

    peft has no file for two methods: of lora+prompt the second is saved in the folder, and its base
    is the first, on the model's own base, in a folder `lora` in there.
    """
    folder, known = Path(folder), getattr(model, "base_hash", None)
    *inner, last = model.adapter.split("+")
    for name, own in zip([*inner, last], model.adapter_config, strict=True):
        place = folder if name == last else folder / name
        if base and Path(base).is_dir():
            base = Path(base).resolve()
        config = {
            "peft_type": METHODS[name].peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": str(base),
            **own,
        }
        if whole := [theirs for ours, theirs in MODULES_TO_SAVE.items() if hasattr(model, ours)]:
            config["modules_to_save"] = whole
        if isinstance(model, ScalarGPT):
            config |= {"task_type": "SEQ_CLS", "reward_shift": model.shift}  # the latter not peft's
        atomic_write(place / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        metadata = {BASE_HASH: known} if known else {}
        tensors = METHODS[name].parameters(model)
        safetensors.save_file(tensors, place / WEIGHTS, metadata=metadata)
        if name != last:
            base, known = place, weights_hash(place)


def load_adapter(model, folder, base=None, name=None):
    """Attach the adapter that lies in a folder, ours or peft's; returns the model. With `base`, the
    folder that the model came from, its weights must be those that the adapter was trained on.
    """
    folder = existing_folder(folder)
    if not is_adapter(folder):
        raise UserError(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG} in it")
    config = read_json(folder / ADAPTER_CONFIG)
    method = next((known for known, each in METHODS.items() if each.matches(config)), None)
    if method is None:
        raise UserError(f"{folder}: peft_type {config.get('peft_type')!r} is not implemented")
    known = safetensors.read_header(folder / WEIGHTS)[1].get(BASE_HASH)
    if base and known and known != weights_hash(base):
        raise UserError(
            f"{folder} was trained on another base: {base} holds other weights; put it on those "
            "that it was trained on, or train it anew"
        )
    tensors = safetensors.load_file(folder / WEIGHTS)
    settings = METHODS[method].settings(model, config, tensors, folder)
    attach(model, method, settings, name=name)
    own = METHODS[method].parameters(model)
    wanted, found = ({key: list(x.shape) for key, x in each.items()} for each in (own, tensors))
    for key in sorted({**wanted, **found}):
        if wanted.get(key) != found.get(key):
            raise UserError(
                f"{folder} is damaged or was trained on another base: {key} has shape "
                f"{found.get(key)}, but the model wants {wanted.get(key)}"
            )
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(tensors[key])
    if isinstance(model, ScalarGPT):
        model.shift = float(config.get("reward_shift") or 0.0)
    return model


def put_adapters(model, folders, base):
    """Load the adapters in these folders onto the model from the folder `base`. One is merged, if
    it can be. Several stand side by side, each under the name of its own folder: lora.use says
    which of them speaks, at first the base alone.
    """
    if len(folders) > 1:
        for folder in folders:
            load_adapter(model, folder, base, name=Path(folder).name)
        use(model, None)
        return
    load_adapter(model, folders[0], base)
    if METHODS[model.adapter].mergeable:
        unwrap(model, merged=True)
        model.adapter = model.lora = None
        model.requires_grad_(True)


# --- in training and sampling --------------------------------------------------------------------


def start_adapter(model, cfg, rt, folder=None):
    """With --adapter: freeze the model and attach an adapter; only that is trained and saved, and
    beside it a reward model's head or a VLM's projector.

    `folder` is where the model came from; default: --init. Raises UserError where it holds an
    adapter of a kind that can't be merged, on which nothing else can be trained.
    """
    if model.adapter:
        raise UserError(
            f"{folder or cfg.init} holds an adapter ({model.adapter}) that can't be merged into "
            "its base; start from the base"
        )
    if not cfg.adapter:
        return
    model.to(rt.device)
    settings = cfg if isinstance(cfg, Settings) else Settings(rank=cfg.rank, alpha=cfg.alpha)
    attach(model, cfg.adapter, settings, cfg.init)  # the base of what is saved: never a critic
    trained, share = trainable(model)
    rt.print(f"{cfg.adapter}: {trained:,} parameters are trained, {share:.2%} of the model's")


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
    ref.model.prefix = ref.adapter = ref.lora = None
    return ref
