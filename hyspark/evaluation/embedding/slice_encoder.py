"""A network of 2D slices as an encoder of volumes: each slice by itself, the maps stacked again."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyspark.models.spark import PyramidEncoder

SLICES_PER_WINDOW = 8


class SliceEncoder(nn.Module):
    """Encoder of windows (b, c, *size) by a network of slices (b, c, *size without an axis).

    Args:
        encoder: The network of slices.
        axis: Axis that slices are perpendicular to.
        own_range: Whether each slice is scaled by its own smallest and largest value.
    """

    def __init__(self, encoder: PyramidEncoder, axis: int, own_range: bool = False) -> None:
        super().__init__()
        self.encoder, self.axis, self.own_range = encoder, axis, own_range

    @property
    def backbone(self) -> nn.Module:
        """The third-party network."""
        return self.encoder.backbone

    @property
    def patch(self) -> tuple[int, ...]:
        """Edges that windows are multiples of: 1 across slices."""
        return insert_axis(self.encoder.patch, self.axis, 1)

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """Compute the maps of a window, finest first; they have all slices."""
        slices = volumes.movedim(2 + self.axis, 1)
        images = slices.flatten(0, 1)
        if self.own_range:
            low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
            images = (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)
        maps = self.encoder(images.expand(-1, self.encoder.in_channels, -1, -1))
        return [x.unflatten(0, slices.shape[:2]).movedim(1, 2 + self.axis) for x in maps]


def insert_axis(edges: Sequence[int], axis: int, value: int) -> tuple[int, ...]:
    """Insert the number of an axis among those of the two others."""
    return (*edges[:axis], value, *edges[axis:])


def drop_axis(edges: Sequence[int], axis: int) -> tuple[int, ...]:
    """Return the numbers of the other axes."""
    return (*edges[:axis], *edges[axis + 1 :])
