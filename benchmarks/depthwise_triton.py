"""Triton kernels of the depthwise 3^3 convolution on channels-last maps with a border: forward and both gradients.

A position is a row of c channels. The map has n * e1 * e2 * e3 positions, its bordered input n * (e1 + 2) * ...
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 64, 32
"""Positions and channels that a program holds at once."""
CHUNK = 16
"""Blocks of positions that a program sums for the gradient of the weight."""


@triton.jit
def position(row, d, h, w):  # type: ignore[no-untyped-def]
    """Sample and place of a row in maps of d * h * w positions."""
    return row // (d * h * w), row // (h * w) % d, row // w % h, row % w


@triton.jit
def correlate(  # type: ignore[no-untyped-def]
    source,
    weight,
    target,
    rows,
    c,
    d,
    h,
    w,
    sd,
    sh,
    sw,
    border,
    flip,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """target[p] = sum over k of weight[k] * source[p + k - border]; what lies outside the source is zero.

    d, h, w: of the target; sd, sh, sw: of the source. flip: 26 runs through the weights backwards, 0 forwards.
    """
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    n, z, y, x = position(row, d, h, w)
    total = tl.zeros((block_rows, block_channels), tl.float32)
    for k in range(27):
        a, b, e = z + k // 9 - border, y + k // 3 % 3 - border, x + k % 3 - border
        inside = (row < rows) & (a >= 0) & (a < sd) & (b >= 0) & (b < sh) & (e >= 0) & (e < sw)
        place = (((n * sd + a) * sh + b) * sw + e).to(tl.int64)
        mask = inside[:, None] & (channel < c)[None, :]
        tile = tl.load(source + place[:, None] * c + channel[None, :], mask, 0.0)
        tap = tl.load(weight + tl.abs(flip - k) * c + channel, channel < c, 0.0)
        total += tile.to(tl.float32) * tap.to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (channel < c)[None, :]
    tl.store(target + row.to(tl.int64)[:, None] * c + channel[None, :], total.to(target.dtype.element_ty), mask)


@triton.jit
def weight_gradient(  # type: ignore[no-untyped-def]
    source, gradient, partial, rows, c, d, h, w, blocks, block_rows: tl.constexpr, block_channels: tl.constexpr
):
    """partial[program, k] = sum over its positions p of gradient[p] * source[p + k]; the source has the border."""
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    tap = tl.program_id(2)
    total = tl.zeros((block_channels,), tl.float32)
    for block in range(blocks):
        row = (tl.program_id(0) * blocks + block) * block_rows + tl.arange(0, block_rows)
        n, z, y, x = position(row, d, h, w)
        place = (((n * (d + 2) + z + tap // 9) * (h + 2) + y + tap // 3 % 3) * (w + 2) + x + tap % 3).to(tl.int64)
        mask = (row < rows)[:, None] & (channel < c)[None, :]
        there = tl.load(source + place[:, None] * c + channel[None, :], mask, 0.0).to(tl.float32)
        here = tl.load(gradient + row.to(tl.int64)[:, None] * c + channel[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(there * here, 0)
    tl.store(partial + (tl.program_id(0) * 27 + tap) * c + channel, total, channel < c)


class Depthwise(torch.autograd.Function):
    """(n, c, e1 + 2, e2 + 2, e3 + 2), (c, 1, 3, 3, 3) -> (n, c, e1, e2, e3), channels last in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.movedim(1, -1).contiguous()
        taps = weight.flatten(1).t().contiguous()  # (27, c)
        ctx.save_for_backward(rows, taps)
        n, *bordered, c = rows.shape
        out = rows.new_empty(n, *(s - 2 for s in bordered), c)
        launch(rows, taps, out, border=0, flip=0)
        return out.movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, taps = ctx.saved_tensors
        gradient = gradient.movedim(1, -1).contiguous()
        to_input = torch.empty_like(rows)
        launch(gradient, taps, to_input, border=2, flip=26)
        n, d, h, w, c = gradient.shape
        count = n * d * h * w
        programs = triton.cdiv(count, ROWS * CHUNK)
        partial = torch.empty(programs, 27, c, dtype=torch.float32, device=rows.device)
        grid = (programs, triton.cdiv(c, CHANNELS), 27)
        weight_gradient[grid](
            rows, gradient, partial, count, c, d, h, w, CHUNK, block_rows=ROWS, block_channels=CHANNELS
        )
        to_weight = partial.sum(0).to(taps.dtype).t().reshape(c, 1, 3, 3, 3)
        return to_input.movedim(-1, 1), to_weight


def launch(source: Tensor, taps: Tensor, target: Tensor, border: int, flip: int) -> None:
    """Correlate (n, d, h, w, c) maps."""
    n, *size, c = target.shape
    count = n * size[0] * size[1] * size[2]
    grid = (triton.cdiv(count, ROWS), triton.cdiv(c, CHANNELS))
    sizes = (*size, *source.shape[1:4])
    correlate[grid](source, taps, target, count, c, *sizes, border, flip, block_rows=ROWS, block_channels=CHANNELS)
