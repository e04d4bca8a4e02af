"""Convolutions of packed patches: a border from the neighbours, then a convolution without padding.

For the backward pass only the patches are kept; the border is copied again. Where a patch has few voxels, the
convolution is one matrix product, or that of the dense map, whichever was measured to be faster.

Shapes: b batch, c channels, p visible patches of the whole batch, *edges voxels per axis of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyspark.models.masking.borders import Widths, add_border, add_border_gradient, pack_with_border
from hyspark.models.masking.masked_functions import Function, masked_convolution, mixing_error
from hyspark.models.masking.rules import RULES
from hyspark.models.recompute import recomputed

if TYPE_CHECKING:
    from hyspark.models.masking.packed import packed

Options = tuple[list[int], list[int], list[int]]
"""Stride, padding and dilation of a convolution, each with one number per axis."""
MAX_PRODUCT_ROWS = 2
"""Output voxels (of all patches) per input channel up to which a convolution is one matrix product. Measured at 256 to
512 channels: the product takes half of the time at .4 rows per channel, and the same at 2.
"""
MAX_POINTWISE_VOXELS = 64
"""Output voxels of a patch up to which a convolution of kernel 1 is one matrix product. Measured: a tenth of the time
for patches of one voxel, .7 of it for 8^2, nearly the same for 4^3, and 1.4 times as long for 8^3.
"""
MAX_BORDER = 2.2
"""Voxels with border to those without, times the visible fraction, up to which a grouped convolution is of patches.
Measured for depthwise convolutions: patches take half of the time at 1.2, as long at 2.3, and twice as long at 7.
"""


# --- borders


def windows(
    context: packed, func: Function, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, is_ceil: bool
) -> tuple[list[int], list[int], bool]:
    """Compute the border that patches need for the windows of a convolution or pool.

    Returns:
        Number of voxels before and after each axis, and whether the direct neighbours hold them all.

    Raises:
        ValueError: the stride does not divide the patch, or the size of the output is not size / stride.
    """
    edges = tuple(context.register(x).shape[2:])
    kernels, strides, dilations = (per_axis(value, context.axes) for value in (kernel, stride, dilation))
    reach = [d * (k - 1) + 1 for k, d in zip(kernels, dilations, strict=True)]
    if padding == "same":
        before = [(r - 1) // 2 for r in reach]
    else:
        before = per_axis(0 if padding == "valid" else padding, context.axes)
    rounded = math.ceil if is_ceil else math.floor
    for edge, r, s, b in zip(edges, reach, strides, before, strict=True):
        if edge % s:
            raise ValueError(
                f"patch of {context.patch} voxels: expected a multiple of the network's total stride, but a patch of "
                f"{edge} at this resolution is not divisible by a stride of {s}"
            )
        if rounded((2 * b - r) / s) != -1 and padding != "same":
            raise ValueError(f"{func.__name__}: expected padding that gives size / stride outputs, got padding {b}")
    after = [max(0, r - s - b) for r, s, b in zip(reach, strides, before, strict=True)]
    return before, after, all(max(b, a) <= edge for b, a, edge in zip(before, after, edges, strict=True))


def per_axis(value: Any, axes: int) -> list[int]:
    """Expand a number, or a sequence of one, to all spatial axes."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def add_windows_border(
    context: packed, x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0
) -> Tensor:
    """Add a border to patches (p, c, *edges), of any width."""
    if not any((*before, *after)):
        return x
    edges = tuple(x.shape[2:])
    if all(max(b, a) <= edge for b, a, edge in zip(before, after, edges, strict=True)):
        return context.patches.with_border(x, before, after, value)
    dense = context.patches.unpack(x, x.new_full((1, x.shape[1], *(1,) * context.axes), value))
    return pack_with_border(dense, context.patches, (tuple(before), tuple(after)), value)


def check_no_padding(context: packed, func: Function, padding: Any) -> None:
    """Raise NotImplementedError for a second padding, after `F.pad`."""
    if padding != "valid" and any(per_axis(padding, context.axes)):
        raise mixing_error(func)


def check_outputs(context: packed, func: Function, x: Tensor, out: Tensor, stride: Any) -> Tensor:
    """Register the output for patches that were padded before; ValueError if its size is not edge / stride."""
    expected = [edge / s for edge, s in zip(x.has_border, per_axis(stride, context.axes), strict=True)]  # type: ignore[attr-defined]
    if list(out.shape[2:]) != expected:
        raise ValueError(
            f"{func.__name__}: expected padding that gives size / stride outputs, got patches of "
            f"{tuple(out.shape[2:])} from {x.has_border}"  # type: ignore[attr-defined]
        )
    return context.register(out)


