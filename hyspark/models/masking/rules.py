"""The rule of each torch function under a mask: `RULES`, and `MIXES_POSITIONS` for functions that are refused.

Convolutions and pools are in masked_functions.py, norms in masked_norms.py, reductions in masked_reductions.py. Here
are functions that are allowed along channels only, or where they keep positions. A rule takes the context, the
function, and the function's own arguments. Shapes: b batch, c channels, *size positions per axis.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyspark.models.masking.masked_functions import (
    Function,
    masked_avg_pool,
    masked_convolution,
    masked_max_pool,
    masked_pad,
    mixing_error,
)
from hyspark.models.masking.masked_norms import (
    masked_batch_norm,
    masked_group_norm,
    masked_instance_norm,
    masked_layer_norm,
)
from hyspark.models.masking.masked_reductions import (
    NORMS,
    SUMS,
    Dims,
    find_positions,
    masked_extreme,
    masked_global_pool,
    masked_mean,
    masked_sum_or_norm,
)

if TYPE_CHECKING:
    from hyspark.models.masking.context import hidden


def refuse_along(argument: str, index: int, default: Dims = None) -> Function:
    """Create a rule that refuses a function along positions.

    Args:
        argument: name of the function's argument that gives its axes.
        index: index of that argument after the input.
        default: axes if the argument is absent.
    """

    def rule(context: hidden, func: Function, *args: Any, **kwargs: Any) -> Any:
        given = args or next(((kwargs[key],) for key in ("input", "tensors") if key in kwargs), args)
        dims = kwargs.get(argument, given[index + 1] if len(given) > index + 1 else default)
        first = given[0] if isinstance(given[0], Tensor) else given[0][0]
        if find_positions(context, func, first, dims) is not None:
            raise mixing_error(func)
        return func(*args, **kwargs)

    return rule


def channel_linear(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply a linear layer along the last axis, unless positions lie there."""
    refuse_rows(context, func, input)
    out: Tensor = func(input, *args, **kwargs)
    return out


def refuse_rows(context: hidden, func: Function, x: Tensor) -> None:
    """Raise NotImplementedError if the last axis holds positions."""
    spatial = context.spatial_axes(x)
    is_mixer = x.ndim == 3 and context.is_flat_map(x, 2) and not context.is_flat_map(x, 1)
    if is_mixer or (spatial and all(dims.stop == x.ndim for dims in spatial)):
        raise mixing_error(func)


def weight_product(context: hidden, func: Function, *args: Any, **kwargs: Any) -> Any:
    """Multiply with a weight matrix; a product of two activations is attention and refused."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if sum(x.ndim >= 3 for x in tensors) > 1:
        raise mixing_error(func)
    if tensors and tensors[0].ndim >= 3:
        refuse_rows(context, func, tensors[0])
    if len(tensors) > 1 and tensors[1].ndim >= 3:  # its columns, one axis earlier
        x = tensors[1]
        spatial = context.spatial_axes(x)
        is_mixer = x.ndim == 3 and context.is_flat_map(x, 1) and not context.is_flat_map(x, 2)
        if is_mixer or (spatial and all(x.ndim - 2 in axes for axes in spatial)):
            raise mixing_error(func)
    return func(*args, **kwargs)


def checked_reshape(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Reshape a map, unless an axis of the result holds channels and positions."""
    out: Tensor = func(input, *args, **kwargs)
    candidates = context.spatial_axes(input) if isinstance(out, Tensor) else []
    if candidates and not any(keeps_positions(input, out, spatial) for spatial in candidates):
        raise mixing_error(func)
    return out


def keeps_positions(x: Tensor, out: Tensor, spatial: range) -> bool:
    """Whether axes of a reshaped map hold all of its spatial axes and nothing else."""
    before, along = math.prod(x.shape[: spatial.start]), math.prod(x.shape[spatial.start : spatial.stop])
    starts = [axis for axis in range(out.ndim) if math.prod(out.shape[:axis]) == before]
    stops = [axis for axis in range(1, out.ndim + 1) if math.prod(out.shape[:axis]) == before * along]
    return any(start < stop for start in starts for stop in stops)


