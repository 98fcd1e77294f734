"""The scaling law: a dozen small models say how good a larger one will be; and the napkin: what a
large one takes.

    L(N, D) = E + A / N^alpha + B / D^beta           nats per token of held-out text   (2)
    min over (A, B, E, alpha, beta) of
        sum_i Huber_0.001(LSE(a - alpha ln N_i, b - beta ln D_i, e) - ln L_i)          (3)
    N_opt = G (C / 6)^(beta / (alpha + beta)),  D_opt = C / (6 N_opt),
        G = (alpha A / (beta B))^(1 / (alpha + beta))                                  (4)

Hoffmann et al. 2022 (arXiv:2203.15556): IsoFLOP profiles (section 3.2) and the fit of section 3.3,
with A = exp(a), B = exp(b), E = exp(e). N counts every parameter: the embedding is tied to the head
and so is multiplied with every token. D is tokens, each seen once; C = 6 N D FLOP. L-BFGS starts
from the 16 best points of a grid instead of from all of them, in terms of ln N and ln D less their
means, where it converges; Huber terms are summed, for their mean ends the search too early
(Besiroglu et al. 2024, 2404.10102). Models have one layer: two can copy from the context what one
cannot (Olsson et al. 2022, 2209.11895), and such a jump is no power law. Rates and batch are the
same for all.

Run     python -m nanollm.scaling                         # twelve minutes of a core
        python -m nanollm.scaling --parameters 7e9 --tokens 1e12 --gpu H100 --days 30
Needs   nothing; models that an earlier call has trained are not trained again
Expect  seed 0 (one core of an AMD EPYC, bf16): L = 0.73 + 7,440 / N^0.90 + 23,900 / D^0.83, within
        1.7% of each of its 12 models; best sizes 84k, 118k and 164k. The 13th, held back, with 1.3
        times the parameters and twice the FLOP of the largest: 0.981 predicted, 0.988 measured,
        0.7% less. Half the budgets end 2.9% off, a quarter, with up to 60 tokens a parameter, 4.1%
        (fp32): the shortest runs still learn too fast for a power law
Watch   E, alpha, beta    E near 0: nothing has come near the floor yet; alpha or beta near 0 or
                          above 1: too few sizes, or too few tokens for them; --budget
        isoflop.svg       each budget's curve must have its minimum inside, not at an end
"""

import itertools
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

from nanollm.config import OpenShare, Positive, UserError, Whole, atomic_write, cli, read_json
from nanollm.gpt import GPT, GPTConfig, count_parameters, shape_of
from nanollm.metrics import table
from nanollm.plot import line_chart
from nanollm.runtime import flop_per_token

# bf16 TFLOP/s of dense matrices, and GB, from NVIDIA's data sheets, where TFLOP/s "with sparsity"
# are twice as many; the 4090's with fp32 sums (Ada architecture white paper)
GPUS = {"RTX4090": (165, 24), "A100": (312, 80), "H100": (989, 80), "B200": (2250, 180)}


@dataclass
class Config:
    # -- Scaling law
    out: str = "runs/scaling"  # folder of the run folders, the chart and result.json
    # village, or what train_pretrain.py --data reads: 7 MB or more, or models see a text twice
    data: str = "village"
    # FLOP of the least-trained models; others get 2 and 4 times as many, the one held back 8
    budget: Positive = 4e11
    seed: Whole[0] = 0  # of weights and data
    # -- Napkin
    parameters: Positive | None = None  # N of the model to reckon for; no model is trained then
    tokens: Positive = 1e12  # D
    gpu: Literal[tuple(GPUS)] = "H100"  # its rate and memory stand in GPUS
    mfu: OpenShare = 0.4  # share of the GPU's rate that training reaches
    days: Positive = 30.0  # time that training may take
    context: Whole[1] = 4096  # T, and the tokens that a GPU computes at a time
    optimizer: Literal["muon", "adamw"] = "adamw"


# --- the law -------------------------------------------------------------------------------------


