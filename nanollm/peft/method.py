"""What a method of parameter-efficient fine-tuning is: a class that adds parameters to a frozen
model, and says what peft calls them in its files.

A new method is a class derived from Method in a file of its own, and a line in METHODS
(adapters.py). bottleneck.py is the shortest example.
"""

from dataclasses import dataclass

import torch.nn as nn

from nanollm.config import AdapterConfig, Whole

BASE = "base_model.model."  # in front of every name in peft's files
# Names of a VLM's parts, and what peft calls them, whose base is a LlavaForConditionalGeneration.
PARTS = {
    "model.": "model.language_model.",
    "projector.": "model.multi_modal_projector.",
    "vision.": "model.vision_tower.",
}
# Trained as a whole beside an adapter, and what peft calls it: a reward model's head, a VLM's
# projector.
MODULES_TO_SAVE = {"score": "score", "projector": "multi_modal_projector"}


@dataclass
class Settings(AdapterConfig):
    """What the methods can be told; each reads its own."""

    # -- Adapter
    # lora, dora, qlora, bottleneck: names of linear layers, separated by commas; all: every one in
    # the language model's blocks; vision: every one in those of the vision tower
    targets: str = "all"
    # lora, dora, qlora: they count alpha / sqrt(r) instead, so that high ranks don't learn less
    rslora: bool = False
    virtual_tokens: Whole[1] = 16  # V of prefix, ptuning and prompt
    hidden: Whole[1] = 128  # prefix: width of the MLP that makes keys and values in training


class Around(nn.Module):
    """A linear layer, the base, with an adapter around it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.out_features = base, base.out_features

    def plain(self, merged):
        """The base itself, or with `merged` a Linear that computes as base and adapter do together;
        where there is none, this module.
        """
        return self if merged else self.base


class Method:
    """What adapters.py asks of a method. What is said here fits those whose parameters stand around
    the layers.
    """

    peft_type = ""  # in adapter_config.json
    mergeable = False  # does `plain(merged=True)` of its layers give a Linear?
    soft = False  # does it put virtual tokens in front?
    others = ()  # in names of parameters that are not its own, or saved under another name

    def add(self, model, settings, name):
        """Put new parameters into the model, in place; returns the method's own entries of
        adapter_config.json. `name` tells several adapters of the LoRA family apart.
        """
        raise NotImplementedError

    def settings(self, model, config, tensors, folder):
        """The Settings with which `add` makes an adapter like the one in a folder's files."""
        raise NotImplementedError

    def matches(self, config):
        """Does an adapter_config.json belong to this method?"""
        return config.get("peft_type") == self.peft_type

    def parameters(self, model):
        """{name in peft's files: tensor} of what is trained."""
        return {
            peft_name(model, name): p
            for name, p in model.named_parameters()
            if p.requires_grad and not any(other in name for other in self.others)
        }


def peft_name(model, name):
    """What peft calls a parameter that we call `name`."""
    if hasattr(model, "vision"):
        for ours, theirs in PARTS.items():
            if name.startswith(ours):
                return BASE + theirs + name.removeprefix(ours)
    return BASE + name
