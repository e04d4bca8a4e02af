"""`with hidden(visible):` any network, in 2D or 3D, computes as if hidden positions did not exist.

The context intercepts torch functions, so the network inside needs no special layers and keeps its own weights.
rules.py defines each function under a mask. Pointwise functions need no rule: every rule ignores hidden positions of
its input. A function that mixes positions and has no rule is refused by name, unless it is declared safe.

The mask belongs to the context object, and nothing remains after the block. Activation checkpointing of a part of the
network inside the block is correct by `recomputed` of recompute.py, which enters the context again. With torch's own
`checkpoint` the block has to lie inside the checkpointed function. (In the other order torch raises in the backward
pass, because other tensors are saved without the block.)

Source: the rules of Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023, and of HySparK, MICCAI
2024, section 2.1.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.masked_functions import identity, mixing_error, set_flag, tensors_among
from hyspark.models.masking.rules import MIXES_POSITIONS, RULES
from hyspark.models.recompute import recomputed

BATCH_NORMS = (F.batch_norm, torch.batch_norm)
"""Functions whose statistics are of all processes, for pooled values too."""
REPEATS: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.repeat_interleave, torch.broadcast_to, F.interpolate}
)
"""Functions that make a map of pooled values."""


def are_pooled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all tensors among a function's arguments, weights aside, are without positions."""
    tensors = [x for x in tensors_among(args, kwargs) if not is_weight(x)]
    return bool(tensors) and all(hasattr(x, "is_pooled") for x in tensors)


def is_weight(x: Tensor) -> bool:
    """Whether a tensor is a weight, or was computed from weights alone."""
    return isinstance(x, nn.Parameter) or hasattr(x, "is_weight")


def are_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all tensors among a function's arguments are weights."""
    tensors = tensors_among(args, kwargs)
    return bool(tensors) and all(map(is_weight, tensors))