def predict(law, N, D):
    """Equation 2, nats per token; law: {"E", "A", "B", "alpha", "beta"}."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


def fit(N, D, L, starts=16):
    """The law of n models, equation 3: sequences of parameters, tokens and losses."""
    N, D, L = (torch.tensor(values, dtype=torch.float64).log() for values in (N, D, L))
    n, d = N.mean(), D.mean()

    def objective(x):
        """x (..., 5): both terms' logarithms at the models' middle n, d, then e, alpha, beta."""
        a, b, e, alpha, beta = x.unsqueeze(-1).unbind(-2)
        terms = (a - alpha * (N - n), b - beta * (D - d), e.expand_as(a - N))
        error = torch.stack(terms).logsumexp(0) - L  # (..., n)
        return F.huber_loss(error, 0 * error, reduction="none", delta=1e-3).sum(-1) / 1e-3

    axes = [(-4, -3, -2, -1, 0, 1)] * 2 + [(-1, -0.5, 0, 0.5, 1)] + [(0, 0.5, 1, 1.5, 2)] * 2
    grid = torch.tensor([*itertools.product(*axes)], dtype=torch.float64)  # (4500, 5)
    found = [descend(objective, start) for start in grid[objective(grid).argsort()[:starts]]]
    a, b, e, alpha, beta = min(each for each in found if math.isfinite(each[0]))[1]
    A, B = math.exp(a + alpha * n), math.exp(b + beta * d)
    return {"E": math.exp(e), "A": A, "B": B, "alpha": alpha, "beta": beta}


def descend(objective, start):
    """(lowest value, where), by L-BFGS from a vector."""
    x = start.clone().requires_grad_()
    how = dict(tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    lbfgs = torch.optim.LBFGS([x], max_iter=500, history_size=20, **how)

    def closure():
        lbfgs.zero_grad()
        loss = objective(x)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return objective(x).item(), x.tolist()


def optimum(law, C):
    """(N, D) of the lowest loss for C FLOP, equation 4."""
    alpha, beta = law["alpha"], law["beta"]
    G = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta))
    N = G * (C / 6) ** (beta / (alpha + beta))
    return N, C / (6 * N)


# --- the models ----------------------------------------------------------------------------------

# channels of the models of each budget: 52k to 215k parameters, 3 to 49 tokens for each of them
WIDTHS = ((48, 64, 80, 96), (48, 64, 80, 96), (64, 80, 96, 112))
LARGEST = 128  # 279k: held back
VOCAB, CONTEXT, ROWS = 512, 128, 4  # of tokens, tokens in a row, rows in a step


def shape_with(layers, heads, head_dim, vocab_size):
    flags = SimpleNamespace(layers=layers, channels=heads * head_dim, heads=heads, mlp=None)
    return GPTConfig(vocab_size, **shape_of(flags))


def train(cfg, channels, C):
    """Train a model with C FLOP, unless that is done; returns {"N", "D", "C", "loss"}."""
    heads = channels // 16
    N = count_parameters(GPT(shape_with(1, heads, 16, VOCAB)))[0]
    steps = round(C / (6 * N * CONTEXT * ROWS))
    folder = Path(cfg.out) / f"{channels}_{steps}"
    words = (
        f"train_pretrain.py --layers 1 --channels {channels} --heads {heads} --vocab_size {VOCAB} "
        f"--context {CONTEXT} --batch_size {ROWS} --steps {steps} --eval_every {steps} "
        f"--sample_tokens 0 --villagers 512 --megabytes 16 --seed {cfg.seed}"
    ).split() + ["--data", cfg.data, "--out", folder.as_posix()]
    command, done = shlex.join(["python", *words]), folder / "command.txt"
    if not done.exists() or done.read_text(encoding="utf-8") != command:
        print(f"\n$ {command}", flush=True)
        if code := subprocess.call([sys.executable, *words]):
            raise UserError(f"train_pretrain.py ended with exit code {code}; fix it and call again")
        atomic_write(done, command)
    loss = read_json(folder / "result.json")["val_loss"]
    return {"N": N, "D": steps * CONTEXT * ROWS, "C": C, "loss": loss}


def chart(models, law):
    """Loss over size: what was measured, and the law's for the largest and for the best sizes."""
    series, largest = {}, models[-1]
    for C in sorted({model["C"] for model in models}):
        series[f"{C:.2g} FLOP"] = [(math.log10(m["N"]), m["loss"]) for m in models if m["C"] == C]
    predicted = predict(law, largest["N"], largest["D"])
    series[f"law, {largest['C']:.2g}"] = [(math.log10(largest["N"]), predicted)]
    best = [optimum(law, largest["C"] / 2 ** (k / 10)) for k in range(31)]
    series["law, best size"] = [(math.log10(N), predict(law, N, D)) for N, D in best]
    return line_chart(series, "", "log10 of parameters N", "nats per token")


