"""NF4: weights of four bits, dequantised whenever they are needed (QLoRA).

    w = code[q] * absmax            q four bits, one absmax per block of 64 weights
    absmax = map[q8] * absmax2 + offset            q8 eight bits, one absmax2 per 256 blocks

The 16 codes are quantiles of a normal distribution, 0 among them; offset is the mean of all absmax.
4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight (Dettmers et al. 2023, QLoRA, arXiv:2305.14314,
section 3). The 8-bit map is dynamic: the leading zeros of its bits say the exponent, what is left
the fraction (Dettmers 2015, arXiv:1511.04561). Codes and values equal those of bitsandbytes.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.gpt import Linear

BLOCK, ABSMAX_BLOCK = 64, 256
CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
PAIRS = torch.stack((CODE.repeat_interleave(16), CODE.repeat(16)), 1)  # (256, 2): of each byte


def dynamic_map():
    """The 256 values of the 8-bit code, sorted: for each exponent e from -6 to 0 the middles of
    2^(e + 6) equal parts of (0.1, 1), times 10^e, with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for e in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (e + 6) + 1)
        middles = 10**e * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


MAP = dynamic_map()


class Quantised(NamedTuple):
    """A weight in NF4; the second of two codes lies in the low half of its byte."""

    codes: torch.Tensor  # (n / 2,) uint8
    absmax: torch.Tensor  # (n / 64,) uint8
    absmax2: torch.Tensor  # (n / 64 / 256,) fp32
    offset: torch.Tensor  # () fp32


def scaled_blocks(x, block):
    """(x / absmax, absmax) of each block: x of any shape with n values -> (n,), (n / block,). The
    last block may be short.
    """
    blocks = F.pad(x.reshape(-1), (0, -x.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    return scaled.view(-1)[: x.numel()], absmax


def nearest(scaled, values):
    """Number of the nearest of the sorted `values`, uint8, for each of `scaled`."""
    middles = ((values[:-1] + values[1:]) / 2).to(scaled.device)
    return torch.bucketize(scaled, middles).to(torch.uint8)


def quantise(weight):
    """Quantised form of a weight of any shape with n values, an even number."""
    scaled, absmax = scaled_blocks(weight.detach().float(), BLOCK)
    codes = nearest(scaled, CODE)
    offset = absmax.mean()
    scaled, absmax2 = scaled_blocks(absmax - offset, ABSMAX_BLOCK)
    # bitsandbytes' CPU build looks eight bits up in a table of 2^16 values from -1 to 1
    steps = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()
    absmax = nearest(-1 + 2 * steps / 65535, MAP)
    absmax[absmax2.repeat_interleave(ABSMAX_BLOCK)[: len(absmax)] == 0] = 0
    return Quantised(codes[::2] << 4 | codes[1::2], absmax, absmax2, offset)


def dequantise(q, shape):
    """The weight in fp32, of this shape."""
    absmax = MAP.to(q.codes.device)[q.absmax.int()]
    absmax = absmax * q.absmax2.repeat_interleave(ABSMAX_BLOCK)[: len(absmax)] + q.offset
    values = F.embedding(q.codes.int(), PAIRS.to(q.codes.device)).view(-1)  # (n,)
    padded = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) * absmax[:, None]
    return padded.view(-1)[: shape.numel()].view(shape)


class _Product(torch.autograd.Function):
    """x W^T, keeping four bits per weight for the backward pass, which dequantises them again."""

    @staticmethod
    def forward(ctx, x, shape, *quantised):
        ctx.shape = shape
        ctx.save_for_backward(*quantised)
        return F.linear(x, dequantise(Quantised(*quantised), shape).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        weight = dequantise(Quantised(*ctx.saved_tensors), ctx.shape).to(grad.dtype)
        return grad @ weight, None, None, None, None, None


class NF4Linear(nn.Module):
    """A linear layer with its weight frozen in NF4; x (..., in) -> (..., out)."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = self.shape = linear.weight.shape
        self.bias = linear.bias
        for name, tensor in quantise(linear.weight)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def quantised(self):
        return Quantised(*(getattr(self, name) for name in Quantised._fields))

    @property
    def weight(self):
        """Dequantised, (out, in) fp32."""
        return dequantise(self.quantised, self.shape)

    def forward(self, x):
        y = _Product.apply(x, self.shape, *self.quantised)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def plain(self, merged):
        """Itself, or with `merged` a Linear that computes the same."""
        return dense(self.weight, self.bias) if merged else self


def dense(weight, bias):
    """A Linear, frozen, with this weight (out, in)."""
    linear = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear
