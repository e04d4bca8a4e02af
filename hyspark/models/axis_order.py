"""Run a network on arrays whose axes are in another order than its own."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class PermutedAxes(nn.Module):
    """A network for arrays of other axes: (b, c, *size) is permuted on the way in, and back on the way out.

    Args:
        network: the network, whose output has the axes of its input.
        order: the network's axis that is each spatial axis of the arrays, e.g. 2, 1, 0 for arrays z, y, x.
    """

    def __init__(self, network: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.inward = (0, 1, *(2 + list(order).index(axis) for axis in range(len(order))))
        self.outward = (0, 1, *(2 + axis for axis in order))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x.permute(self.inward))
        return out.permute(self.outward)

    def encoder_layers(self) -> dict[str, int | None]:
        """Return the index of the layer of each parameter of the network's encoder."""
        network: Any = self.network
        return {f"network.{name}": layer for name, layer in network.encoder_layers().items()}