class hidden(TorchFunctionMode):  # noqa: N801 - reads as a statement: `with hidden(visible):`
    """Context in which positions outside `visible` do not exist.

    Args:
        visible: bool (b, 1, *grid), True where the network sees. Maps inside are (b, ..., *size) or, channels last,
            (b, *size, c), with each axis of `size` a multiple or a divisor of the grid's. A position that covers
            several patches is visible where any of them is.
        safe: functions to leave unchanged, because the network does not apply them along positions.
        all_reduce: sum of a tensor over all processes, with gradients. BatchNorm then has the statistics of the
            global batch.

    Raises:
        NotImplementedError: inside the block, a function without a rule mixes positions.
        ValueError: inside the block, the grid neither divides a feature map nor is divided by it.
    """

    def __init__(
        self,
        visible: Tensor,
        safe: Collection[Callable[..., Any]] = (),
        all_reduce: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        super().__init__()
        self.visible = visible
        self.safe = frozenset(safe)
        self.all_reduce = all_reduce
        self.is_distributed = all_reduce is not identity
        self.axes = visible.ndim - 2
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.padded: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self.input_size: tuple[int, ...] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):  # torch.compile traces the network below torch functions
            return func(*args, **kwargs)
        if self.input_size is None:
            self.find_input(args)
        if func is recomputed:
            return self.recompute_inside(*args, **kwargs)
        if func in self.safe:
            return self.learn_size(func(*args, **kwargs), args)
        if are_weights(args, kwargs):
            return set_flag(func(*args, **kwargs), "is_weight")
        if func not in BATCH_NORMS and are_pooled(args, kwargs):  # ECA's convolution over channels
            out = func(*args, **kwargs)
            return out if self.is_repeated(func, args, out) else set_flag(out, "is_pooled")
        if func in MIXES_POSITIONS:
            raise mixing_error(func)
        rule = RULES.get(func)
        out = func(*args, **kwargs) if rule is None else rule(self, func, *args, **kwargs)
        return self.learn_size(out, args) if rule is None or func is Tensor.__getitem__ else out

    def recompute_inside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that is called again in the backward pass, both times inside this context."""

        def inside(*args: Any) -> Any:
            with self:
                return function(*args)

        return recomputed(inside, *args, **kwargs)

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """Return the mask at a resolution, bool (b, 1, *size), computed once for each.

        Raises:
            ValueError: the grid neither divides `size` nor is divided by it, or `size` is no multiple or divisor of the
                size of another map, so that patches would begin at other positions.
        """
        if size == self.input_size:
            self.input_size = ()  # not the size of an input that is resized first: other maps have to fit it
        if size not in self.masks:
            for other in self.masks.keys() - {self.input_size}:
                if len(other) != len(size) or any(max(a, b) % min(a, b) for a, b in zip(size, other, strict=True)):
                    raise ValueError(
                        f"the mask of maps of {other} does not divide a feature map of {size}: is there a convolution "
                        "or pool without padding?"
                    )
            self.masks[size] = visible_at(self.visible, size)
        return self.masks[size]

    def find_input(self, args: tuple[Any, ...]) -> None:
        """Make the size of the network's input known: that of the first map (b, c, *size) among arguments."""
        for x in args:
            if isinstance(x, Tensor) and not is_weight(x) and self.is_map(x) and self.has_batch(x):
                size = tuple(x.shape[2:])
                if not any(s % g for s, g in zip(size, self.visible.shape[2:], strict=True)):
                    self.masks.setdefault(size, visible_at(self.visible, size))
                    self.input_size = size
                    return

    def learn_size(self, out: Any, args: tuple[Any, ...]) -> Any:
        """Make the size of a map known that was enlarged or strided by a function without a rule; return the map."""
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(out, Tensor) and x.ndim == out.ndim == self.axes + 2:
            size, before = tuple(out.shape[2:]), tuple(x.shape[2:])
            is_resized = size not in self.masks and before in self.masks and x.shape[:2] == out.shape[:2]
            if (
                is_resized
                and self.is_map(out)
                and not any(
                    max(a, b) % min(a, b)
                    for other in (*self.masks.keys() - {self.input_size}, tuple(self.visible.shape[2:]))
                    for a, b in zip(size, other, strict=True)
                )
            ):
                self.mask(size)
        return out

    def is_repeated(self, func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> bool:
        """Whether a result of pooled values is a map; in 1D vectors of channels have the shape of one."""
        is_map = isinstance(out, Tensor) and self.is_map(out) and (self.axes > 1 or func in REPEATS)
        if not is_map or func in REPEATS:
            return bool(is_map)
        return max(out.shape[2:]) > 1 and all(out.numel() > x.numel() for x in args if isinstance(x, Tensor))

    def has_batch(self, x: Tensor) -> bool:
        """Whether the first axis of a tensor may be that of the mask."""
        return x.ndim > 0 and len(x) == len(self.visible)

    def spatial_axes(self, x: Tensor) -> list[range]:
        """List the candidates for the spatial axes of a tensor: the last axes, or those before a last channel axis.

        A tensor that is no map of a known size has none, and no weight has.
        """
        if is_weight(x):
            return []
        stops = [stop for stop in (x.ndim, x.ndim - 1) if stop > self.axes]
        return [
            range(stop - self.axes, stop) for stop in stops if tuple(x.shape[stop - self.axes : stop]) in self.masks
        ]

    def broadcast_mask(self, x: Tensor, spatial: range) -> Tensor:
        """Return the mask of a map (b, ...) with these spatial axes, in a shape that broadcasts over the map."""
        mask = self.mask(tuple(x.shape[spatial.start : spatial.stop]))
        shape = [len(mask), *(1,) * (x.ndim - 1)]
        shape[spatial.start : spatial.stop] = mask.shape[2:]
        return mask.reshape(shape)

    def pooling_masks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the mask of a map (b, c, *size), and the same with no patch hidden; both are zero in padding."""
        if self.padded is not None and self.is_padded(x):
            return self.padded[1]
        mask = self.mask(tuple(x.shape[2:]))
        return mask, torch.ones_like(mask)

    def is_padded(self, x: Tensor) -> bool:
        """Whether a map was just padded, with its hidden positions set."""
        return self.padded is not None and x is self.padded[0]

    def is_divided(self, x: Tensor) -> bool:
        """Whether positions of a map (b, c, *size) cover several patches, so that a pool may read hidden ones alone."""
        return any(s < g for s, g in zip(x.shape[2:], self.visible.shape[2:], strict=True))

    def fill(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Set hidden positions of a map (b, c, *size) to a value; a padded map already has it."""
        if self.is_padded(x):
            return x
        return torch.where(self.mask(tuple(x.shape[2:])), x, value)

    def is_map(self, x: Tensor) -> bool:
        """Whether a tensor has the axes of a map (b, c, *size), and more than one position if the grid has."""
        return x.ndim == self.axes + 2 and not (max(x.shape[2:]) == 1 < max(self.visible.shape[2:]))

    def is_flat_map(self, x: Tensor, dim: int) -> bool:
        """Whether an axis holds all positions of a known map in a row."""
        return x.shape[dim] in {math.prod(size) for size in self.masks}
