"""Optimizers and schedules: parity with torch's Muon, groups by hand, schedules by hand."""

import copy
import io
import math

import pytest
import torch

from nanollm.gpt import GPT, GPTConfig
from nanollm.optim import (
    SCHEDULES,
    Muon,
    Optimizers,
    build_optimizers,
    cosine,
    orthogonalise,
    trapezoid,
)

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def some_gradient(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_gpt(**changes):
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    return GPT(GPTConfig(**shape | changes))


# --- Muon --------------------------------------------------------------------------------------
@pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with"
)
@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.06), ("fp32", 1e-4)])
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0},
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1},
    ],
)
@pytest.mark.parametrize(
    "shapes", [[(32, 32)], [(16, 64)], [(64, 16)], [(32, 32), (8, 24), (32, 32), (24, 8)]]
)
def test_muon_takes_the_steps_of_torchs_muon(shapes, settings, precision, tolerance, monkeypatch):
    if (
        precision == "fp32"
    ):  # both round to bf16, in another order; without rounding they must agree
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.float().clone())
    ours = [torch.nn.Parameter(some_gradient(s, 50 + i)) for i, s in enumerate(shapes)]
    theirs = copy.deepcopy(ours)
    start = [p.detach().clone() for p in ours]
    optimizers = [
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, nesterov=True, adjust_lr_fn="original"),
    ]
    for step in range(4):
        for params, optimizer in zip((ours, theirs), optimizers):
            for i, p in enumerate(params):
                p.grad = some_gradient(p.shape, 10 * step + i)
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        moved = (b - p).norm()
        assert moved > 0.1
        assert (a - b).norm() < tolerance * moved


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (3, 16, 40)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    G = some_gradient(shape, 0)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    values = torch.linspace(0.05, 1, U.shape[-1])  # known, and none near zero
    O = orthogonalise(U @ (values[:, None] * Vh))
    assert O.shape == G.shape
    singular = torch.linalg.svdvals(O.float())
    assert singular.min() > 0.6 and singular.max() < 1.3
    along = (U.mT @ O.float() @ Vh.mT).diagonal(dim1=-2, dim2=-1)  # 1 where O = U V^T
    assert torch.allclose(along, torch.ones_like(along), atol=0.4)


def test_orthogonalising_forgets_the_size_of_the_gradient():
    G = some_gradient((16, 16), 0)
    assert torch.equal(orthogonalise(G), orthogonalise(1024 * G))  # a power of two rounds alike


def test_no_gradient_moves_nothing():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([p], lr=0.1)
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 4))


def test_weight_decay_alone_shrinks_by_lr_times_decay():
    p = torch.nn.Parameter(torch.full((4, 4), 2.0))
    p.grad = torch.zeros(4, 4)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    assert p[0, 0].item() == pytest.approx(2 * (1 - 0.05))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_matrix_is_fitted(kind):
    torch.manual_seed(0)
    model = small_gpt()
    tokens = torch.randint(64, (4, 17))
    optimizers = build_optimizers(model, kind)
    for _ in range(80):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(NO_SCALER)
    assert loss < 0.3  # from 4.2


