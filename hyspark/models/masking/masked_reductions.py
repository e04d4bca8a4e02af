"""Reductions of maps under a mask: means, sums, norms and extremes over the visible positions.

A rule takes the context, the function, and the function's own arguments. Shapes: b batch, c channels, *size positions
per axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from hyspark.models.masking.masked_functions import Function, mixing_error, set_flag

if TYPE_CHECKING:
    from hyspark.models.masking.context import hidden

Dims = int | Sequence[int] | None
SUMS: tuple[Function, ...] = (torch.sum, Tensor.sum)
NORMS: tuple[Function, ...] = (torch.norm, Tensor.norm, torch.linalg.vector_norm)
"""Functions whose first argument after the input is the order of the norm."""


def axes_along(x: Tensor, dims: Dims) -> set[int]:
    """Return the axes along which a function works, of its argument; None, or a bool (`unbiased`), for all."""
    is_all = dims is None or dims == () or isinstance(dims, bool)
    chosen = range(x.ndim) if is_all else [dims] if isinstance(dims, int) else dims
    return {d % x.ndim for d in chosen or ()} if x.ndim else set()


def find_dims(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dims:
    """Find the axes among the arguments of a reduction after its input."""
    index = 1 if func in NORMS else 0
    dims: Dims = kwargs.get("dim", kwargs.get("axis", args[index] if len(args) > index else None))
    return dims


def find_positions(context: hidden, func: Function, x: Tensor, dims: Dims) -> range | None:
    """Find the spatial axes of a map if a function works along all of them.

    Returns:
        The axes, or None if x is no map or the function works along none of them.

    Raises:
        NotImplementedError: the function works along some of them, or along samples alone.
    """
    if context.is_padded(x):
        raise mixing_error(func)
    along = axes_along(x, dims)
    candidates = context.spatial_axes(x)
    for spatial in candidates:
        if along >= set(spatial):
            return spatial
    if candidates and (0 in along or all(along & set(spatial) for spatial in candidates)):
        raise mixing_error(func)
    if not candidates and x.ndim == 3 and any(context.is_flat_map(x, d) for d in along - {0}):
        raise mixing_error(func)
    return None


def masked_mean(
    context: hidden, func: Function, input: Tensor, dim: Dims = None, keepdim: bool = False, **kwargs: Any
) -> Tensor:
    """Average over the visible positions."""
    dim = kwargs.pop("axis", dim)
    where = find_positions(context, func, input, dim)
    if where is None:
        return call_plain(func, input, dim, keepdim, kwargs)
    mask = context.broadcast_mask(input, where)
    total = call_plain(func, torch.where(mask, input, 0.0), dim, keepdim, kwargs)
    out: Tensor = set_flag(total / call_plain(torch.mean, mask.to(total.dtype), dim, keepdim, {}), "is_pooled")
    return out


def masked_sum_or_norm(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a sum or a norm over the visible positions."""
    where = find_positions(context, func, input, find_dims(func, args, kwargs))
    if where is not None:
        input = torch.where(context.broadcast_mask(input, where), input, 0.0)
    out: Tensor = func(input, *args, **kwargs)
    if where is not None:
        set_flag(out, "is_pooled")
    return out


def masked_extreme(
    context: hidden, func: Function, input: Tensor, dim: Dims = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """Take the largest or smallest of the visible positions; of two maps it is a pointwise function."""
    dim = kwargs.pop("axis", dim)
    if isinstance(dim, Tensor) or "other" in kwargs:
        return func(input, *(() if dim is None else (dim,)), **kwargs)
    where = find_positions(context, func, input, dim)
    if where is not None:
        worst = math.inf if "min" in (resolve_name(func) or "") else -math.inf
        input = torch.where(context.broadcast_mask(input, where), input, worst)
    out = call_plain(func, input, dim, keepdim, kwargs)
    return out if where is None else set_flag(out, "is_pooled")


def call_plain(func: Function, x: Tensor, dim: Dims, keepdim: bool, kwargs: dict[str, Any]) -> Any:
    """Call the function itself; some functions take no dimension argument if it is None."""
    return func(x, **kwargs) if dim is None else func(x, dim, keepdim, **kwargs)


def masked_global_pool(
    context: hidden, func: Function, input: Tensor, output_size: Any, return_indices: bool = False
) -> Tensor:
    """Pool a map to one position, or to its own size."""
    size = tuple(input.shape[2:])
    asked = (output_size,) * context.axes if isinstance(output_size, int) else tuple(output_size)
    if not context.is_map(input) or return_indices:
        raise mixing_error(func)
    if asked == (1,) * context.axes:
        context.mask(size)  # makes the size known to the reductions
        over = tuple(range(2, input.ndim))
        is_max = func in (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
        out: Tensor = (
            masked_extreme(context, torch.amax, input, over, True)
            if is_max
            else masked_mean(context, torch.mean, input, over, True)
        )
        return out
    if all(a in (None, s) for a, s in zip(asked, size, strict=True)):
        return context.fill(input)
    raise mixing_error(func)
