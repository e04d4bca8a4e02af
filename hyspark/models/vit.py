"""The transformer on the deepest feature map: fixed sin-cos positions, timm blocks, visible tokens only.

Shapes: b batch, c channels, *grid tokens per axis, n = prod(grid) tokens, v visible tokens of a sample.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def sincos_position(grid: Sequence[int], channels: int) -> Tensor:
    """Fixed positions of a grid of tokens: float32 (1, n, channels), tokens in row-major order.

    Each axis has channels / (2 * axes) frequencies w_k = 10000^(-k / count); channels are sin then cos of the first
    axis, then of the next. Raises ValueError where the channels do not divide so.

    Source: the sin-cos embedding of MoCo v3 and MAE, carried to three axes as in HySparK's public release.
    """
    count, rest = divmod(channels, 2 * len(grid))
    if rest:
        raise ValueError(
            f"positions on {len(grid)} axes need a width that is a multiple of {2 * len(grid)}, but it is {channels}"
        )
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    axes = torch.meshgrid(*(torch.arange(g, dtype=torch.float64) for g in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


class TokenTransformer(nn.Module):
    """Pre-norm transformer over the tokens of a feature map, (b, c, *grid) -> same; hidden tokens take no part and
    come out as zero.

    `grid` is the one `pos_embed` is stored for, as in the released weights; other grids get positions of their own
    in `forward`.
    """

    def __init__(self, channels: int, depth: int, num_heads: int, grid: Sequence[int]) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"the last encoder width must be a multiple of the {num_heads} attention heads, but it is {channels}"
            )
        self.grid = tuple(grid)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_position(grid, channels))
        norm: Any = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(channels, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(channels)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Positions (1, n, c) of any grid: the stored ones for the grid of the model, computed for another."""
        if tuple(grid) == self.grid:
            return self.pos_embed
        return sincos_position(grid, self.pos_embed.shape[-1]).to(self.pos_embed.device)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """x: (b, c, *grid). visible: bool (b, 1, *grid) with equally many True in every sample, or None for all tokens.

        Raises ValueError where the samples keep different numbers of tokens.
        """
        b, c, *grid = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (b, n, c)
        tokens = tokens + self.positions(grid).to(tokens.dtype)
        if visible is None:
            return self.process(tokens).transpose(1, 2).reshape(b, c, *grid)
        index = visible_tokens(visible)[..., None].expand(-1, -1, c)  # (b, v, c)
        processed = self.process(tokens.gather(1, index))
        out = torch.zeros(b, math.prod(grid), c, dtype=processed.dtype, device=x.device)
        return out.scatter(1, index, processed).transpose(1, 2).reshape(b, c, *grid)

    def process(self, tokens: Tensor) -> Tensor:
        """(b, v, c) -> same."""
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens)
        return out


def visible_tokens(visible: Tensor) -> Tensor:
    """Row-major numbers of the visible tokens: bool (b, 1, *grid) -> int64 (b, v), ascending."""
    rows = visible.flatten(1)
    nums = rows.sum(1)
    if (nums != nums[0]).any() or nums[0] == 0:
        raise ValueError(
            f"every sample of a batch must keep the same number of patches, at least one; they keep {nums.tolist()}"
        )
    return rows.nonzero()[:, 1].view(len(rows), -1)
