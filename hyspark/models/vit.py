"""The transformer on the deepest feature map: fixed sin-cos positions, timm blocks, visible tokens only.

Shapes: b batch, c channels, *grid tokens per axis, n = prod(grid) tokens, v visible tokens of a sample, p of the batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hyspark.models.masking.packed import Patches


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
    """Pre-norm transformer over the tokens of a feature map, (b, c, *grid) -> same, or over the visible ones alone,
    each sample by itself.

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
        self.num_heads = num_heads
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

    def forward(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        """x: (b, c, *grid), or, given their geometry, packed patches of one voxel: (p, c, *ones) -> same."""
        if patches is None:
            b, c, *grid = x.shape
            tokens = x.flatten(2).transpose(1, 2)  # (b, n, c)
            tokens = tokens + self.positions(grid).to(tokens.dtype)
            return self.process(tokens).transpose(1, 2).reshape(b, c, *grid)
        rows = x.flatten(1)  # (p, c)
        rows = rows + self.positions(patches.grid)[0, patches.token].to(rows.dtype)
        tokens, is_token = patches.tokens(rows)
        return patches.from_tokens(self.process(tokens, is_token)).view(-1, x.shape[1], *x.shape[2:])

    def process(self, tokens: Tensor, is_token: Tensor | None = None) -> Tensor:
        """(b, v, c) -> same. is_token: bool (b, 1, 1, v), False at padding that nothing may attend to."""
        for block in self.blocks:
            tokens = block(tokens, attn_mask=is_token)
        out: Tensor = self.norm(tokens)
        return out
