"""The rule of each torch function on packed patches, where it is another than that of `hidden`: `PACKED_RULES`.

Convolutions are in packed_convolution.py, functions along all positions of a sample in packed_samples.py. Here are
pools, padding, and functions that are allowed where they keep positions. A rule takes the context, the function, and
the function's own arguments.

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
from hyspark.models.masking.masked_reductions import (
    axes_along,
    find_dims,
    masked_extreme,
    masked_mean,
    masked_sum_or_norm,
)
from hyspark.models.masking.packed_convolution import (
    add_windows_border,
    check_no_padding,
    check_outputs,
    on_dense_map,
    packed_convolution,
    packed_transposed_convolution,
    per_axis,
    windows,
)
from hyspark.models.masking.packed_samples import (
    packed_batch_norm,
    packed_feature_dropout,
    packed_global_pool,
    packed_group_norm,
    packed_instance_norm,
    packed_layer_norm,
    packed_random,
    packed_reduction,
)
from hyspark.models.masking.rules import RULES
from hyspark.models.recompute import recomputed

if TYPE_CHECKING:
    from hyspark.models.masking.packed import packed


def call_pooled(context: packed, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of values that are equal for all patches of a sample.

    BatchNorm and reductions along samples count each sample once. Random numbers are drawn once for each sample.

    Returns:
        The result, marked as without positions unless it has those of a map.
    """
    if func in ALONG_SAMPLES and is_along_samples(func, args, kwargs):
        return func(args[0][context.first], *args[1:], **kwargs)
    if func not in ONCE_PER_SAMPLE:
        out = func(*args, **kwargs)
        return out if context.is_repeated(func, args, out) else set_flag(out, "is_pooled")
    values = args[0][context.first]
    rule = RULES.get(func)
    out = func(values, *args[1:], **kwargs) if rule is None else rule(context.dense, func, values, *args[1:], **kwargs)
    return set_flag(out[context.sample], "is_pooled")


