"""Densification: visible patches become a dense map, with a learned mask token at hidden positions.

Shapes: b batch, c channels, p visible patches, *edges voxels of a patch, *size voxels per axis.
"""

import torch
from torch import Tensor, nn

from hyspark.models.blocks import CONV, ChannelNorm
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.patches import Patches
from hyspark.models.recompute import recomputed


class Densify(nn.Module):
    """Densification of one feature map: visible patches (p, c_in, *edges) -> (b, c_out, *size).

    Visible positions are normalised over channels, hidden ones filled with a learned mask token. Then a convolution
    gives the decoder's width. Only the patches are kept for the backward pass.

    The norm is in SparK, but not named by the paper. Without it the decoder's BatchNorms reward an encoder with ever
    larger features. The contribution of later layers then vanishes beside these, and they are not trained.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, axes: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels)
        self.mask_token = nn.Parameter(torch.zeros(1, in_channels, *(1,) * axes))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.project = CONV[axes](in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        out: Tensor = recomputed(self.fill, x, self.mask_token, patches)
        return out

    def fill(self, x: Tensor, token: Tensor, patches: Patches) -> Tensor:
        """Compute `forward` without recomputation."""
        dense = patches.unpack(self.norm(x), token)
        if patches.are_divided:
            dense = dense.where(visible_at(patches.visible, dense.shape[2:]), token.to(dense.dtype))
        out: Tensor = self.project(dense)
        return out
