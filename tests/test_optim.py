"""Optimizers and schedules: parity with torch's Muon, groups by hand, schedules by hand."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

from nanollm.config import UserError
from nanollm.gpt import GPT, GPTConfig
from nanollm.optim import SCHEDULES, Muon, Optimizer, build_optimizer, constant, cosine, trapezoid


def build(model, optimizer="muon", lr=3e-3, muon_lr=0.02, weight_decay=0.1, **how):
    values = {"lr": lr, "muon_lr": muon_lr, "weight_decay": weight_decay}
    return build_optimizer(model, SimpleNamespace(optimizer=optimizer, **values), **how)


def some_gradient(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_gpt(**changes):
    return GPT(GPTConfig(**SMALL | changes))


# --- Muon --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.06), (torch.float32, 1e-4)])
@pytest.mark.parametrize("settings", [(0.02, 0.95, 0.0), (0.1, 0.8, 0.1)])
def test_muon_takes_the_steps_of_torchs_muon(settings, dtype, tolerance, monkeypatch):
    """Both round to bf16, in another order; without rounding they must agree."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.float().clone())
    settings = dict(zip(("lr", "momentum", "weight_decay"), settings))
    shapes = (32, 32), (16, 64), (32, 32), (64, 16)
    ours = [torch.nn.Parameter(some_gradient(s, 50 + i)) for i, s in enumerate(shapes)]
    theirs = copy.deepcopy(ours)
    start = [p.detach().clone() for p in ours]
    reference = {"nesterov": True, "adjust_lr_fn": "original"}
    optimizers = [
        Muon(ours, **settings, dtype=dtype),
        torch.optim.Muon(theirs, **settings, **reference),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_multiplies_in_the_precision_of_the_layers(dtype, monkeypatch):
    """Where bf16 is emulated, its products took more than half of a step."""
    used, model = set(), small_gpt()
    model.compute_dtype = dtype
    optimizer = build(model)
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: used.add(a.dtype) or product(a, b))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert used == {dtype}


def one_parameter(grad, **how):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor(grad)
    return p, Optimizer(torch.optim.SGD([p], 1.0), **how)


def test_a_step_clips_the_norm_clears_the_gradient_and_gives_the_norm_before():
    p, optimizer = one_parameter([3.0, 4.0])
    assert optimizer.step(factor=0.5, grad_clip=1.0) == 5.0
    torch.testing.assert_close(p.detach(), torch.tensor([-0.3, -0.4]))  # half of (0.6, 0.8)
    assert p.grad is None and optimizer.lr == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_refused_save_in_fp16_where_the_scaler_skips_it(bad):
    p, optimizer = one_parameter([bad, 0.0])
    with pytest.raises(UserError, match="the gradient became"):
        optimizer.step()
    p, optimizer = one_parameter([bad, 0.0], scaler=torch.amp.GradScaler("cpu"))
    optimizer.scaler.scale(torch.ones(()))  # makes the scale
    optimizer.step()
    assert p.tolist() == [0, 0] and optimizer.scaler.get_scale() == 2**15


# --- groups ------------------------------------------------------------------------------------
def named_groups(model, optimizer):
    """{name: (kind, lr, decay)}, asserting that each parameter is in exactly one group."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for each in optimizer.optimizers:
        for group in each.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = type(each).__name__, group["lr"], group["weight_decay"]
    return found


@pytest.mark.parametrize("shape", [{"tie_word_embeddings": False}, {"attention_bias": True}])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_each_trained_parameter_is_in_one_group_and_only_matrices_decay(kind, shape):
    model, wanted = small_gpt(**shape), {}
    model.model.embed_tokens.weight.requires_grad_(False)
    for name, p in model.named_parameters():
        by_muon = kind == "muon" and "layers" in name and p.dim() == 2
        optimizer = ("Muon", 0.02) if by_muon else ("AdamW", 3e-3)
        wanted[name] = *optimizer, 0.1 if p.dim() == 2 else 0.0
    del wanted["model.embed_tokens.weight"]
    assert named_groups(model, build(model, kind)) == wanted


def test_layer_decay_halves_the_learning_rate_with_each_layer_below_the_head():
    model = small_gpt(tie_word_embeddings=False)
    groups = named_groups(model, build(model, muon_lr=1.0, lr=1.0, layer_decay=0.5))
    for name, factor in {
        "lm_head.weight": 1,
        "model.norm.weight": 1,
        "model.layers.1.mlp.up_proj.weight": 0.5,
        "model.layers.1.input_layernorm.weight": 0.5,
        "model.layers.0.mlp.up_proj.weight": 0.25,
        "model.layers.0.self_attn.q_norm.weight": 0.25,
        "model.embed_tokens.weight": 0.125,
    }.items():
        assert groups[name][1] == factor, name


def test_a_schedule_multiplies_what_each_group_began_with():
    optimizer = build(small_gpt())
    for factor in (0.5, 0.1):
        optimizer.step(factor)
        rates = sorted({round(g["lr"], 9) for g in optimizer.groups()})
        assert rates == pytest.approx([3e-3 * factor, 0.02 * factor])


def test_a_state_of_other_optimizers_is_refused():
    state = build(small_gpt(), "muon").state_dict()
    with pytest.raises(ValueError):
        build(small_gpt(), "adamw").load_state_dict(state)


# --- schedules ---------------------------------------------------------------------------------
RISE = {0: 0.1, 4: 0.5, 9: 1.0}  # linear over ten steps
BY_HAND = [  # schedule, steps, {step: factor}
    # a quarter: cos 45 degrees; the middle; the floor
    (cosine, 110, {10: 1, 35: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 60: 0.55, 110: 0.1, 500: 0.1}),
    (partial(trapezoid, decay=0.6), 100, {10: 1, 40: 1, 70: 0.5, 85: 0.25, 99: 1 / 60, 100: 0}),
    (constant, 100, {50: 1, 99: 1}),
]


@pytest.mark.parametrize("schedule, steps, factors", BY_HAND)
def test_schedules_by_hand(schedule, steps, factors):
    factors = RISE | factors
    assert {step: schedule(step, steps, 10) for step in factors} == pytest.approx(factors)


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 20), (5, 20), (100, 0)])
def test_odd_lengths_still_give_factors_above_zero_and_at_most_one(schedule, steps, warmup):
    assert all(0 < schedule(step, steps, warmup) <= 1 for step in range(steps))
