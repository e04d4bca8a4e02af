"""Axes in another order than a network's own."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn


def permute_axes(x: Tensor, order: Sequence[int]) -> Tensor:
    """Permute the last axes of a tensor: the axis `order[i]` of (..., *size) becomes axis i of the result."""
    first = x.ndim - len(order)
    return x.permute(*range(first), *(first + axis for axis in order))


def relative_order(order: Sequence[int], other: Iterable[int]) -> tuple[int, ...]:
    """Return the axes of a tensor in one order as they come in another, for `permute_axes`."""
    return tuple(list(order).index(axis) for axis in other)


def inverse_order(order: Sequence[int]) -> tuple[int, ...]:
    """Return the order that undoes one."""
    return relative_order(order, range(len(order)))


class PermutedAxes(nn.Module):
    """A network for arrays of other axes: (b, c, *size) is permuted on the way in, and back on the way out.

    Args:
        network: the network, whose output has the axes of its input.
        order: the network's axis that is each spatial axis of the arrays, e.g. 2, 1, 0 for arrays z, y, x.
    """

    def __init__(self, network: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.order = tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        return permute_axes(self.network(permute_axes(x, inverse_order(self.order))), self.order)

    def encoder_layers(self) -> dict[str, int | None]:
        """Return the index of the layer of each parameter of the network's encoder."""
        network: Any = self.network
        return {f"network.{name}": layer for name, layer in network.encoder_layers().items()}