def on_dense_map(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a function of a map on the dense map, by the rule of `hidden`."""
    out: Tensor = RULES[func](context.dense, func, context.unpack(input), *args, **kwargs)
    return context.register(context.patches.pack(out))


# --- convolutions


def packed_convolution(
    context: packed,
    func: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve patches with a border from their neighbours."""
    if hasattr(input, "has_border"):
        check_no_padding(context, func, padding)
        return check_outputs(context, func, input, func(input, weight, bias, stride, 0, dilation, groups), stride)
    if not context.is_map(input):
        return masked_convolution(context, func, input, weight, bias, stride, padding, dilation, groups)
    before, after, fits = windows(context, func, input, weight.shape[2:], stride, padding, dilation, False)
    strides, dilations = per_axis(stride, context.axes), per_axis(dilation, context.axes)
    if not fits or (groups > 1 and is_dense_faster(context, input, before, after)):
        dense = func(context.unpack(input), weight, bias, stride, padding, dilation, groups)
        return context.register(context.patches.pack(dense))
    if groups == 1 and set(dilations) == {1} and is_product_faster(input, weight, strides):

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return multiply_windows(add_windows_border(context, x, before, after), weight, bias, strides)

        if math.prod(weight.shape[2:]) == math.prod(strides) == 1:  # its windows are the patches themselves
            return context.register(multiply(input, weight, bias))
        return context.register(recomputed(multiply, input, weight, bias))
    if not any((*before, *after)):
        return context.register(func(input, weight, bias, stride, 0, dilation, groups))
    widths, options = (tuple(before), tuple(after)), (strides, [0] * context.axes, dilations)
    return context.register(convolve_with_border(context, func, input, weight, bias, widths, options, groups))


def is_product_faster(x: Tensor, weight: Tensor, strides: Sequence[int]) -> bool:
    """Whether a convolution of patches has so few windows, or so small ones, that one matrix product is faster."""
    per_patch = math.prod([edge // s for edge, s in zip(x.shape[2:], strides, strict=True)])
    if math.prod(weight.shape[2:]) == 1:
        return per_patch <= MAX_POINTWISE_VOXELS
    return per_patch == 1 or per_patch * len(x) <= MAX_PRODUCT_ROWS * x.shape[1]


def is_dense_faster(context: packed, x: Tensor, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a grouped convolution of the dense map is faster than one of patches with border."""
    edges = x.shape[2:]
    ratio = math.prod([(b + e + a) / e for b, e, a in zip(before, edges, after, strict=True)])
    return ratio * len(x) > MAX_BORDER * context.patches.visible.numel()


def multiply_windows(x: Tensor, weight: Tensor, bias: Tensor | None, strides: Sequence[int]) -> Tensor:
    """Convolve patches with border (p, c, *sizes) without padding, as a product of all windows with the weights."""
    kernels = weight.shape[2:]
    for axis, (kernel, stride) in enumerate(zip(kernels, strides, strict=True), start=2):
        x = x.unfold(axis, kernel, stride)  # (p, c, *edges, *kernels)
    x = x.movedim(1, -1)
    size = x.shape[: 1 + len(kernels)]
    out = F.linear(x.reshape(math.prod(size), -1), weight.movedim(1, -1).flatten(1), bias)
    return out.view(*size, -1).movedim(-1, 1)


def convolve_with_border(
    context: packed,
    func: Function,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    options: Options,
    groups: int,
) -> Tensor:
    """Convolve patches with border; torch.compile decides by itself what to keep for the backward pass."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        plain: Tensor = func(context.patches.with_border(x, *widths), weight, bias, *options, groups)
        return plain
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    indices = context.patches.border_indices(tuple(x.shape[2:]), widths)
    out: Tensor = BorderConvolution.apply(x, weight, bias, *indices, widths, options, groups)
    return out


class BorderConvolution(torch.autograd.Function):
    """Convolution of patches with border that keeps only the patches for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        source: Tensor,
        widths: Widths,
        options: Options,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, target, source)
        ctx.widths, ctx.options = widths, (*options, False, [0] * len(options[0]), groups)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        with torch.autocast(x.device.type, enabled=False):
            return torch.convolution(add_border(x, target, source, widths), weight, bias, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, target, source = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        padded = add_border(x, target, source, ctx.widths)
        with torch.autocast(x.device.type, enabled=False):
            of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
                gradient, padded, weight, ctx.bias_sizes, *ctx.options, wanted
            )
        if wanted[0]:
            of_x = add_border_gradient(of_x, target, source, ctx.widths)
        return of_x, of_weight, of_bias, *(None,) * 5


def packed_transposed_convolution(
    context: packed,
    func: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """Convolve patches transposed; an output of a patch that reads its neighbours is computed on the dense map."""
    if not context.is_map(input):
        out: Tensor = RULES[func](context, func, input, weight, bias, stride, padding, output_padding, groups, dilation)
        return out
    context.register(input)
    is_local = list(weight.shape[2:]) == per_axis(stride, context.axes)
    if is_local and not any((*per_axis(padding, context.axes), *per_axis(output_padding, context.axes))):
        return context.register(func(input, weight, bias, stride, 0, 0, groups, dilation))
    return on_dense_map(context, func, input, weight, bias, stride, padding, output_padding, groups, dilation)
