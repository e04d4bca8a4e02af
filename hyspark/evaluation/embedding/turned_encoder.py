"""A network whose axes are in another order than x, y, z, as an encoder of volumes."""

from collections.abc import Sequence

from torch import Tensor, nn

from hyspark.models.axis_order import inverse_order, permute_axes
from hyspark.models.nnunet_plans import to_volume_axes
from hyspark.models.spark import PyramidEncoder


class TurnedEncoder(nn.Module):
    """Encoder of windows (b, c, *size), axes x, y, z. One channel is repeated for a network of several.

    Args:
        encoder: The network's encoder.
        order: Axis of x, y, z (0, 1, 2) that is each axis of the network.
    """

    def __init__(self, encoder: PyramidEncoder, order: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.order = encoder, tuple(order)

    @property
    def backbone(self) -> nn.Module:
        """The third-party network."""
        return self.encoder.backbone

    @property
    def patch(self) -> tuple[int, ...]:
        """Edges that windows are multiples of, axes x, y, z."""
        return to_volume_axes(self.encoder.patch, self.order)

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """Compute the maps of windows, finest first, axes x, y, z."""
        given = volumes.expand(-1, self.encoder.in_channels, -1, -1, -1)
        maps = self.encoder(permute_axes(given, self.order).contiguous())
        return [permute_axes(x, inverse_order(self.order)) for x in maps]
