"""Bottleneck adapters: a thin MLP behind attention and behind the MLP of every block.

    y = h + U gelu(D h),  h = W x            D (r, C), U (C, r)

W is the last linear layer of the branch, and y goes on to the residual. U starts at zero, so that
nothing changes at first. Houlsby et al. 2019 (arXiv:1902.00751), figure 2; they also train layer
norms, which stay frozen here. peft has no such method; the names of the tensors are those of our
parameters.
"""

import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.gpt import Linear
from nanollm.peft.lora import named, targets_of
from nanollm.peft.method import Around, Method, Settings

LAST = "o_proj", "down_proj", "out_proj", "fc2"  # of a branch; the last two in a vision tower


class Bottleneck(Around):
    """A linear layer with an adapter behind it, which can't be merged; x (..., in) -> (..., C)."""

    def __init__(self, base, rank):
        super().__init__(base)
        C = self.out_features
        self.down, self.up = Linear(C, rank), Linear(rank, C)
        nn.init.normal_(self.down.weight, std=C**-0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


class Bottlenecks(Method):
    peft_type = "BOTTLENECK"

    def add(self, model, settings, name):
        last = [where for where in named(model, settings.targets) if where.endswith(LAST)]
        if not last:
            raise UserError(
                f"--targets must name {', '.join(LAST)}: an adapter stands behind these"
            )
        for where in last:
            model.set_submodule(where, Bottleneck(model.get_submodule(where), settings.rank))
        return {"r": settings.rank}

    def settings(self, model, config, tensors, folder):
        targets = targets_of(model, tensors, ".down.weight", folder)
        return Settings(rank=config["r"], targets=targets)
