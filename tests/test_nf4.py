"""NF4: equal to bitsandbytes in every bit, small in memory, right in backward."""

import pytest
import torch

from nanollm.gpt import Linear
from nanollm.peft import nf4

SHAPES = [(64, 64), (8, 2048), (256, 384), (3, 64), (96, 40), (1, 64 * 256 * 3 + 64)]


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles what it computes on a CPU, for longer than it then takes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_absmax_and_values_equal_those_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[1]))
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = nf4.quantise(weight)
    assert torch.equal(ours.codes, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.absmax2, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantise(ours, weight.shape), theirs.view(shape))


def test_both_codes_equal_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(nf4.MAP, functional.create_dynamic_map())
    assert torch.equal(nf4.CODE, functional.get_4bit_type("nf4", device="cpu"))


def test_each_code_comes_back_as_itself():
    weight = nf4.CODE.repeat(4)  # one block, whose largest value is 1
    assert torch.equal(nf4.dequantise(nf4.quantise(weight), weight.shape), weight)


def test_weights_of_zero_stay_zero():
    assert nf4.dequantise(nf4.quantise(torch.zeros(8, 64)), torch.Size((8, 64))).eq(0).all()


def test_a_weight_takes_4_127_bits():
    layer = nf4.NF4Linear(Linear(1024, 1024, bias=False))
    bits = 8 * sum(t.numel() * t.element_size() for t in layer.buffers()) / layer.shape.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_the_layer_computes_with_its_dequantised_weight_forwards_and_backwards():
    torch.manual_seed(0)
    layer = nf4.NF4Linear(Linear(24, 40, bias=True))
    x, grad = torch.randn(2, 3, 24, requires_grad=True), torch.randn(2, 3, 40)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), x, grad)[0], torch.autograd.grad(expected, x, grad)[0]
    )


def test_backward_keeps_no_dequantised_weight():
    layer = nf4.NF4Linear(Linear(256, 256, bias=False))
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(1, 256, requires_grad=True))
    assert 0 < sum(kept) < 256 * 256 * 4.2 / 8
