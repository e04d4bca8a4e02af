"""`with packed(visible, patch):` any network, in 2D or 3D, computes visible patches only.

Inside the block a feature map is its p visible patches, (p, c, *edges), like a batch. Pointwise layers and BatchNorm
need no rule. A convolution or max pool first gives each patch a border from its neighbours. Other functions along
positions, such as average pools and norms over samples, are computed on the dense map by the rule of `hidden`.
Outputs equal those under `hidden` to rounding, with their gradients.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis, p visible patches of the whole batch,
*edges voxels per axis of a patch at a resolution.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.masking.context import hidden
from hyspark.models.masking.masked_functions import Function, mixing_error, set_flag
from hyspark.models.masking.patches import PATCH_EDGES, Patches, build_patches
from hyspark.models.masking.rules import RULES, SUMS, find_positions, masked_extreme, masked_mean, masked_sum_or_norm
from hyspark.models.recompute import recomputed


class packed(hidden):  # noqa: N801 - reads as a statement: `with packed(visible, patch):`
    """Context in which a network computes visible patches only.

    Use it as:

        with packed(visible, patch=32) as context:
            features = network(context.pack(images))  # (p, c, *edges)
        dense = context.unpack(features)  # (b, c, *size), zero at hidden positions

    Dropout and stochastic depth draw for each patch, not for each sample.

    Args:
        visible: bool (b, 1, *grid), True where the network sees, on the device of the network.
        patch: edge of a patch in voxels of the input, a multiple of the network's total stride.
        safe: functions to leave unchanged, see `hidden`.

    Raises:
        ValueError: a sample has no visible patch; inside the block, a stride does not divide a patch.
        NotImplementedError: inside the block, a function without a rule mixes positions.
    """

    def __init__(self, visible: Tensor, patch: int, safe: Collection[Callable[..., Any]] = ()) -> None:
        self.patches = Patches(visible)
        self.dense = hidden(visible, safe)
        self.patch = patch
        self.sample = self.patches.position[0]
        counts = torch.tensor(self.patches.counts, device=visible.device)
        self.first = counts.cumsum(0) - counts  # first patch of each sample
        super().__init__(visible.new_ones(len(self.sample), *(1,) * (visible.ndim - 1)), safe)

    def pack(self, volumes: Tensor) -> Tensor:
        """Select the visible patches of volumes (b, c, *size): (p, c, *edges); ValueError for another grid."""
        build_patches(volumes, self.dense.visible, self.patch)
        return self.patches.pack(volumes)

    def unpack(self, features: Tensor) -> Tensor:
        """Scatter features (p, c, *edges) into a dense map (b, c, *size), zero at hidden positions."""
        return self.patches.unpack(features)

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [x for x in values if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)]
        inputs = tensors[:1] if func in RULES else [x for x in tensors if x.ndim > 1]  # not weights or statistics
        pooled = [hasattr(x, "is_pooled") for x in inputs if hasattr(x, "is_pooled") or len(x) == len(self.sample)]
        if pooled and all(pooled):
            return set_flag(self.of_samples(func, args, kwargs), "is_pooled")
        if func in PACKED_RULES and func not in self.safe:
            return PACKED_RULES[func](self, func, *args, **kwargs)
        out = super().__torch_function__(func, types, args, kwargs)
        padded = [x for x in tensors if hasattr(x, "has_border")]
        return set_flag(out, "has_border") if padded and shape_of(out) == tuple(padded[0].shape[2:]) else out

    def of_samples(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of values that are equal for all patches of a sample; BatchNorm counts each sample once."""
        if func not in (F.batch_norm, torch.batch_norm):
            return func(*args, **kwargs)
        return func(args[0][self.first], *args[1:], **kwargs)[self.sample]

    def is_map(self, x: Tensor) -> bool:
        """Whether a tensor has the axes of packed patches (p, c, *edges)."""
        return x.ndim == self.axes + 2 and len(x) == len(self.sample)

    def register(self, x: Tensor) -> Tensor:
        """Make the size of packed patches known to the reductions; ValueError if other patches do not divide it."""
        self.mask(tuple(x.shape[2:]))
        return x

    def with_border(self, x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
        """Add voxels of the neighbours to patches (p, c, *edges), on both sides of each axis.

        Args:
            x: the patches.
            before: number of voxels before each axis.
            after: number of voxels after each axis; below 0 it crops.
            value: value of voxels that are hidden or outside.
        """
        edge, widths = x.shape[-1], (*before, *after)
        if not any(widths):
            return x
        if value == 0.0 and set(widths) == {1} and edge in PATCH_EDGES:
            return self.patches.with_halo(x)
        dense = self.patches.unpack(x, x.new_full((1, x.shape[1], *(1,) * self.axes), value))
        pairs = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
        dense = F.pad(dense, pairs, value=value)
        for axis, (b, a) in enumerate(zip(before, after, strict=True), start=2):
            dense = dense.unfold(axis, edge + b + a, edge)
        return dense.movedim(1, -1)[tuple(self.patches.position)].movedim(-1, 1)


def shape_of(x: Any) -> tuple[int, ...] | None:
    """Return the spatial shape of a tensor (p, c, *edges); None for other objects."""
    return tuple(x.shape[2:]) if isinstance(x, Tensor) else None


def windows(
    context: packed, func: Function, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, is_ceil: bool
) -> tuple[list[int], list[int]]:
    """Compute the border that patches need for the windows of a convolution or pool.

    Returns:
        Number of voxels before and after each axis.

    Raises:
        ValueError: the stride does not divide the patch, or the size of the output is not size / stride.
    """
    edges = tuple(context.register(x).shape[2:])
    kernels, strides, dilations = (per_axis(value, context.axes) for value in (kernel, stride, dilation))
    reach = [d * (k - 1) + 1 for k, d in zip(kernels, dilations, strict=True)]
    if padding in ("same", "valid"):
        padding = [(r - 1) // 2 * (padding == "same") for r in reach]
    before = per_axis(padding, context.axes)
    rounded = math.ceil if is_ceil else math.floor
    for edge, r, s, b in zip(edges, reach, strides, before, strict=True):
        if edge % s:
            raise ValueError(
                f"patch of {context.patch} voxels: expected a multiple of the network's total stride, but a patch of "
                f"{edge} at this resolution is not divisible by a stride of {s}"
            )
        if rounded((2 * b - r) / s) != -1:
            raise ValueError(f"{func.__name__}: expected padding that gives size / stride outputs, got padding {b}")
    return before, [r - s - b for r, s, b in zip(reach, strides, before, strict=True)]


def per_axis(value: Any, axes: int) -> list[int]:
    """Expand a number, or a sequence of one, to all spatial axes."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


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
    """Convolve patches with a border; of the input only the patches are kept for the backward pass."""
    if not context.is_map(input) or hasattr(input, "has_border"):
        if not hasattr(input, "has_border"):
            plain: Tensor = RULES[func](context, func, input, weight, bias, stride, padding, dilation, groups)
            return plain
        check_no_padding(context, func, padding)
        out: Tensor = func(input, weight, bias, stride, 0, dilation, groups)
        return context.register(out)
    before, after = windows(context, func, input, weight.shape[2:], stride, padding, dilation, False)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = func(context.with_border(x, before, after), weight, bias, stride, 0, dilation, groups)
        return result

    return context.register(recomputed(convolve, input, weight, bias))


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
        out: Tensor = func(input, kernel_size, stride, 0, dilation)
        return context.register(out)
    before, after = windows(context, func, input, kernel_size, stride, padding, dilation, ceil_mode)
    out = func(context.with_border(input, before, after, -math.inf), kernel_size, stride, 0, dilation)
    return context.register(out)


def check_no_padding(context: packed, func: Function, padding: Any) -> None:
    """Raise NotImplementedError for a second padding, after `F.pad`."""
    if padding != "valid" and any(per_axis(padding, context.axes)):
        raise mixing_error(func)


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
    spatial += [0] * (2 * context.axes - len(spatial))
    out = context.with_border(context.register(input), spatial[::2][::-1], spatial[1::2][::-1], value or 0.0)
    marked: Tensor = set_flag(out, "has_border")
    return marked


def packed_batch_norm(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalise by statistics of all patches, which are the visible positions of the batch."""
    if hasattr(input, "has_border"):
        raise mixing_error(func)
    out: Tensor = func(input, *args, **kwargs)
    return out


def on_dense_map(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a function of a map on the dense map, by the rule of `hidden`."""
    if not context.is_map(input):
        plain: Tensor = RULES[func](context, func, input, *args, **kwargs)
        return plain
    if hasattr(input, "has_border"):
        raise mixing_error(func)
    out: Tensor = RULES[func](context.dense, func, context.unpack(context.register(input)), *args, **kwargs)
    if max(out.shape[2:]) > 1 or max(context.patches.grid) == 1:
        return context.register(context.patches.pack(out))
    pooled: Tensor = set_flag(out[context.sample], "is_pooled")
    return pooled


def packed_reduction(context: packed, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Reduce the visible positions of each sample, on the dense map; other reductions are unchanged."""
    index = 0 if func in SUMS or RULES[func] is not masked_sum_or_norm else 1
    dims = kwargs.get("dim", args[index] if len(args) > index else None)
    where = find_positions(context, func, input, dims)
    if where is None:
        return func(input, *args, **kwargs)
    if len(input) != len(context.sample):
        raise mixing_error(func)
    is_last = where.stop < input.ndim
    x = context.unpack(input.movedim(-1, 1) if is_last else input)
    context.dense.mask(tuple(x.shape[2:]))
    out = RULES[func](context.dense, func, x.movedim(1, -1) if is_last else x, *args, **kwargs)
    is_per_sample = dims is not None and 0 not in ([dims] if isinstance(dims, int) else list(dims))
    return set_flag(out[context.sample], "is_pooled") if is_per_sample else out


PACKED_RULES: dict[Function, Function] = {
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], packed_convolution),
    **dict.fromkeys([F.max_pool1d, F.max_pool2d, F.max_pool3d], packed_max_pool),
    **dict.fromkeys([torch.max_pool1d, torch.max_pool2d, torch.max_pool3d], packed_max_pool),
    F.pad: packed_pad,
    **dict.fromkeys([F.batch_norm, torch.batch_norm], packed_batch_norm),
    **dict.fromkeys([F.avg_pool1d, F.avg_pool2d, F.avg_pool3d], on_dense_map),
    **dict.fromkeys([F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d], on_dense_map),
    **dict.fromkeys([F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d], on_dense_map),
    **dict.fromkeys([F.group_norm, torch.group_norm, F.instance_norm], on_dense_map),
    **{
        func: packed_reduction
        for func, rule in RULES.items()
        if rule in (masked_mean, masked_sum_or_norm, masked_extreme)
    },
}
"""Rules that differ from those of `hidden`."""
