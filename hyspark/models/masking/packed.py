"""`with packed(visible, patch):` any network, in 2D or 3D, computes visible patches only.

Inside the block a feature map is its p visible patches, (p, c, *edges), like a batch. Pointwise layers and BatchNorm
need no rule. packed_rules.py defines the others: a convolution first gives each patch a border from its neighbours,
statistics are of the patches of a sample. Outputs and gradients equal those under `hidden` to rounding.

Shapes: b batch, c channels, *size voxels per axis, *grid patches per axis, p visible patches of the whole batch,
*edges voxels per axis of a patch at a resolution.
"""

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from hyspark.models.defaults import Edges
from hyspark.models.masking.context import hidden, is_weight
from hyspark.models.masking.masked_functions import Function, identity, mixing_error, set_flag, tensors_among
from hyspark.models.masking.packed_rules import PACKED_RULES, call_pooled
from hyspark.models.masking.patches import Patches, check_mask_shape
from hyspark.models.masking.rules import RULES
from hyspark.models.recompute import recomputed

JOINS = (torch.cat, torch.concat)
EXPANDS = (Tensor.expand, Tensor.expand_as, torch.broadcast_to)
"""Functions that take values by position to the batch."""


class packed(hidden):  # noqa: N801 - reads as a statement: `with packed(visible, patch):`
    """Context in which a network computes visible patches only.

    Use it as:

        context = packed(visible, patch=32)
        with context:
            features = network(context.pack(images))  # (p, c, *edges)
        dense = context.unpack(features)  # (b, c, *size), zero at hidden positions

    Args:
        visible: bool (b, 1, *grid), True where the network sees, or its geometry.
        patch: edge of a patch in voxels of the input, a multiple of the network's total stride; one number or one per
            axis.
        safe: functions to leave unchanged, see `hidden`.
        all_reduce: sum of a tensor over all processes, see `hidden`.

    Raises:
        ValueError: a sample has no visible patch; inside the block, a stride does not divide a patch.
        NotImplementedError: inside the block, a function without a rule mixes positions.
    """

    def __init__(
        self,
        visible: Tensor | Patches,
        patch: Edges,
        safe: Collection[Callable[..., Any]] = (),
        all_reduce: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        self.patches = visible if isinstance(visible, Patches) else Patches(visible)
        self.dense = hidden(self.patches.visible, safe, all_reduce)
        self.patch = patch
        self.sample = self.patches.position[0]
        ones = self.sample.new_ones(len(self.patches), *(1,) * (self.patches.axes + 1), dtype=torch.bool)
        super().__init__(ones, safe, all_reduce)
        self.input_size = ()  # `pack` knows it

    @cached_property
    def first(self) -> Tensor:
        """Index of the first patch of each sample, (b,)."""
        counts = torch.tensor(self.patches.counts, device=self.sample.device)
        return counts.cumsum(0) - counts

    def pack(self, volumes: Tensor) -> Tensor:
        """Select the visible patches of volumes (b, c, *size): (p, c, *edges); ValueError for another grid."""
        check_mask_shape(volumes, self.patches.visible, self.patch)
        with torch._C.DisableTorchFunction():  # inside the block, too
            return self.register(self.patches.pack(volumes))

    def unpack(self, features: Tensor) -> Tensor:
        """Scatter features (p, c, *edges) into a dense map (b, c, *size), zero at hidden positions."""
        with torch._C.DisableTorchFunction():
            return self.patches.unpack(features)

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):  # torch.compile traces the network below torch functions
            return func(*args, **kwargs)
        if func is recomputed:
            return self.recompute_inside(*args, **kwargs)
        given = tensors_among(args, kwargs)
        tensors = [x for x in given if not is_weight(x)]
        inputs = tensors[:1] if func in RULES else [x for x in tensors if x.ndim > 1]  # not weights or statistics
        pooled = [hasattr(x, "is_pooled") for x in inputs if hasattr(x, "is_pooled") or self.has_batch(x)]
        if func not in self.safe:
            self.check_positions(func, args, kwargs, given)
        if pooled and all(pooled):
            return call_pooled(self, func, args, kwargs)
        if func in PACKED_RULES and func not in self.safe:
            out = PACKED_RULES[func](self, func, *args, **kwargs)
            return self.learn_size(out, args) if func is Tensor.__getitem__ else out
        out = super().__torch_function__(func, types, args, kwargs)
        padded = [x for x in tensors if hasattr(x, "has_border")]
        results = out if isinstance(out, list | tuple) else (out,)
        for x in results if padded else ():
            if isinstance(x, Tensor) and x.shape[2:] == padded[0].shape[2:]:
                set_flag(x, "has_border", padded[0].has_border)
        return out

    def check_positions(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        """Raise NotImplementedError for values by position, such as coordinates, which are the same for all patches."""
        if len(self.sample) == 1 or func in PACKED_RULES or (func in RULES and func not in JOINS):
            return
        shapes = [tuple(x.shape) for x in tensors if self.has_batch(x) and self.spatial_axes(x)]
        if func in EXPANDS and tensors and not hasattr(tensors[0], "is_pooled"):
            shapes += [tuple(func(*args, **kwargs).shape)]
        for shape in shapes:
            spatial = [range(i, i + self.axes) for i in (len(shape) - self.axes, len(shape) - self.axes - 1) if i > 0]
            known = [axes for axes in spatial if shape[axes.start : axes.stop] in self.masks]
            for x in tensors if shape[0] == len(self.sample) else ():
                own = (1,) * (len(shape) - x.ndim) + tuple(x.shape)
                if known and own[0] == 1 and all(max(own[axes.start : axes.stop]) > 1 for axes in known):
                    raise mixing_error(func)

    def is_map(self, x: Tensor) -> bool:
        """Whether a tensor has the axes of packed patches (p, c, *edges)."""
        return x.ndim == self.axes + 2 and self.has_batch(x)

    def register(self, x: Tensor) -> Tensor:
        """Make the size of packed patches known to the reductions; ValueError if other patches do not divide it."""
        self.mask(tuple(x.shape[2:]))
        return x