def checked_repeat(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Repeat a map along channels only."""
    out: Tensor = func(input, *args, **kwargs)
    candidates = context.spatial_axes(input)
    if candidates and (out.ndim != input.ndim or all(moves(input, out, spatial) for spatial in candidates)):
        raise mixing_error(func)
    return out


def moves(x: Tensor, out: Tensor, spatial: range) -> bool:
    """Whether the spatial axes of a map have other sizes in the result."""
    return x.shape[spatial.start : spatial.stop] != out.shape[spatial.start : spatial.stop]


def checked_permute(context: hidden, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Permute axes of a map, unless its spatial axes are separated or in another order."""
    out: Tensor = func(input, *args, **kwargs)
    candidates = context.spatial_axes(input)
    if candidates:  # read the new order off a tensor whose sizes are its axes
        order = func(torch.empty([axis + 2 for axis in range(input.ndim)], device="meta"), *args, **kwargs).shape
        if not any(str([axis + 2 for axis in spatial])[1:-1] in str(list(order)) for spatial in candidates):
            raise mixing_error(func)
    return out


def checked_index(context: hidden, func: Function, input: Tensor, index: Any, *args: Any) -> Any:
    """Index a map, unless positions are moved or excluded; each n-th position of the first n is a stride."""
    candidates = context.spatial_axes(input)
    if candidates and not any(is_strided(input, index, spatial) for spatial in candidates):
        raise mixing_error(func)
    return func(input, index, *args)


def is_strided(x: Tensor, index: Any, spatial: range) -> bool:
    """Whether an index takes all positions, or each n-th on an axis that n divides."""
    entries = [entry for entry in (index if isinstance(index, tuple) else (index,)) if entry is not None]
    if any(isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.ndim > 1 for entry in entries):
        return False
    where = next((i for i, entry in enumerate(entries) if entry is ...), len(entries))
    after = len(entries) - where - 1
    by_axis = dict(enumerate(entries[:where]))
    by_axis |= {x.ndim - after + i: entry for i, entry in enumerate(entries[where + 1 :])}
    for axis in spatial:
        entry, size = by_axis.get(axis, slice(None)), x.shape[axis]
        if not isinstance(entry, slice):
            return False
        start, stop, step = entry.indices(size)
        if start >= step or size % step or stop <= size - step + start:
            return False
    return True


PERMUTATIONS = ("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims")
OTHER_REDUCTIONS = ("prod", "logsumexp", "nanmean", "nansum", "median", "nanmedian", "aminmax")
"""Functions without a form for visible positions only; their first argument is the axis, by default all."""
ALONG_LAST_AXIS = (
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "mode"),
    *("gather", "scatter", "index_select", "take_along_dim", "narrow", "select"),
)
"""Functions along one axis, which is their first argument or, of some, the last axis by default."""

