"""Convolutions and pools under a mask.

A hidden position counts as one outside the map. A convolution reads zero there, a maximum ignores it, and averages are
taken over the other positions. The output is zero at hidden positions. With all positions visible each rule equals the
function. For the backward pass the rules keep the function's input, and mask it again.

A rule takes the context, the function, and the function's own arguments. Shapes: b batch, c channels, *size positions
per axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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


def tensors_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """List the tensors among a function's arguments, and in lists and tuples among them."""
    values = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list | tuple) else (arg,))]
    return [x for x in values if isinstance(x, Tensor)]


def identity(x: Tensor) -> Tensor:
    """Return a tensor unchanged: its sum over one process."""
    return x


def set_flag(out: Any, flag: str, value: Any = True) -> Any:
    """Set a flag of a tensor, or of each in a sequence: `is_pooled`, without positions, or `has_border`, padded."""
    for x in out if isinstance(out, list | tuple) else (out,):
        if isinstance(x, Tensor):
            setattr(x, flag, value)
    return out


# --- convolutions and pools


def masked_convolution(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Convolve a map; a convolution along other axes works on something else, such as channels, and is unchanged.

    A tensor with another number of samples holds positions or channels there.
    """
    if not context.is_map(input) or not (len(context.visible) == 1 or context.has_batch(input)):
        weight = kwargs["weight"] if "weight" in kwargs else args[0]
        kernels = weight.shape[2:]
        is_along = bool(context.spatial_axes(input)) and max(kernels[-context.axes :]) > 1
        if is_along or context.is_flat_map(input, -1) or (max(kernels) > 1 and not context.has_batch(input)):
            raise mixing_error(func)
        plain: Tensor = func(input, *args, **kwargs)
        return plain
    is_filled = context.is_padded(input)

    def convolve(x: Tensor, *args: Any) -> Tensor:
        convolved: Tensor = func(x if is_filled else context.fill(x), *args, **kwargs)
        return convolved

    return context.fill(recomputed(convolve, input, *args))


def masked_max_pool(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take the largest of the visible positions in each window."""
    if not context.is_map(input):
        raise mixing_error(func)
    is_filled = context.is_padded(input)

    def pool(x: Tensor) -> Tensor:
        pooled: Tensor = func(x if is_filled else context.fill(x, -math.inf), *args, **kwargs)
        return pooled

    out = context.fill(recomputed(pool, input))
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
        pooled: Tensor = func(x if is_filled else context.fill(x), *args, **kwargs)
        return pooled

    return context.fill(recomputed(pool, input) / fraction)


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
