"""Log-probabilities, entropy: parity with torch, and numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanollm import logprobs
from nanollm.logprobs import entropy, token_logprobs


def some_logits(dtype=torch.float32, shape=(2, 5, 7)):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def test_logprobs_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    p = token_logprobs(logits, torch.tensor([0, 0])).exp()
    assert p.tolist() == pytest.approx([0.5, 0.75])


# 10 rows of 7 logits, hence in parts of 1 (2 ways), 3 (the last part being shorter), 5, and all
@pytest.mark.parametrize("chunk", [1, 7, 22, 35, 2**21])
def test_values_and_gradients_equal_cross_entropys(chunk, monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK, "cpu", chunk)
    (ours, targets), (theirs, _) = some_logits(), some_logits()
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    a = token_logprobs(ours, targets)
    losses = F.cross_entropy(theirs.reshape(-1, 7), targets.reshape(-1), reduction="none")
    b = -losses.view(targets.shape)
    assert a.shape == targets.shape
    assert torch.allclose(a, b, atol=1e-6, rtol=1e-6)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert torch.equal(ours, theirs)  # the logits are left as they were


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_half_precision_logits_are_reduced_in_fp32(dtype, tolerance):
    logits, targets = some_logits(dtype)
    exact = logits.detach().float().requires_grad_()
    ours = token_logprobs(logits, targets)
    theirs = exact.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    assert logits.grad.dtype == dtype
    assert torch.allclose(logits.grad.float(), exact.grad, atol=1e-6, rtol=tolerance)


def test_huge_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]], requires_grad=True)
    value = token_logprobs(logits, torch.tensor([1]))
    value.sum().backward()
    assert value.item() == pytest.approx(-math.log(1 + math.e), abs=1e-3)
    assert logits.grad[0].tolist() == pytest.approx([-0.7311, 0.7311, 0.0], abs=1e-3)


@pytest.mark.parametrize(
    "logits, nats",
    [
        ([0.0] * 8, math.log(8)),  # uniform
        ([5.0, 5.0], math.log(2)),
        ([100.0, 0.0, 0.0], 0.0),  # certain
        ([math.log(3.0), 0.0], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    ],
)
def test_entropy_by_hand(logits, nats):
    assert entropy(torch.tensor([[logits]])).item() == pytest.approx(nats, abs=1e-6)


def test_entropy_equals_torchs():
    logits, _ = some_logits(torch.bfloat16)
    theirs = torch.distributions.Categorical(logits=logits.float()).entropy()
    assert entropy(logits).dtype == torch.float32
    assert torch.allclose(entropy(logits), theirs, atol=1e-6)
