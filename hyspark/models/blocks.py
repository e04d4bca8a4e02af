"""Building blocks of the convolutional part: MedNeXt block and up-block, residual fusion block.

The same code serves two or three spatial axes. The blocks know of no mask: `hidden` and `packed` exclude hidden voxels
from outside. Attribute names are those of the released weights.

Shapes: b batch, c channels, *size voxels per axis.
Source: Roy et al., "MedNeXt", MICCAI 2023, as used by HySparK's public release.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyspark.models.recompute import recomputed

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_FUNCTION = {2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a channels-first map, position by position: (b, c, *size) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class MedNeXtBlock(nn.Module):
    """Residual block: depthwise 3^n convolution, norm, pointwise expansion, GELU, projection. (b, c, *size) -> same.

    Args:
        channels: of input and output.
        expansion: ratio of the expansion.
        axes: number of spatial axes.
        recompute: compute the layers after the depthwise convolution again in the backward pass, to save memory.
    """

    def __init__(self, channels: int, expansion: int, axes: int = 3, recompute: bool = False) -> None:
        super().__init__()
        conv = CONV[axes]
        self.recompute = recompute
        self.conv1 = conv(channels, channels, 3, padding=1, groups=channels)
        self.norm = ChannelNorm(channels)
        self.conv2 = conv(channels, expansion * channels, 1)
        self.conv3 = conv(expansion * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.depthwise(x)
        return x + (recomputed(self.pointwise, branch) if self.recompute else self.pointwise(branch))

    def pointwise(self, x: Tensor) -> Tensor:
        """Apply the layers after the depthwise convolution, position by position."""
        out: Tensor = self.conv3(F.gelu(self.conv2(self.norm(x))))
        return out

    def depthwise(self, x: Tensor) -> Tensor:
        """Apply `conv1`, in fp32 on a CPU if an axis has fewer than 3 positions.

        For such maps torch's bf16 channels-last kernel fills weight gradients from uninitialised memory (torch 2.15).
        """
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and min(x.shape[2:]) < 3:
            with torch.autocast("cpu", enabled=False):
                widened: Tensor = self.conv1(x.float())
                return widened
        out: Tensor = self.conv1(x)
        return out


class MedNeXtUpBlock(nn.Module):
    """Residual up-sampling block of stride 2: (b, c_in, *size) -> (b, c_out, *(2 * size)).

    A transposed convolution of stride 2 gives 2 * size - 1 positions. Both branches are padded by one zero at the
    front of each axis.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, axes: int = 3) -> None:
        super().__init__()
        conv, up = CONV[axes], CONV_TRANSPOSE[axes]
        self.conv1 = up(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels)
        self.norm = ChannelNorm(in_channels)
        self.conv2 = conv(in_channels, expansion * in_channels, 1)
        self.conv3 = conv(expansion * in_channels, out_channels, 1)
        self.res_conv = up(in_channels, out_channels, 1, stride=2)
        self.front = (1, 0) * axes

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv3(F.gelu(self.conv2(self.norm(self.conv1(x)))))
        return F.pad(branch, self.front) + F.pad(self.res_conv(x), self.front)


class FusionBlock(nn.Module):
    """Residual block that merges a skip and an up-sampled map.

    (b, c_skip, *size), (b, c, *size) -> (b, c_out, *size).
    """

    def __init__(self, in_channels: int, out_channels: int, axes: int = 3) -> None:
        super().__init__()
        conv = CONV[axes]
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.conv3 = conv(in_channels, out_channels, 1)
        self.norm = INSTANCE_NORM[axes](out_channels)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        x = torch.cat([skip, up], dim=1)
        main = self.norm(self.conv2(F.leaky_relu(self.norm(self.conv1(x)), 0.01)))
        return F.leaky_relu(main + self.norm(self.conv3(x)), 0.01)
