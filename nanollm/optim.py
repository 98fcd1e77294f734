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

from nanollm.config import UserError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steep at zero, settles at 0.7 .. 1.2

# A projector is small and everything stands on it: at the full learning rate its tokens grow to
# many times the size of words', so that what the layers add to them counts for nothing.
PROJECTOR = 0.1


def orthogonalise(G, steps=5, dtype=torch.bfloat16):
    """Nearest semi-orthogonal matrix to each G (..., rows, cols): U V^T of its SVD, roughly, with
    no SVD.

    Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X. bf16 is exact enough for it.
    """
    a, b, c = NEWTON_SCHULZ
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G).to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; for 2-D parameters. Matrices of one shape are orthogonalised
    together.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        self.dtype = dtype  # of the matrix products
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
                matrices = orthogonalise(torch.stack(updates), dtype=self.dtype).unbind()
                for p, update in zip(params, matrices):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)


class Optimizer:
    """Muon and AdamW stepped as one, each group at a share of the learning rate it began with."""

    def __init__(self, *optimizers, scaler=None):
        self.optimizers = [o for o in optimizers if o.param_groups]
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        for group in self.groups():
            group["initial_lr"] = group["lr"]

    def groups(self):
        return [group for o in self.optimizers for group in o.param_groups]

    @property
    def lr(self):
        """The learning rate of the first group."""
        return self.groups()[0]["lr"]

    def step(self, factor=1.0, grad_clip=0.0):
        """One step at `factor` times the learning rates, the gradient's norm kept below `grad_clip`
        (0: as it is); then the gradients are cleared. Returns the norm, over all parameters.

        A gradient that is not finite ends the run, save in fp16, where the scaler skips such steps.
        """
        for o in self.optimizers:
            self.scaler.unscale_(o)
        params = [p for group in self.groups() for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise UserError(
                f"the gradient became {norm}; lower --lr and --muon_lr, or continue from the last "
                "checkpoint with --resume"
            )
        for group in self.groups():
            group["lr"] = group["initial_lr"] * factor
        for o in self.optimizers:
            self.scaler.step(o)
            o.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def state_dict(self):
        states = [o.state_dict() | {"kind": type(o).__name__} for o in self.optimizers]
        return {"optimizers": states, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Take over the moments; learning rates and weight decay stay those of this run's own
        flags. Raises ValueError for those of another kind of optimizer.
        """
        for o, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if saved.get("kind") != type(o).__name__:
                raise ValueError(f"the moments of {saved.get('kind')} don't fit {type(o).__name__}")
            own = [{k: v for k, v in group.items() if k != "params"} for group in o.param_groups]
            o.load_state_dict(saved)
            for group, values in zip(o.param_groups, own):
                group.update(values)
        self.scaler.load_state_dict(state["scaler"])


def build_optimizer(
    model, cfg, scaler=None, betas=(0.9, 0.95), eps=1e-8, layer_decay=1.0, lora_plus=1.0
):
    """The optimizer of a model, as cfg.optimizer, lr, muon_lr and weight_decay say (TrainConfig).

    "muon": matrices of the blocks and of a projector by Muon at `muon_lr`, the rest by AdamW at
    `lr`; "adamw": all by AdamW at `lr`. A projector learns at PROJECTOR times these rates. Weight
    decay falls on matrices only, and not on virtual tokens. `layer_decay` < 1 multiplies the
    learning rate once per layer below the head (Howard & Ruder 2018, arXiv:1801.06146), so that the
    lowest layers move least. `lora_plus` multiplies that of an adapter's B (Hayou et al. 2024,
    LoRA+, 2402.12354, want about 16).
    """
    layers = 1 + max((_layer(name) for name, _ in model.named_parameters()), default=0)
    muon, adam = {}, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        hidden = p.dim() == 2 and (".layers." in name or name.startswith("projector."))
        into = muon if cfg.optimizer == "muon" and hidden else adam
        low = ".layers." in name or "embed" in name or name.startswith("vision.")
        factor = layer_decay ** (layers - _layer(name)) if low else 1.0
        factor *= PROJECTOR if name.startswith("projector.") else 1.0
        factor *= lora_plus if name.endswith(".lora_B") else 1.0
        decayed = p.dim() >= 2 and not name.startswith("model.prefix.")
        into.setdefault((factor, decayed), []).append(p)

    def groups(members, lr):
        return [
            {"params": p, "lr": lr * factor, "weight_decay": cfg.weight_decay if decayed else 0.0}
            for (factor, decayed), p in members.items()
        ]

    # in the precision of the layers: what the machine multiplies fastest, fixed for a run
    low_precision = getattr(model, "compute_dtype", torch.float32) == torch.bfloat16
    dtype = torch.bfloat16 if low_precision else torch.float32
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    made = [Muon(groups(muon, cfg.muon_lr), dtype=dtype)] if muon else []
    if adam:
        made.append(torch.optim.AdamW(groups(adam, cfg.lr), betas=betas, eps=eps, fused=fused))
    return Optimizer(*made, scaler=scaler)


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


def constant(step, steps, warmup):
    """Linear warm-up, then constant."""
    return min((step + 1) / max(1, warmup), 1.0)


SCHEDULES = {"cosine": cosine, "trapezoid": trapezoid, "constant": constant}