# --- groups ------------------------------------------------------------------------------------
def named_groups(model, optimizers):
    """{name: (kind, lr, decay)}, asserting that each parameter is in exactly one group."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for optimizer in optimizers.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = type(optimizer).__name__, group["lr"], group["weight_decay"]
    return found


@pytest.mark.parametrize(
    "shape", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "qk_norm": False}]
)
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(kind, shape):
    model = small_gpt(**shape)
    groups = named_groups(
        model, build_optimizers(model, kind, muon_lr=0.02, lr=3e-3, weight_decay=0.1)
    )
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        hidden = "layers" in name and p.dim() == 2
        by_muon = kind == "muon" and hidden
        assert groups[name] == (
            "Muon" if by_muon else "AdamW",
            0.02 if by_muon else 3e-3,
            0.1 if p.dim() == 2 else 0.0,
        )


def test_frozen_parameters_are_left_out():
    model = small_gpt()
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = named_groups(model, build_optimizers(model))
    assert (
        len(groups) == len(list(model.parameters())) - 1
        and "model.embed_tokens.weight" not in groups
    )


@pytest.mark.parametrize(
    "name, factor",
    [
        ("lm_head.weight", 1),
        ("model.norm.weight", 1),
        ("model.layers.1.mlp.up_proj.weight", 0.5),
        ("model.layers.1.input_layernorm.weight", 0.5),
        ("model.layers.0.mlp.up_proj.weight", 0.25),
        ("model.layers.0.self_attn.q_norm.weight", 0.25),
        ("model.embed_tokens.weight", 0.125),
    ],
)
def test_layer_decay_halves_the_learning_rate_with_each_layer_below_the_head(name, factor):
    model = small_gpt(tie_word_embeddings=False)
    groups = named_groups(model, build_optimizers(model, muon_lr=1.0, lr=1.0, layer_decay=0.5))
    assert groups[name][1] == factor


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="'sgd'"):
        build_optimizers(small_gpt(), "sgd")


def test_a_schedule_multiplies_what_each_group_began_with():
    optimizers = build_optimizers(small_gpt(), muon_lr=0.02, lr=3e-3)
    for factor in (0.5, 0.1):
        optimizers.schedule(factor)
        assert sorted({round(g["lr"], 9) for g in optimizers.groups()}) == pytest.approx(
            [3e-3 * factor, 0.02 * factor]
        )


def test_zero_grad_drops_the_gradients():
    model = small_gpt()
    optimizers = build_optimizers(model)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizers.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_saved_and_loaded_state_continues_bit_for_bit(kind):
    torch.manual_seed(0)
    model = small_gpt()
    optimizers = build_optimizers(model, kind)

    def steps(model, optimizers, numbers):
        for n in numbers:
            optimizers.schedule(1 / (1 + n))
            for i, p in enumerate(model.parameters()):
                p.grad = some_gradient(p.shape, 100 * n + i)
            optimizers.step(NO_SCALER)

    steps(model, optimizers, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizers.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = small_gpt()
    resumed.load_state_dict(weights)
    resumed_optimizers = build_optimizers(resumed, kind)
    resumed_optimizers.load_state_dict(state)
    steps(model, optimizers, range(3, 6))
    steps(resumed, resumed_optimizers, range(3, 6))
    for (name, a), b in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name


def test_a_state_of_other_optimizers_is_refused():
    state = build_optimizers(small_gpt(), "muon").state_dict()
    with pytest.raises(ValueError):
        build_optimizers(small_gpt(), "adamw").load_state_dict(state)


def test_optimizers_steps_all_of_its_own():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    Optimizers(torch.optim.SGD([a], 1.0), torch.optim.SGD([b], 2.0)).step(NO_SCALER)
    assert (a.item(), b.item()) == (-1, -2)


# --- schedules ---------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("step, factor", [(0, 0.1), (4, 0.5), (9, 1.0)])
def test_warmup_rises_linearly_from_its_first_step_to_its_last(schedule, step, factor):
    assert schedule(step, 110, 10) == pytest.approx(factor)


@pytest.mark.parametrize(
    "step, factor",
    [
        (10, 1.0),
        (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter: cos 45 degrees
        (60, 0.55),  # the middle
        (110, 0.1),  # the floor
        (500, 0.1),
    ],
)
def test_cosine_by_hand(step, factor):
    assert cosine(step, 110, 10) == pytest.approx(factor)


@pytest.mark.parametrize(
    "step, factor", [(10, 1.0), (40, 1.0), (70, 0.5), (85, 0.25), (99, 1 / 60), (100, 0.0)]
)
def test_trapezoid_by_hand(step, factor):
    assert trapezoid(step, 100, 10, decay=0.6) == pytest.approx(factor)


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 20), (5, 20), (100, 0)])
def test_odd_lengths_still_give_factors_above_zero_and_at_most_one(schedule, steps, warmup):
    assert all(0 < schedule(step, steps, warmup) <= 1 for step in range(steps))
