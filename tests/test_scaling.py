"""The scaling law is found again where it is known, and the napkin counts what training takes."""

import json
import math
import weakref
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_pretrain
from nanollm import scaling
from nanollm.config import TrainConfig, UserError, parse
from nanollm.gpt import GPT, GPTConfig, count_parameters
from nanollm.logprobs import token_logprobs
from nanollm.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
LAW = {"E": 1.2, "A": 300.0, "B": 900.0, "alpha": 0.45, "beta": 0.5}
fit = scaling.fit
SIZES = [3e4, 6e4, 1e5, 2e5]


def surface(law=LAW, noise=0.0):
    """(N, D, L) of four sizes at three budgets."""
    generator = torch.Generator().manual_seed(0)
    N = SIZES * 3
    D = [C / 6 / n for C in (2e11, 4e11, 8e11) for n in SIZES]
    wobble = (1 + noise * torch.randn(12, generator=generator)).tolist()
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
    N, D, L = surface(truth)
    found = fit(N, D, L, starts=4)
    assert found == pytest.approx(truth, rel=1e-3)
    for n, d in ((1e6, 1e7), (1e4, 1e8)):
        assert scaling.predict(found, n, d) == pytest.approx(scaling.predict(truth, n, d), rel=1e-3)


def test_no_law_nearby_fits_better_and_an_outlier_moves_it_little():
    N, D, L = surface(noise=0.003)
    L[5] *= 1.2
    found = fit(N, D, L, starts=4)
    least = slow_objective(found, N, D, L)
    assert least <= slow_objective(LAW, N, D, L)
    for key in found:
        for factor in (0.999, 1.001):
            assert slow_objective(found | {key: found[key] * factor}, N, D, L) > least
    said, true = (scaling.predict(law, 4e5, 2e6) for law in (found, LAW))
    assert said == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("C", [1e12, 6e20])
def test_the_optimum_is_the_best_of_all_sizes(C):
    N, D = scaling.optimum(LAW, C)
    assert 6 * N * D == pytest.approx(C)
    best = min((10 ** (k / 1000) for k in range(3000, 13000)),
               key=lambda n: scaling.predict(LAW, n, C / (6 * n)))  # fmt: skip
    assert N == pytest.approx(best, rel=0.01)


# --- the models ----------------------------------------------------------------------------------


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """The command with flags; each of its runs is listed, and has the loss that LAW says."""
    monkeypatch.chdir(ROOT)

    def call(*flags, code=0):
        commands = []

        def run(words):
            value = {k: v for k, v in zip(words, words[1:]) if k.startswith("--")}
            commands.append(value)
            folder = Path(value["--out"])
            folder.mkdir(parents=True, exist_ok=True)
            N = scaling.parameters_of(int(value["--layers"]), int(value["--channels"]))
            loss = scaling.predict(LAW, N, int(value["--steps"]) * 512)
            (folder / "result.json").write_text(json.dumps({"val_loss": loss}))
            (folder / "config.json").write_text(json.dumps({"vocab_size": 512}))
            return code

        monkeypatch.setattr(scaling.subprocess, "call", run)
        monkeypatch.setattr(scaling, "fit", partial(fit, starts=2))
        flags = ["--out", str(tmp_path), *flags]
        return commands, scaling.main(parse(scaling.Config, scaling.PRESETS, flags))

    return call


def test_models_are_trained_once_the_largest_is_held_back_and_the_chart_shows_them(
    measure, tmp_path, capsys
):
    commands, result = measure()
    assert len(commands) == 13 and result["law"] == pytest.approx(LAW, rel=1e-3)
    assert all(m["N"] < result["held_back"]["N"] for m in result["models"])
    for model in [*result["models"], result["held_back"]]:
        assert 6 * model["N"] * model["D"] == pytest.approx(model["C"], rel=0.01)
    assert "+0.0%" in capsys.readouterr().out.split("held back")[0].splitlines()[-2]
    chart = ET.fromstring((tmp_path / "isoflop.svg").read_text(encoding="utf-8"))
    dots = list(chart.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 13
    again, same = measure()
    assert again == [] and same == result
    assert len(measure("--seed", "1")[0]) == 13


def test_a_run_that_fails_is_not_counted_as_done(measure):
    with pytest.raises(UserError, match="exit code 3"):
        measure(code=3)
    assert len(measure()[0]) == 13


def test_the_shapes_are_those_that_pretraining_makes():
    cfg = train_pretrain.Config(tokenizer="bytes", layers=2, channels=80, heads=5, context=128)
    model = train_pretrain.build_model(cfg)[0]
    more = (scaling.VOCAB - model.cfg.vocab_size) * 80
    assert scaling.parameters_of(2, 80) == count_parameters(model)[0] + more == 215_504


# --- memory --------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
             num_attention_heads=4, head_dim=16, max_position_embeddings=64)  # fmt: skip


