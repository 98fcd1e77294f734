"""What training and inference do with adapters (adapters.py), so that each script needs one line.

    start_adapter(model, cfg, rt)    --adapter, --rank and --alpha of a training script
    reference(model)                 the frozen model that DPO, PPO and GRPO compare with
    unwrap(model, merged)            plain layers again: the base's, or with the adapter in them
    put_adapter(model, folder, base) a trained adapter onto its base
"""

import copy

from nanollm import adapters
from nanollm.config import UserError
from nanollm.gpt import ScalarGPT

MERGEABLE = ("lora", "dora", "qlora")


def start_adapter(model, cfg, rt):
    """With --adapter: freeze the model and attach an adapter; only that is trained and saved. The
    head of a reward model is trained beside it.

    Raises UserError where the flags don't fit the model, or --init holds an adapter of a kind that
    can't be merged, on which nothing else can be trained.
    """
    if getattr(model, "adapter", None):
        raise UserError(
            f"--init {cfg.init} holds an adapter ({model.adapter}) that can't be merged into its "
            "base; start from the base"
        )
    if not cfg.adapter:
        return
    check_method(cfg.adapter)
    if isinstance(model, ScalarGPT) and cfg.adapter in {*adapters.METHODS} - {*MERGEABLE}:
        raise UserError(
            f"--adapter {cfg.adapter} goes with no reward model and no critic of its own; they "
            f"take {', '.join(MERGEABLE)}"
        )
    model.to(rt.device)
    settings = adapters.Settings(rank=cfg.rank, alpha=cfg.alpha)
    adapters.attach(model, cfg.adapter, settings, cfg.init)
    trained, share = adapters.trainable(model)
    rt.print(f"{cfg.adapter}: {trained:,} parameters are trained, {share:.2%} of the model's")


def check_method(name):
    if name not in adapters.METHODS:
        known = ", ".join(adapters.METHODS)
        raise UserError(f"--adapter {name} is no method; methods are {known}")


def reference(model):
    """The model as it is now, to compare with: a copy, or where an adapter is trained the base
    alone, which shares the frozen weights and so costs no memory.
    """
    shared = {}
    if getattr(model, "adapter", None):
        tensors = (*model.parameters(), *model.buffers())
        # a VLM's projector is trained beside the adapter, and must not move here
        shared = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
    ref = copy.deepcopy(model, shared)
    unwrap(ref, merged=False)
    ref.model.prefix = ref.adapter = None
    return ref


def unwrap(module, merged):
    """Put plain layers in place of those that an adapter or four bits changed, in place: the base's
    own, or with `merged` ones that compute the same, where such exist.
    """
    for name, child in list(module.named_children()):
        if hasattr(child, "plain"):
            setattr(module, name, child.plain(merged))
        else:
            unwrap(child, merged)


def put_adapter(model, folder, base):
    """Load the adapter in a folder onto the model from the folder `base`: merged if it can be, else
    attached.
    """
    if getattr(model, "adapter", None):
        raise UserError(
            f"{folder} can't be put on a model that has an adapter ({model.adapter}) already"
        )
    adapters.load_adapter(model, folder, base)
    if model.adapter in MERGEABLE:
        unwrap(model, merged=True)
        del model.lora
        model.adapter = None
        model.requires_grad_(True)
