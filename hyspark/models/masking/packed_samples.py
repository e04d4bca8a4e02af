"""Rules of functions along all positions of a sample, on packed patches: norms, pools, reductions, random numbers.

They need no formula of their own: the patches of a sample, one below the other along the first spatial axis, are a map
of its visible positions alone. A rule takes the context, the function, and the function's own arguments.

Shapes: b batch, c channels, p visible patches of the whole batch, *edges voxels per axis of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyspark.models.masking.masked_functions import Function, mixing_error, set_flag
from hyspark.models.masking.masked_norms import masked_batch_norm
from hyspark.models.masking.masked_reductions import axes_along, find_dims, find_positions
from hyspark.models.masking.packed_convolution import on_dense_map, per_axis

if TYPE_CHECKING:
    from hyspark.models.masking.packed import packed


def view_samples(context: packed, x: Tensor, spatial: range) -> list[Tensor]:
    """View patches as maps of the visible positions of samples, one map of all samples if these have equal numbers.

    Args:
        context: the context.
        x: patches, (p, ...) with spatial axes.
        spatial: the spatial axes of x.

    Returns:
        Maps (b', ..., v * edge, *edges, ...) in the order of the samples; v patches of each of its b' samples.
    """
    patches = context.patches
    parts = [x] if patches.are_equal_in_number else list(x.split(patches.counts))
    num_samples = patches.num_samples // len(parts)
    maps = []
    for part in parts:
        by_sample = part.unflatten(0, (num_samples, -1)).movedim(1, spatial.start)
        maps.append(by_sample.flatten(spatial.start, spatial.start + 1))
    return maps


def view_patches(maps: Sequence[Tensor], edges: Sequence[int], spatial: range) -> Tensor:
    """View maps of samples as patches, the inverse of `view_samples`."""
    parts = [x.unflatten(spatial.start, (-1, edges[0])).movedim(spatial.start, 1).flatten(0, 1) for x in maps]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def expand_samples(context: packed, values: Tensor) -> Tensor:
    """Repeat values of samples (b, ...) for each patch: (p, ...), marked as without positions."""
    out: Tensor = set_flag(values[context.sample], "is_pooled")
    return out


def packed_global_pool(
    context: packed, func: Function, input: Tensor, output_size: Any, return_indices: bool = False
) -> Tensor:
    """Pool each sample to one position, or to its own size."""
    if not context.is_map(input) or return_indices or hasattr(input, "has_border"):
        raise mixing_error(func)
    context.register(input)
    if all(size == 1 for size in per_axis(output_size, context.axes)):
        pooled = [func(x, output_size) for x in view_samples(context, input, range(2, input.ndim))]
        return expand_samples(context, torch.cat(pooled))
    return on_dense_map(context, func, input, output_size)


def packed_batch_norm(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalise by statistics of all patches, which are the visible positions of the batch."""
    if hasattr(input, "has_border") or (context.spatial_axes(input) and not context.has_batch(input)):
        raise mixing_error(func)
    if context.is_distributed:
        return masked_batch_norm(context, func, input, *args, **kwargs)
    out: Tensor = func(input, *args, **kwargs)
    return out


def packed_instance_norm(
    context: packed,
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
    """Normalise by statistics of each sample and channel: BatchNorm of the patches of one sample."""
    if not context.is_map(input) or hasattr(input, "has_border") or (use_input_stats and running_mean is not None):
        raise mixing_error(func)
    if not use_input_stats:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    parts = input.split(context.patches.counts)  # F.batch_norm refuses a single position, torch.batch_norm does not
    cudnn = torch.backends.cudnn.enabled
    normed = [torch.batch_norm(part, weight, bias, None, None, True, momentum, eps, cudnn) for part in parts]
    return normed[0] if len(normed) == 1 else torch.cat(normed)


def packed_group_norm(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalise by statistics of each sample and group."""
    if hasattr(input, "has_border") or (context.spatial_axes(input) and not context.is_map(input)):
        raise mixing_error(func)
    if not context.is_map(input):
        out: Tensor = func(input, *args, **kwargs)
        return out
    spatial = range(2, input.ndim)
    normed = [func(x, *args, **kwargs) for x in view_samples(context, input, spatial)]
    return view_patches(normed, input.shape[2:], spatial)


def packed_layer_norm(
    context: packed, func: Function, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor:
    """Normalise over channels, position by position."""
    if len(normalized_shape) > 1 and context.spatial_axes(input):
        raise mixing_error(func)
    out: Tensor = func(input, normalized_shape, *args, **kwargs)
    return out


def packed_reduction(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Reduce the visible positions of each sample; other reductions are unchanged."""
    dims = find_dims(func, args, kwargs)
    if isinstance(dims, Tensor) or "other" in kwargs:  # the larger of two maps
        return func(input, *args, **kwargs)
    if hasattr(input, "has_border"):
        raise mixing_error(func)
    where = find_positions(context, func, input, dims)
    if where is None:
        return func(input, *args, **kwargs)
    if not context.has_batch(input):
        raise mixing_error(func)
    if 0 in axes_along(input, dims):
        return func(input, *args, **kwargs)
    return expand_samples(context, torch.cat([func(x, *args, **kwargs) for x in view_samples(context, input, where)]))


def packed_feature_dropout(
    context: packed, func: Function, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Drop whole channels of samples, not of patches."""
    if not context.is_map(input):
        out: Tensor = func(input, p, training, inplace)
        return out
    ones = input.new_ones(context.patches.num_samples, *input.shape[1:2], *(1,) * context.axes)
    return input * func(ones, p, training)[context.sample]


def packed_random(context: packed, func: Function, *args: Any, **kwargs: Any) -> Tensor:
    """Draw one number per sample where one per patch is asked for, as stochastic depth does."""
    first = args[0] if args else kwargs.get("size", kwargs.get("input"))
    if isinstance(first, Tensor):
        if not is_one_per_patch(context, first.shape):
            out: Tensor = func(*args, **kwargs)
            return out
        drawn = func(first[: context.patches.num_samples].clone(), *args[1:], **kwargs)[context.sample]
        return first.copy_(drawn) if func is Tensor.bernoulli_ else drawn
    size = args if isinstance(first, int) else first
    if size is None or not is_one_per_patch(context, tuple(size)):
        plain: Tensor = func(*args, **kwargs)
        return plain
    options = {key: value for key, value in kwargs.items() if key != "size"}
    sampled: Tensor = func((context.patches.num_samples, *tuple(size)[1:]), **options)[context.sample]
    return sampled


def is_one_per_patch(context: packed, shape: Sequence[int]) -> bool:
    """Whether a shape is (p, 1, ..., 1), one number per patch."""
    return len(shape) > 0 and shape[0] == len(context.sample) and math.prod(shape) == shape[0]
