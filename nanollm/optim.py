"""Optimizers and learning-rate schedules.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982) for
the matrices inside the blocks, AdamW (Loshchilov & Hutter 2017, 1711.05101) for embedding, head,
gains and biases:

    M <- mu M + (1 - mu) G
    O = NewtonSchulz(mu M + (1 - mu) G)                       Nesterov's look ahead
    W <- W - lr (sqrt(max(1, rows / cols)) O + wd W)
"""

import math

import torch

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan et al.: steep at zero, and settles within 0.7 .. 1.2

# A projector is small and everything stands on it: at the full learning rate its tokens grow to
# many times the size of words', so that what the layers add to them counts for nothing.
PROJECTOR = 0.1


def orthogonalise(G, steps=5):
    """Nearest semi-orthogonal matrix to each G (..., rows, cols): U V^T of its SVD, roughly, with
    no SVD.

    Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X in bf16.
    """
    a, b, c = NEWTON_SCHULZ
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G).bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; for 2-D parameters. Matrices of one shape are orthogonalised
    together.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in same_shape.items():
                updates = []
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]))  # Nesterov
                scale = math.sqrt(max(1, rows / cols))
                for p, update in zip(params, orthogonalise(torch.stack(updates)).unbind()):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)


class Optimizers:
    """Several optimizers stepped as one; `schedule` multiplies the learning rate that each group
    began with.
    """

    def __init__(self, *optimizers):
        self.optimizers = [o for o in optimizers if o.param_groups]
        for group in self.groups():
            group["initial_lr"] = group["lr"]

    def groups(self):
        return [group for o in self.optimizers for group in o.param_groups]

    def schedule(self, factor):
        for group in self.groups():
            group["lr"] = group["initial_lr"] * factor

    def step(self, scaler):
        for o in self.optimizers:
            scaler.step(o)
        scaler.update()

    def unscale(self, scaler):
        for o in self.optimizers:
            scaler.unscale_(o)

    def zero_grad(self):
        for o in self.optimizers:
            o.zero_grad(set_to_none=True)

    def state_dict(self):
        return [o.state_dict() for o in self.optimizers]

    def load_state_dict(self, states):
        """Take over the moments; learning rates and weight decay stay those of this run's own
        flags.
        """
        for o, state in zip(self.optimizers, states, strict=True):
            own = [{k: v for k, v in group.items() if k != "params"} for group in o.param_groups]
            o.load_state_dict(state)
            for group, values in zip(o.param_groups, own):
                group.update(values)


def build_optimizers(
    model,
    kind="muon",
    lr=0.02,
    adam_lr=3e-3,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    layer_decay=1.0,
    eps=1e-8,
    lora_plus=1.0,
):
    """The optimizers of a GPT; raises ValueError for an unknown kind.

    kind "muon": matrices of the blocks and of a projector by Muon at `lr`, the rest by AdamW at
    `adam_lr`; "adamw": all by AdamW at `adam_lr`. A projector learns at PROJECTOR times these
    rates. Weight decay falls on matrices only. `layer_decay` < 1 multiplies the
    learning rate once per layer below the head (Howard & Ruder 2018, arXiv:1801.06146), so that the
    lowest layers move least. `lora_plus` multiplies that of an adapter's B (Hayou et al. 2024,
    LoRA+, 2402.12354, want about 16).
    """
    if kind not in ("muon", "adamw"):
        raise ValueError(f"unknown optimizer {kind!r}")
    layers = 1 + max((_layer(name) for name, _ in model.named_parameters()), default=0)
    muon, adam = {}, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        hidden = p.dim() == 2 and (".layers." in name or name.startswith("projector."))
        into = muon if kind == "muon" and hidden else adam
        low = ".layers." in name or "embed" in name or name.startswith("vision.")
        factor = layer_decay ** (layers - _layer(name)) if low else 1.0
        factor *= PROJECTOR if name.startswith("projector.") else 1.0
        factor *= lora_plus if ".lora_B." in name else 1.0
        into.setdefault((factor, p.dim() >= 2), []).append(p)

    def groups(members, base):
        return [
            {
                "params": params,
                "lr": base * factor,
                "weight_decay": weight_decay if decayed else 0.0,
            }
            for (factor, decayed), params in members.items()
        ]

    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    made = [Muon(groups(muon, lr))] if muon else []
    if adam:
        made.append(torch.optim.AdamW(groups(adam, adam_lr), betas=betas, eps=eps, fused=fused))
    return Optimizers(*made)


def _layer(name):
    """Layer number in a parameter's name: model.layers.3.mlp... -> 3; the embedding counts as -1,
    and so does a vision tower, which takes its place.
    """
    parts = name.split(".")
    below = parts[0] == "vision" or "layers" not in parts
    return -1 if below else int(parts[parts.index("layers") + 1])


# --- schedules: step -> factor on the learning rate ----------------------------------------------


def cosine(step, steps, warmup, floor=0.1):
    """Linear warm-up, then half a cosine down to `floor` (Loshchilov & Hutter 2016,
    arXiv:1608.03983).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(step, steps, warmup, decay=0.6):
    """Linear warm-up, constant, then linear to zero over the last `decay` of the run (Hägele et al.
    2024, 2405.18392).
    """
    return min((step + 1) / max(1, warmup), 1.0, (steps - step) / max(1, decay * steps))


SCHEDULES = {"cosine": cosine, "trapezoid": trapezoid}