RULES: dict[Function, Function] = {
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], masked_convolution),
    **dict.fromkeys([F.conv_transpose2d, F.conv_transpose3d], masked_convolution),
    **dict.fromkeys([F.max_pool1d, F.max_pool2d, F.max_pool3d], masked_max_pool),
    **dict.fromkeys([torch.max_pool1d, torch.max_pool2d, torch.max_pool3d], masked_max_pool),
    **dict.fromkeys([F.avg_pool1d, F.avg_pool2d, F.avg_pool3d], masked_avg_pool),
    **dict.fromkeys([F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d], masked_global_pool),
    **dict.fromkeys([F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d], masked_global_pool),
    F.pad: masked_pad,
    **dict.fromkeys([F.batch_norm, torch.batch_norm], masked_batch_norm),
    **dict.fromkeys([F.group_norm, torch.group_norm], masked_group_norm),
    F.instance_norm: masked_instance_norm,
    **dict.fromkeys([F.layer_norm, torch.layer_norm], masked_layer_norm),
    **dict.fromkeys([torch.mean, Tensor.mean], masked_mean),
    **dict.fromkeys([*SUMS, *NORMS], masked_sum_or_norm),
    **dict.fromkeys([torch.amax, Tensor.amax, torch.amin, Tensor.amin], masked_extreme),
    **dict.fromkeys([torch.max, Tensor.max, torch.min, Tensor.min], masked_extreme),
    **dict.fromkeys(
        [torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean, torch.std_mean], refuse_along("dim", 0)
    ),
    **dict.fromkeys(
        [F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax], refuse_along("dim", 0)
    ),
    **dict.fromkeys(
        [getattr(owner, name) for owner in (torch, Tensor) for name in OTHER_REDUCTIONS], refuse_along("dim", 0)
    ),
    **dict.fromkeys(
        [getattr(owner, name) for owner in (torch, Tensor) for name in ALONG_LAST_AXIS], refuse_along("dim", 0, -1)
    ),
    **dict.fromkeys(
        [torch.quantile, Tensor.quantile, torch.nanquantile, Tensor.nanquantile, torch.renorm, Tensor.renorm],
        refuse_along("dim", 1),
    ),
    **dict.fromkeys(
        [torch.split, Tensor.split, torch.chunk, Tensor.chunk, torch.tensor_split, Tensor.tensor_split],
        refuse_along("dim", 1, 0),
    ),
    **dict.fromkeys([torch.unbind, Tensor.unbind], refuse_along("dim", 0, 0)),
    **dict.fromkeys([torch.rot90, Tensor.rot90], refuse_along("dims", 1, (0, 1))),
    **dict.fromkeys([torch.diff, Tensor.diff, torch.kthvalue, Tensor.kthvalue], refuse_along("dim", 1, -1)),
    **dict.fromkeys([getattr(owner, name) for owner in (torch, Tensor) for name in PERMUTATIONS], checked_permute),
    **dict.fromkeys([Tensor.repeat, Tensor.tile, torch.tile], checked_repeat),
    **dict.fromkeys([Tensor.__getitem__, Tensor.__setitem__], checked_index),
    **dict.fromkeys([torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin], refuse_along("dim", 0)),
    **dict.fromkeys([torch.topk, Tensor.topk], refuse_along("dim", 1, -1)),
    **dict.fromkeys([torch.cat, torch.concat], refuse_along("dim", 0, 0)),
    **dict.fromkeys([torch.roll, Tensor.roll], refuse_along("dims", 1)),
    **dict.fromkeys([torch.flip, Tensor.flip], refuse_along("dims", 0)),
    F.normalize: refuse_along("dim", 1, 1),
    F.linear: channel_linear,
    **dict.fromkeys([torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm], weight_product),
    **dict.fromkeys([torch.flatten, Tensor.flatten, Tensor.reshape, torch.reshape, Tensor.view], checked_reshape),
}

MIXES_POSITIONS: frozenset[Function] = frozenset(
    {
        F.interpolate,
        F.grid_sample,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        F.max_pool1d_with_indices,
        F.max_pool2d_with_indices,
        F.max_pool3d_with_indices,
        F.lp_pool1d,
        F.lp_pool2d,
        F.lp_pool3d,
        F.conv_transpose1d,
        torch.instance_norm,
        torch.convolution,
        F.feature_alpha_dropout,
        torch.tensordot,
        F.unfold,
        F.fold,
        F.pixel_shuffle,
        F.pixel_unshuffle,
        torch.einsum,
        *(getattr(torch.fft, name) for name in ("fft", "rfft", "fft2", "rfft2", "fftn", "rfftn")),
    }
)
"""Functions that mix positions and have no rule."""
