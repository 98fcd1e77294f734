"""The scaling law is found again where it is known, and the napkin counts what training takes."""

import json
import math
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import Peak

import train_pretrain
from nanollm import scaling
from nanollm.config import TrainConfig, UserError, parse
from nanollm.gpt import GPT, GPTConfig, count_parameters
from nanollm.logprobs import token_logprobs
from nanollm.optim import build_optimizer

LAW = {"E": 1.2, "A": 300.0, "B": 900.0, "alpha": 0.45, "beta": 0.5}


def surface(law=LAW, noise=0.0):
    """(N, D, L) of four sizes at three budgets."""
    N = [3e4, 6e4, 1e5, 2e5] * 3
    D = [C / 6 / n for C in (2e11, 4e11, 8e11) for n in N[:4]]
    wobble = (1 + noise * torch.randn(12, generator=torch.Generator().manual_seed(0))).tolist()
    return N, D, [scaling.predict(law, n, d) * w for n, d, w in zip(N, D, wobble)]


def slow_objective(law, N, D, L, delta=1e-3):
    """Equation 3 term by term, without logarithms' sums."""
    total = 0.0
    for n, d, loss in zip(N, D, L):
        said = law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]
        r = abs(math.log(said) - math.log(loss))
        total += r * r / 2 if r <= delta else delta * (r - delta / 2)
    return total


def test_the_formula_by_hand():
    law = {"E": 1.0, "A": 100.0, "B": 1000.0, "alpha": 0.5, "beta": 0.5}
    assert scaling.predict(law, 10_000, 1_000_000) == 1 + 1 + 1


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_a_known_law_is_found_again(beta):
    truth = LAW | {"beta": beta}
    assert scaling.fit(*surface(truth), starts=4) == pytest.approx(truth, rel=1e-3)


def test_no_law_nearby_fits_better_and_an_outlier_moves_it_little():
    N, D, L = surface(noise=0.003)
    L[5] *= 1.2
    found = scaling.fit(N, D, L, starts=4)
    least = slow_objective(found, N, D, L)
    assert least <= slow_objective(LAW, N, D, L)
    for key in found:
        for factor in (0.999, 1.001):
            assert slow_objective(found | {key: found[key] * factor}, N, D, L) > least
    said, true = (scaling.predict(law, 4e5, 2e6) for law in (found, LAW))
    assert said == pytest.approx(true, rel=0.02)


def test_the_optimum_is_the_best_of_all_sizes():
    N, D = scaling.optimum(LAW, 1e12)
    assert 6 * N * D == pytest.approx(1e12)
    sizes = [10 ** (k / 1000) for k in range(3000, 8000)]
    assert N == pytest.approx(
        min(sizes, key=lambda n: scaling.predict(LAW, n, 1e12 / 6 / n)), rel=0.01
    )


