"""Densification: visible patches become a dense map, with a learned mask token at hidden positions.

Shapes: b batch, c channels, p visible patches, *edges voxels of a patch, *size voxels per axis.
"""

import math

import torch
from torch import Tensor, nn

from hyspark.models.blocks import CONV, ChannelNorm
from hyspark.models.masking.borders import pack_with_border
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.patches import Patches
from hyspark.models.masking.reconstructed import unpadded
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

    def forward(self, x: Tensor, patches: Patches, reconstructed: Patches | None = None) -> Tensor:
        """Densify the map of visible patches.

        Args:
            x: (p, c_in, *edges).
            patches: visible patches.
            reconstructed: patches to return; None for all, as a dense map.

        Returns:
            (b, c_out, *size), or reconstructed patches with a border of one voxel, zero outside of the crop.
        """
        out: Tensor = recomputed(self.fill, x, self.mask_token, patches, reconstructed)
        return out

    def fill(self, x: Tensor, token: Tensor, patches: Patches, reconstructed: Patches | None) -> Tensor:
        """Compute `forward` without recomputation."""
        dense = patches.unpack(self.norm(x), token)
        if patches.are_divided:
            dense = dense.where(visible_at(patches.visible, dense.shape[2:]), token.to(dense.dtype))
        if reconstructed is None:
            out: Tensor = self.project(dense)
            return out
        outer = [s // g + 2 for s, g in zip(dense.shape[2:], reconstructed.grid, strict=True)]
        if len(dense) * math.prod(dense.shape[2:]) <= len(reconstructed) * math.prod(outer):
            return pack_with_border(self.project(dense), reconstructed, 1)
        out = unpadded(self.project)(pack_with_border(dense, reconstructed, 2))
        inside = pack_with_border(torch.ones_like(dense[:, :1]), reconstructed, 1)
        return out * inside.to(out.dtype)  # the dense convolutions pad with zeros