def is_along_samples(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a reduction works along the first axis; NotImplementedError if its result has that axis still."""
    dims = find_dims(func, args[1:], kwargs)
    if not args or isinstance(dims, Tensor) or "other" in kwargs or 0 not in axes_along(args[0], dims):
        return False
    if func not in PACKED_RULES:
        raise mixing_error(func)
    return True


# --- pools and padding


def packed_max_pool(
    context: packed,
    func: Function,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Take the largest of the visible positions in each window."""
    if not context.is_map(input) or return_indices:
        raise mixing_error(func)
    stride = stride or kernel_size
    if hasattr(input, "has_border"):
        check_no_padding(context, func, padding)
        return check_outputs(context, func, input, func(input, kernel_size, stride, 0, dilation, ceil_mode), stride)
    before, after, fits = windows(context, func, input, kernel_size, stride, padding, dilation, ceil_mode)
    if not fits:
        return on_dense_map(context, func, input, kernel_size, stride, padding, dilation, ceil_mode)

    def pool(x: Tensor) -> Tensor:
        bordered = add_windows_border(context, x, before, after, -math.inf)
        pooled: Tensor = func(bordered, kernel_size, stride, 0, dilation)
        return pooled

    return context.register(recomputed(pool, input) if any((*before, *after)) else pool(input))


def packed_avg_pool(
    context: packed,
    func: Function,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average the visible positions in each window; windows beyond a patch are computed on the dense map.

    As under `hidden`, a divisor given by the caller is for windows without a hidden position.
    """
    if not context.is_map(input) or hasattr(input, "has_border"):
        raise mixing_error(func)
    stride = stride or kernel_size
    before, after, _ = windows(context, func, input, kernel_size, stride, padding, 1, ceil_mode)
    if any((*before, *after)):
        options = () if divisor_override is None else (divisor_override,)
        return on_dense_map(context, func, input, kernel_size, stride, padding, ceil_mode, count_include_pad, *options)
    out: Tensor = func(input, kernel_size, stride)
    if divisor_override is not None:
        out = out * (math.prod(per_axis(kernel_size, context.axes)) / divisor_override)
    return context.register(out)


def packed_pad(
    context: packed, func: Function, input: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> Tensor:
    """Pad a map by a border of its neighbours, with a constant at hidden positions."""
    spatial = list(pad)[: 2 * context.axes]
    if not any(spatial) or not context.is_map(input):
        plain: Tensor = RULES[func](context, func, input, pad, mode, value)
        return plain
    if mode != "constant" or min(spatial) < 0 or len(spatial) < len(pad) or hasattr(input, "has_border"):
        raise mixing_error(func)
    edges = tuple(input.shape[2:])
    spatial += [0] * (2 * context.axes - len(spatial))
    before, after = spatial[::2][::-1], spatial[1::2][::-1]
    out = add_windows_border(context, context.register(input), before, after, value or 0.0)
    marked: Tensor = set_flag(out, "has_border", edges)
    return marked


def packed_index(context: packed, func: Function, input: Tensor, index: Any, *args: Any) -> Any:
    """Index a map, unless patches are chosen; each n-th position of a patch is one of the map."""
    first = index[0] if isinstance(index, tuple) and index else index
    is_all = first is None or first is ... or (isinstance(first, slice) and first == slice(None))
    if context.spatial_axes(input) and not is_all:
        raise mixing_error(func)
    return RULES[func](context, func, input, index, *args)


def packed_repeat(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Repeat a map along channels only; values by position are refused."""
    out: Tensor = RULES[func](context, func, input, *args, **kwargs)
    is_map = context.is_map(out) and not context.has_batch(input)
    if is_map and tuple(out.shape[2:]) in context.masks and max(input.shape[-context.axes :]) > 1:
        raise mixing_error(func)
    return out


PACKED_RULES: dict[Function, Function] = {
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], packed_convolution),
    **dict.fromkeys([F.conv_transpose2d, F.conv_transpose3d], packed_transposed_convolution),
    **dict.fromkeys([F.max_pool1d, F.max_pool2d, F.max_pool3d], packed_max_pool),
    **dict.fromkeys([torch.max_pool1d, torch.max_pool2d, torch.max_pool3d], packed_max_pool),
    F.pad: packed_pad,
    **dict.fromkeys([F.batch_norm, torch.batch_norm], packed_batch_norm),
    **dict.fromkeys([F.group_norm, torch.group_norm], packed_group_norm),
    F.instance_norm: packed_instance_norm,
    **dict.fromkeys([F.layer_norm, torch.layer_norm], packed_layer_norm),
    **dict.fromkeys([F.avg_pool1d, F.avg_pool2d, F.avg_pool3d], packed_avg_pool),
    **dict.fromkeys([F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d], packed_global_pool),
    **dict.fromkeys([F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d], packed_global_pool),
    **dict.fromkeys([F.dropout1d, F.dropout2d, F.dropout3d], packed_feature_dropout),
    **dict.fromkeys([Tensor.bernoulli_, torch.bernoulli, torch.rand, torch.rand_like], packed_random),
    **dict.fromkeys([Tensor.__getitem__, Tensor.__setitem__], packed_index),
    **dict.fromkeys([Tensor.repeat, Tensor.tile, torch.tile], packed_repeat),
    **{
        func: packed_reduction
        for func, rule in RULES.items()
        if rule in (masked_mean, masked_sum_or_norm, masked_extreme)
    },
}
"""Rules that differ from those of `hidden`."""

ALONG_SAMPLES: frozenset[Function] = frozenset(
    {func for func, rule in PACKED_RULES.items() if rule is packed_reduction}
    | {F.softmax, torch.softmax, Tensor.softmax, torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean}
)
"""Functions of pooled values that may work along samples."""
ONCE_PER_SAMPLE: frozenset[Function] = frozenset(
    {F.batch_norm, torch.batch_norm, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.bernoulli}
)
"""Functions of pooled values that are computed once for each sample."""