def scaling_law(cfg):
    budgets = [cfg.budget, 2 * cfg.budget, 4 * cfg.budget]
    models = [train(cfg, width, C) for C, widths in zip(budgets, WIDTHS) for width in widths]
    largest = train(cfg, LARGEST, 8 * cfg.budget)
    law = fit(*([model[key] for model in models] for key in ("N", "D", "loss")))
    rows = []
    for N, D, C, loss in (model.values() for model in [*models, largest]):
        said = predict(law, N, D)
        error = f"{said / loss - 1:+.1%}"
        rows.append([f"{N:,}", f"{D:,}", f"{C:.1e}", f"{loss:.3f}", f"{said:.3f}", error])
    print(table(["N", "D", "FLOP", "loss", "law", "error"], rows))
    print("the last one was held back from the fit\n")
    print("L = {E:.3f} + {A:.3g} / N^{alpha:.3f} + {B:.3g} / D^{beta:.3f}".format(**law))
    for C in [*budgets, 8 * cfg.budget]:
        print("{:.1e} FLOP: best with N = {:,.0f}, D = {:,.0f}".format(C, *optimum(law, C)))
    result = {"law": law, "models": models, "held_back": largest}
    atomic_write(Path(cfg.out) / "result.json", json.dumps(result, indent=2) + "\n")
    atomic_write(Path(cfg.out) / "isoflop.svg", chart([*models, largest], law))
    print(f"{cfg.out}/isoflop.svg shows it")
    return result


# --- the napkin ----------------------------------------------------------------------------------


def memory(shape, N, tokens, optimizer="adamw", size=2):
    """Bytes that training a model of N parameters takes, by part; `tokens` go through it at a time.
    size: bytes per number in the layers' precision, 2 of bf16 and 4 of fp32.

    Weights, gradients and moments are fp32; Muon has one moment for the matrices of the blocks,
    AdamW two. Layers in bf16 keep a copy of their weights. Of each token a layer keeps for backward
    its two norms' inputs in fp32, what those are divided to, and the outputs; the same of queries
    and keys (QK-norm), with rotated ones as outputs; the values, and what attention returns; the
    MLP's gate, silu(gate), up and their product. Attention keeps no T x T matrix (Dao et al. 2022,
    arXiv:2205.14135). The logits stay to the end, and backward begins with their gradient.
    """
    C, M, L = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    heads = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    matrices = L * (2 * C * heads + 3 * C * M)
    norm = 4 + 2 * size  # bytes per channel
    layer = 2 * C * norm + heads * (norm + size) + 4 * M * size
    return {
        "weights": 4 * N,
        "gradients": 4 * N,
        "moments": 8 * N - 4 * matrices * (optimizer == "muon"),
        "16-bit weights": 2 * N if size == 2 else 0,
        "activations": tokens * (L * layer + C * norm + 2 * shape.vocab_size * size),
    }


def napkin(cfg):
    """Prints memory, time and number of GPUs for 6 N D FLOP and attention's share, at the given
    share of the GPU's rate (MFU, Chowdhery et al. 2022, arXiv:2204.02311).
    """
    N, (tflops, gigabytes) = cfg.parameters, GPUS[cfg.gpu]
    # C = 128 L, as Llama's 7B has it, and 12 C^2 parameters a layer
    layers = max(1, round((N / (12 * 128**2)) ** (1 / 3)))
    shape = shape_with(layers, max(1, round(math.sqrt(N / (12 * layers)) / 128)), 128, 32000)
    parts = memory(shape, N, cfg.context, cfg.optimizer)
    gigabytes_of = {f"{name}, GB": size / 1e9 for name, size in parts.items()}
    total, own = sum(gigabytes_of.values()), gigabytes_of["activations, GB"]
    room = 0.9 * gigabytes - own  # a tenth for the allocator, and the layer that is gathered
    if room <= 0:
        raise UserError(f"activations alone take {own:.0f} GB: a shorter --context, or larger GPUs")
    needed = math.ceil((total - own) / room)  # all but the activations is shared out among them
    flop = cfg.tokens * flop_per_token(shape, N, cfg.context)
    days = flop / (cfg.mfu * tflops * 1e12 * 86400)
    found = gigabytes_of | {
        "all, GB": total,
        f"{cfg.gpu}s that hold it": needed,
        f"{cfg.gpu}-days": days,
        f"{cfg.gpu}s for {cfg.days:g} days": max(needed, math.ceil(days / cfg.days)),
    }
    print(f"{layers} layers of {shape.hidden_size} channels, {flop:.2e} FLOP")
    print(table(["", cfg.gpu], [[name, f"{round(value, 1):,}"] for name, value in found.items()]))
    return found


def main(cfg):
    return napkin(cfg) if cfg.parameters else scaling_law(cfg)


if __name__ == "__main__":
    cli(main, Config)
