"""Convolutions, pools and norms under a mask.

A hidden position counts as one outside the map. A convolution reads zero there, a maximum ignores it, and averages and
statistics are taken over the other positions. The output is zero at hidden positions. With all positions visible each
rule equals the function. For the backward pass the rules keep the function's input, not the masked copy.

A rule takes the context, the function, and the function's own arguments. Shapes: b batch, c channels, *size positions
per axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from hyspark.models.recompute import recomputed

if TYPE_CHECKING:
    from hyspark.models.masking.context import hidden

Function = Callable[..., Any]


def mixing_error(func: Function) -> NotImplementedError:
    """Create the error for a function without a rule."""
    return NotImplementedError(
        f"{resolve_name(func) or func} mixes positions, and its form for visible positions only is not known here; if "
        "this network does not apply it along positions, declare it safe: hidden(visible, safe=[...])"
    )


def set_flag(out: Any, flag: str) -> Any:
    """Set a flag of a tensor: `is_pooled`, without positions, or `has_border`, padded."""
    if isinstance(out, Tensor):
        setattr(out, flag, True)
    return out


# --- convolutions and pools


def masked_convolution(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Convolve a map; a convolution along fewer axes works on something else, such as channels, and is unchanged."""
    if not context.is_map(input):
        if context.is_flat_map(input, -1):
            raise mixing_error(func)
        plain: Tensor = func(input, *args, **kwargs)
        return plain
    is_filled = context.is_padded(input)

    def convolve(x: Tensor, *args: Any) -> Tensor:
        return context.fill(func(x if is_filled else context.fill(x), *args, **kwargs))

    out: Tensor = recomputed(convolve, input, *args)
    return out


def masked_max_pool(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take the largest of the visible positions in each window."""
    if not context.is_map(input):
        raise mixing_error(func)
    is_filled = context.is_padded(input)

    def pool(x: Tensor) -> Tensor:
        return context.fill(func(x if is_filled else context.fill(x, -math.inf), *args, **kwargs))

    out: Tensor = recomputed(pool, input)
    return out.masked_fill(out == -math.inf, 0.0) if context.is_divided(out) else out


def masked_avg_pool(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Average the visible positions in each window; the function's arguments decide whether padding counts."""
    if not context.is_map(input):
        raise mixing_error(func)
    visible, everything = (x.to(input.dtype) for x in context.pooling_masks(input))
    fraction = func(visible, *args, **kwargs) / func(everything, *args, **kwargs)
    if context.is_divided(fraction):
        fraction = fraction.masked_fill(fraction == 0, 1.0)
    is_filled = context.is_padded(input)

    def pool(x: Tensor) -> Tensor:
        return context.fill(func(x if is_filled else context.fill(x), *args, **kwargs) / fraction)

    out: Tensor = recomputed(pool, input)
    return out


def masked_pad(
    context: hidden,
    func: Function,
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Tensor:
    """Pad with a constant, which hidden positions get too: a convolution or pool follows."""
    spatial = list(pad)[: 2 * context.axes]
    if not any(spatial) or not context.is_map(input):
        if any(spatial) and context.spatial_axes(input):
            raise mixing_error(func)
        plain: Tensor = func(input, pad, mode, value)
        return plain
    if mode != "constant" or min(spatial) < 0:
        raise mixing_error(func)
    out: Tensor = func(context.fill(input, value or 0.0), pad, mode, value)
    context.padded = (out, tuple(func(x.float(), spatial) for x in context.pooling_masks(input)))
    return out


# --- norms


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
    over = (0, *range(2, input.ndim))
    total = torch.where(mask, at_least_fp32(input), 0.0).sum(over)
    sums = context.all_reduce(torch.cat([total, mask.sum().to(total).view(1)]))
    num = sums[-1].detach()
    centre = per_channel(sums[:-1] / num, input)
    squares = recomputed(lambda x, centre: centred_values(x, centre, mask).square().sum(over), input, centre)
    variance = context.all_reduce(squares) / num
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(centre.detach().flatten().to(running_mean), momentum)
        running_var.lerp_((variance.detach() * (num / (num - 1))).to(running_var), momentum)
    inverse = per_channel((variance + eps).rsqrt(), input)

    def normalise(x: Tensor, centre: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return apply_affine(centred_values(x, centre, mask) * inverse, weight, bias, mask).to(x.dtype)

    normed: Tensor = recomputed(normalise, input, centre, inverse, weight, bias)
    return normed


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
    mask = context.mask(tuple(input.shape[2:]))

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        centred, variance = centre_by_sample(at_least_fp32(x).unflatten(1, (num_groups, -1)), mask.unsqueeze(1))
        return apply_affine((centred * (variance + eps).rsqrt()).flatten(1, 2), weight, bias, mask).to(x.dtype)

    normed: Tensor = recomputed(normalise, input, weight, bias)
    return normed


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


def centred_values(x: Tensor, centre: Tensor, mask: Tensor) -> Tensor:
    """Subtract the means from visible positions, at least in fp32; hidden positions become zero."""
    return torch.where(mask, at_least_fp32(x) - centre, 0.0)


def centre_by_sample(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centre a tensor (b, g, n, *size) by its means over all axes from the third on.

    Returns:
        The centred values, zero at hidden positions, and the variances.
    """
    over = tuple(range(2, x.ndim))
    num = mask.sum(over, keepdim=True) * x.shape[2]
    centre = torch.where(mask, x, 0.0).sum(over, keepdim=True) / num
    centred = torch.where(mask, x - centre, 0.0)
    return centred, centred.square().sum(over, keepdim=True) / num


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape values (c,) so that they broadcast over a map (b, c, *size)."""
    return values.view(1, -1, *(1,) * (x.ndim - 2))


def apply_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Apply the weight and bias of a norm to a map that is zero at hidden positions, and keep these zero."""
    if weight is not None:
        x = x * per_channel(weight, x)
    return x if bias is None else torch.where(mask, x + per_channel(bias, x), 0.0)