def test_models_are_trained_once_the_largest_is_held_back_and_the_chart_shows_them(
    monkeypatch, tmp_path
):
    commands, codes = [], iter([3])

    def run(words):
        """Has the loss that LAW says; the first one fails."""
        value = {k: v for k, v in zip(words, words[1:]) if k.startswith("--")}
        commands.append(value)
        folder, channels = Path(value["--out"]), int(value["--channels"])
        folder.mkdir(parents=True, exist_ok=True)
        shape = scaling.shape_with(1, channels // 16, 16, 512)
        loss = scaling.predict(LAW, count_parameters(GPT(shape))[0], int(value["--steps"]) * 512)
        (folder / "result.json").write_text(json.dumps({"val_loss": loss}), encoding="utf-8")
        return next(codes, 0)

    def measure(**settings):
        commands.clear()
        return scaling.main(scaling.Config(out=str(tmp_path), **settings))

    monkeypatch.setattr(scaling.subprocess, "call", run)
    monkeypatch.setattr(scaling, "fit", partial(scaling.fit, starts=2))
    with pytest.raises(UserError, match="exit code 3"):
        measure()
    result = measure()
    assert len(commands) == 13 and result["law"] == pytest.approx(LAW, rel=1e-3)
    for model in [*result["models"], result["held_back"]]:
        assert model["N"] <= result["held_back"]["N"] == 278_944
        assert 6 * model["N"] * model["D"] == pytest.approx(model["C"], rel=0.01)
    chart = ET.fromstring((tmp_path / "isoflop.svg").read_text(encoding="utf-8"))
    assert len([*chart.iter("{http://www.w3.org/2000/svg}circle")]) == 13 + 1  # and one predicted
    assert measure() == result and commands == []
    measure(seed=1)
    assert len(commands) == 13


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, size, optimizer, kv_heads",
    [(torch.float32, 4, "muon", 2), (torch.bfloat16, 2, "adamw", 4)],
)
def test_memory_is_counted_tensor_by_tensor(dtype, size, optimizer, kv_heads, monkeypatch):
    """As on a GPU, where attention is in the layers' precision and its kernel shares heads."""
    monkeypatch.setattr("nanollm.gpt.attention_dtype", lambda device, dtype: dtype)
    shape = GPTConfig(512, 64, 192, 3, 4, kv_heads, 16)
    model, (B, T) = GPT(shape), (8, 64)
    model.compute_dtype, N = dtype, count_parameters(model)[0]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that addresses differ
        return tensor

    tokens = torch.randint(512, (B, T + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = -token_logprobs(model(tokens[:, :-1]), tokens[:, 1:]).mean()
    loss.backward()
    step = build_optimizer(model, TrainConfig(optimizer=optimizer))
    said = scaling.memory(shape, N, B * T, optimizer, size)
    assert said["weights"] == sum(p.nbytes for p in model.parameters())
    assert said["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    step.step()
    state = [s for o in step.optimizers for s in o.state.values()]
    assert said["moments"] == sum(t.nbytes for s in state for t in s.values() if t.dim())
    saved = sum(nbytes for nbytes, _ in kept.values()) + B * T * 512 * size  # logits' gradient
    assert said["activations"] + said["16-bit weights"] == pytest.approx(saved, rel=0.05)


def test_memory_agrees_with_a_run_of_pretraining(tmp_path, monkeypatch):
    """Gradients stand beside activations from the second part of an accumulated batch on."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Mira lives by the old mill. " * 2000, encoding="utf-8")
    flags = "--data book.txt --tokenizer bytes --layers 3 --channels 96 --heads 3 --context 64 "
    flags += "--batch_size 32 --accumulate 2 --steps 2 --eval_tokens 1 --sample_tokens 0 --out run "
    flags += "--device cpu --dtype fp32"
    cfg = parse(train_pretrain.Config, train_pretrain.PRESETS, flags.split())
    with Peak() as measured:
        train_pretrain.main(cfg)
    assert json.loads(Path("run/result.json").read_text())["val_loss"] > 0  # what a law is fit to
    model = train_pretrain.build_model(cfg)[0]
    N = count_parameters(model)[0]
    assert N == count_parameters(GPT(scaling.shape_with(3, 3, 32, model.cfg.vocab_size)))[0]
    said = scaling.memory(model.cfg, N, 16 * 64, "muon", 4)
    assert sum(said.values()) == pytest.approx(measured.peak, rel=0.1)


def test_the_napkin_by_hand():
    """Llama 7B took 82,432 hours of A100s for 1e12 tokens (Touvron et al. 2023, arXiv:2302.13971,
    table 15), at about 45% of their rate.
    """
    found = scaling.main(scaling.Config(parameters=6.7e9, gpu="A100", mfu=0.45, context=2048))
    assert found["A100-days"] == pytest.approx(82_432 / 24, rel=0.05)
    assert found["weights, GB"] == 26.8 and found["moments, GB"] == 53.6
    assert found["A100s that hold it"] == math.ceil(
        (found["all, GB"] - found["activations, GB"]) / (72 - found["activations, GB"])
    )
    assert found["A100s for 30 days"] == math.ceil(found["A100-days"] / 30)
    with pytest.raises(UserError, match="shorter --context"):
        scaling.main(scaling.Config(parameters=7e10, gpu="RTX4090"))
