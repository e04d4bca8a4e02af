"""Transformer on the deepest feature map: fixed sin-cos positions, timm blocks, visible tokens only.

Shapes: b batch, c channels, *grid tokens per axis, n = prod(grid) tokens, v visible tokens of a sample, p of the batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hyspark.models.masking.patches import Patches


def sincos_position(grid: Sequence[int], channels: int) -> Tensor:
    """Compute the fixed position embedding of a grid of tokens.

    Each axis has channels / (2 * axes) frequencies w_k = 10000^(-k / count). Channels are sin then cos of the first
    axis, then of the next.
    Source: the sin-cos embedding of MoCo v3 and MAE, extended to three axes as in HySparK's public release.

    Args:
        grid: tokens per axis.
        channels: width of a token.

    Returns:
        float32 (1, n, channels), tokens in row-major order.

    Raises:
        ValueError: `channels` is not a multiple of 2 * axes.
    """
    count, rest = divmod(channels, 2 * len(grid))
    if rest:
        raise ValueError(
            f"width of the position embedding: expected a multiple of {2 * len(grid)} for {len(grid)} axes, "
            f"got {channels}"
        )
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    axes = torch.meshgrid(*(torch.arange(g, dtype=torch.float64) for g in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


class TokenTransformer(nn.Module):
    """Pre-norm transformer over all or only the visible tokens of a feature map, (b, c, *grid) -> same.

    Args:
        channels: width of a token.
        depth: number of blocks.
        num_heads: attention heads.
        grid: tokens per axis of the stored `pos_embed`, as in the released weights. `forward` computes the positions
            of other grids.

    Raises:
        ValueError: `num_heads` does not divide `channels`.
    """

    def __init__(self, channels: int, depth: int, num_heads: int, grid: Sequence[int]) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"last encoder width: expected a multiple of the {num_heads} attention heads, got {channels}"
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
        """Return the position embedding (1, n, c) of a grid: stored for the model's own, computed for others."""
        if tuple(grid) == self.grid:
            return self.pos_embed
        return sincos_position(grid, self.pos_embed.shape[-1]).to(self.pos_embed.device)

    def forward(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        """Transform the tokens of a map.

        Args:
            x: (b, c, *grid), or packed patches of one voxel (p, c, *ones).
            patches: geometry of packed patches; None for a dense map.

        Returns:
            A map of the same shape.
        """
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
        """Apply the blocks and the norm to tokens (b, v, c); is_token is bool (b, 1, 1, v), False at padding."""
        for block in self.blocks:
            tokens = block(tokens, attn_mask=is_token)
        out: Tensor = self.norm(tokens)
        return out
