"""Norms under a mask: statistics are of the visible positions, and the output is zero at hidden ones.

For the backward pass a norm keeps its input, as a norm without a mask does. Statistics are at least in fp32.

A rule takes the context, the function, and the function's own arguments. Shapes: b batch, c channels, g groups, *size
positions per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyspark.models.masking.masked_functions import Function, identity, mixing_error

if TYPE_CHECKING:
    from hyspark.models.masking.context import hidden


class MaskedNorm(torch.autograd.Function):
    """Normalisation of visible positions by statistics over some axes, with weight and bias.

    Args:
        x: (b, ..., *size).
        weight: broadcasts over x, or None.
        bias: broadcasts over x, or None.
        mask: bool, broadcasts over x.
        num: number of visible values of each statistic in this process, broadcasts over x.
        over: axes of the statistics.
        eps: added to the variance.
        all_reduce: sum of a tensor over all processes.

    Returns:
        The normalised map, zero at hidden positions, mean, variance, and the number of values in all processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor,
        num: Tensor,
        over: tuple[int, ...],
        eps: float,
        all_reduce: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = at_least_fp32(x)
        total = torch.where(mask, values, 0.0).sum(over, keepdim=True)
        sums = all_reduce(torch.cat([total.flatten(), num.flatten().to(total)]))
        num = sums[total.numel() :].view(num.shape)
        mean = sums[: total.numel()].view(total.shape) / num
        centred = torch.where(mask, values - mean, 0.0)
        squares = torch.linalg.vector_norm(centred, dim=over, keepdim=True).square()
        variance = all_reduce(squares.flatten()).view(squares.shape) / num
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mask, mean, inverse, num)
        ctx.over, ctx.all_reduce = over, all_reduce
        ctx.mark_non_differentiable(mean, variance, num)
        out = centred.mul_(inverse if weight is None else inverse * weight)
        if bias is not None:
            out = torch.where(mask, out.add_(bias), 0.0)
        return out.to(x.dtype), mean, variance, num

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, bias, mask, mean, inverse, num = ctx.saved_tensors
        gradient = torch.where(mask, at_least_fp32(gradient), 0.0)
        normed = torch.where(mask, at_least_fp32(x) - mean, 0.0).mul_(inverse)
        products = gradient * normed
        of_weight = None if weight is None else products.sum_to_size(weight.shape).to(weight.dtype)
        of_bias = None if bias is None else gradient.sum_to_size(bias.shape).to(bias.dtype)
        if weight is not None:
            gradient, products = gradient.mul_(weight), products.mul_(weight)
        of_mean = ctx.all_reduce(gradient.sum(ctx.over, keepdim=True)) / num
        of_variance = ctx.all_reduce(products.sum(ctx.over, keepdim=True)) / num
        of_x = gradient.sub_(normed.mul_(of_variance)).sub_(of_mean).mul_(inverse)
        return torch.where(mask, of_x, 0.0).to(x.dtype), of_weight, of_bias, *(None,) * 5


def masked_batch_norm(
    context: hidden,
    func: Function,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise by statistics of the visible positions of the batch.

    Tensors that are no map (vectors, weights to standardise) are normalised as usual.
    """
    is_map = context.is_map(input)
    if not training or (not is_map and not context.is_distributed):
        out: Tensor = func(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return context.fill(out) if is_map else out
    mask = context.mask(tuple(input.shape[2:])) if is_map else torch.ones_like(input[:, :1], dtype=torch.bool)
    visible = mask.sum()
    if not context.is_distributed and mask.numel() <= context.visible.numel() and int(visible) == 1:
        raise ValueError("batch_norm: expected more than one visible position per channel in training, got one")
    affine = (None if x is None else per_channel(x, input) for x in (weight, bias))
    over = (0, *range(2, input.ndim))
    normed, mean, variance, num = MaskedNorm.apply(input, *affine, mask, visible, over, eps, context.all_reduce)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.flatten().to(running_mean), momentum)
        running_var.lerp_((variance.flatten() * (num / (num - 1))).to(running_var), momentum)
    result: Tensor = normed
    return result


def masked_group_norm(
    context: hidden,
    func: Function,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise by statistics of each sample and group over its visible positions."""
    if not context.is_map(input):
        out: Tensor = func(input, num_groups, weight, bias, eps)
        return out
    groups = input.unflatten(1, (num_groups, -1))  # (b, g, c / g, *size)
    mask, over = context.mask(tuple(input.shape[2:])).unsqueeze(1), tuple(range(2, groups.ndim))
    num = mask.sum(over, keepdim=True) * groups.shape[2]
    affine = (None if x is None else per_channel(x, input).unflatten(1, (num_groups, -1)) for x in (weight, bias))
    normed, *_ = MaskedNorm.apply(groups, *affine, mask, num, over, eps, identity)
    return normed.flatten(1, 2)


def masked_instance_norm(
    context: hidden,
    func: Function,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise by statistics of each sample and channel over its visible positions."""
    if not context.is_map(input) or (use_input_stats and running_mean is not None):
        raise mixing_error(func)
    if not use_input_stats:
        return context.fill(func(input, running_mean, running_var, weight, bias, False, momentum, eps))
    return masked_group_norm(context, F.group_norm, input, input.shape[1], weight, bias, eps)


def masked_layer_norm(
    context: hidden, func: Function, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor:
    """Normalise over channels, position by position; hidden positions of a channels-last map become zero."""
    out: Tensor = func(input, normalized_shape, *args, **kwargs)
    if len(normalized_shape) > 1 and context.spatial_axes(input):
        raise mixing_error(func)
    if len(normalized_shape) == 1 and context.is_map(input.movedim(-1, 1)):
        mask = context.mask(tuple(input.shape[1:-1])).movedim(1, -1)
        return torch.where(mask, out, 0.0)
    return out


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert 16-bit tensors to fp32, the lowest precision of statistics."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape values (c,) so that they broadcast over a map (b, c, *size)."""
    return values.view(1, -1, *(1,) * (x.ndim - 2))
