"""`with hidden(visible):` any network, in 2D or 3D, computes as if hidden positions did not exist.

The context intercepts torch functions, so the network inside needs no special layers and its weights are its own. What
a function means where positions are hidden, rules.py says. Pointwise functions need nothing: what they make of a
hidden position is not read, as every rule leaves hidden positions of its input out. A function that mixes positions in
a way that no rule knows is refused by name rather than computed wrongly, unless declared safe.

The mask belongs to the context object. Nothing stays behind when the block ends, and activation checkpointing is
right as long as the block lies inside the checkpointed function. (The other way round torch raises in the backward
pass: without the block other tensors are saved.)

Source: the rules of Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023, and of HySparK, MICCAI
2024, section 2.1.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.rules import MIXES_POSITIONS, RULES, mixes


def identity(x: Tensor) -> Tensor:
    """The sum over one process."""
    return x


class hidden(TorchFunctionMode):  # noqa: N801 - reads as a statement: `with hidden(visible):`
    """Compute as if the positions outside `visible` did not exist.

    Args:
        visible: bool (b, 1, *grid), True where the network sees. Its maps are (b, ..., *size) or, channels last,
        (b, *size, c), with each axis of `size` a multiple of the grid's.
        safe: functions to leave as they are, where a network is known to use them on other things than positions.
        total: sum of a tensor over all processes, with gradients, where the statistics of BatchNorm are to be those
        of the global batch.

    Raises, inside the block: NotImplementedError for a function that mixes positions in a way that no rule knows;
    ValueError for a feature map that the grid does not divide.
    """

    def __init__(
        self,
        visible: Tensor,
        safe: Collection[Callable[..., Any]] = (),
        total: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        super().__init__()
        self.visible = visible
        self.safe = frozenset(safe)
        self.total = total
        self.is_shared = total is not identity
        self.axes = visible.ndim - 2
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.padded: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.safe:
            return func(*args, **kwargs)
        if func in MIXES_POSITIONS:
            raise mixes(func)
        rule = RULES.get(func)
        return func(*args, **kwargs) if rule is None else rule(self, func, *args, **kwargs)

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """The mask at a resolution, made once for each: bool (b, 1, *size).

        Raises ValueError where the grid does not divide it, or where its positions are no whole multiples of those of
        the other maps, so that patches would not begin where they do there.
        """
        if size not in self.masks:
            for other in self.masks:
                if len(other) != len(size) or any(max(a, b) % min(a, b) for a, b in zip(size, other, strict=True)):
                    raise ValueError(
                        f"the mask of maps of {other} does not divide a feature map of {size}: is there a convolution "
                        "or pool without padding?"
                    )
            self.masks[size] = visible_at(self.visible, size)
        return self.masks[size]

    def spatial(self, x: Tensor) -> list[range]:
        """Where the spatial axes of a tensor may be: the last ones, or, channels last, those before the last; nowhere
        where it is no map of a known size.
        """
        stops = [stop for stop in (x.ndim, x.ndim - 1) if stop > self.axes]
        return [
            range(stop - self.axes, stop) for stop in stops if tuple(x.shape[stop - self.axes : stop]) in self.masks
        ]

    def over(self, x: Tensor, spatial: range) -> Tensor:
        """The mask of a map (b, ...) with these spatial axes, to be broadcast over it."""
        mask = self.mask(tuple(x.shape[spatial.start : spatial.stop]))
        shape = [len(mask), *(1,) * (x.ndim - 1)]
        shape[spatial.start : spatial.stop] = mask.shape[2:]
        return mask.reshape(shape)

    def seen(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of a map (b, c, *size): its mask, and that with nothing hidden; zero where it was padded."""
        if self.padded is not None and x is self.padded[0]:
            return self.padded[1]
        mask = self.mask(tuple(x.shape[2:]))
        return mask, torch.ones_like(mask)

    def filled(self, x: Tensor, value: float = 0.0) -> Tensor:
        """A map (b, c, *size) with a value at hidden positions. What was padded has the right one already."""
        if self.padded is not None and x is self.padded[0]:
            return x
        return torch.where(self.mask(tuple(x.shape[2:])), x, value)

    def is_map(self, x: Tensor) -> bool:
        """Whether it has the axes of a map (b, c, *size), and more than one position where the grid has."""
        return x.ndim == self.axes + 2 and not (max(x.shape[2:]) == 1 < max(self.visible.shape[2:]))

    def is_row(self, x: Tensor, dim: int) -> bool:
        """Whether an axis holds all positions of a known map, one after the other."""
        return x.shape[dim] in {math.prod(size) for size in self.masks}