@pytest.mark.parametrize(
    "dtype, size, optimizer, kv_heads",
    [
        (torch.float32, 4, "adamw", 4),
        (torch.float32, 4, "muon", 2),
        (torch.bfloat16, 2, "adamw", 4),
        (torch.bfloat16, 2, "muon", 2),
    ],
)
def test_memory_is_counted_tensor_by_tensor(dtype, size, optimizer, kv_heads, monkeypatch):
    """As on a GPU, where attention is in the layers' precision and its kernel shares heads."""
    monkeypatch.setattr("nanollm.gpt.attention_dtype", lambda device, dtype: dtype)
    shape = GPTConfig(**SHAPE, num_key_value_heads=kv_heads)
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
    optimizer_ = build_optimizer(model, TrainConfig(optimizer=optimizer))
    gradients = sum(p.grad.nbytes for p in model.parameters())
    optimizer_.step()
    state = [s for o in optimizer_.optimizers for s in o.state.values()]
    moments = sum(t.nbytes for s in state for t in s.values() if t.dim())
    said = scaling.memory(shape, N, B * T, optimizer, size)
    assert said["weights"] == sum(p.nbytes for p in model.parameters())
    assert said["gradients"] == gradients and said["moments"] == moments
    logits_gradient = B * T * 512 * size
    saved = sum(nbytes for nbytes, *_ in kept.values()) + logits_gradient
    assert said["activations"] + said["16-bit weights"] == pytest.approx(saved, rel=0.05)


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those that are made within."""

    alive, peak = 0, 0

    def __init__(self):
        super().__init__()
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = weakref.finalize(
                        storage, self.freed, storage._cdata, storage.nbytes()
                    )
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
        return out

    def freed(self, key, nbytes):
        self.alive -= nbytes
        del self.known[key]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_agrees_with_a_run_of_pretraining(checkpointed, tmp_path, monkeypatch):
    """Gradients stand beside activations from the second part of an accumulated batch on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Mira lives by the old mill. " * 2000, encoding="utf-8")
    flags = "--data book.txt --tokenizer bytes --layers 3 --channels 96 --heads 3 --context 64 "
    flags += "--batch_size 32 --accumulate 2 --steps 2 --eval_tokens 1 --sample_tokens 0 --out run "
    flags += "--device cpu --dtype fp32" + " --checkpoint_activations" * checkpointed
    cfg = parse(train_pretrain.Config, train_pretrain.PRESETS, flags.split())
    seen = []
    build = train_pretrain.build_model
    monkeypatch.setattr(
        train_pretrain, "build_model", lambda cfg: seen.append(build(cfg)) or seen[0]
    )
    with Peak() as measured:
        train_pretrain.main(cfg)
    model = seen[0][0]
    assert json.loads(Path("run/result.json").read_text())["val_loss"] > 0  # what a law is fit to
    N = count_parameters(model)[0]
    said = scaling.memory(model.cfg, N, 16 * 64, "muon", 4, checkpointed)
    assert sum(said.values()) == pytest.approx(measured.peak, rel=0.1)


def test_the_napkin_by_hand(capsys):
    """Llama 7B took 82,432 hours of A100s for 1e12 tokens (Touvron et al. 2023, arXiv:2302.13971,
    table 15), at about 45% of their rate.
    """
    flags = "--parameters 6.7e9 --tokens 1e12 --gpu A100 --mfu 0.45 --context 2048".split()
    found = scaling.main(parse(scaling.Config, scaling.PRESETS, flags))
    kept, checkpointed = found["kept"], found["checkpointed"]
    assert kept["A100-days"] == pytest.approx(82_432 / 24, rel=0.05)
    assert kept["weights, GB"] == 26.8 and kept["moments, GB"] == 53.6
    assert checkpointed["activations, GB"] < kept["activations, GB"] / 5
    assert checkpointed["A100s that hold it"] == 2 < kept["A100s that hold it"]
    assert kept["A100s for 30 days"] == math.ceil(kept["A100-days"] / 30)


def test_a_gpu_that_is_too_small_for_its_rows_holds_nothing(capsys):
    flags = "--parameters 7e10 --gpu L4 --rows 8".split()
    found = scaling.main(parse(scaling.Config, scaling.PRESETS, flags))
    assert found["kept"]["L4s that hold it"] is None is found["kept"]["L4s for 30 days"]
