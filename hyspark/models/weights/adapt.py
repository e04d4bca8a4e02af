"""Adapt values to a network: to other input channels, and to other numbers of patches."""

import math
import re
from collections.abc import Iterable

from timm.layers import resample_abs_pos_embed
from torch import Tensor

POSITIONS = re.compile(r"(^|\.)pos_embed(ding)?$")
"""Names of learned positions (1, n, c) in transformers of timm and torchvision."""
MOST_TOKENS = 8
"""Most tokens before those of the patches: class, distillation, registers."""


def is_stem(value: Tensor, want: Tensor) -> bool:
    """Whether two weights (c, n_in, *kernel) of a convolution of images differ in their input channels only."""
    return value.ndim == want.ndim >= 4 and len(value) == len(want) and value.shape[2:] == want.shape[2:]


def stem_channels(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, int] | None:
    """Find the input channels of a network's first convolution, in the file and in the network.

    Args:
        pairs: values of the file and of the network, in the network's order.

    Returns:
        Two numbers of channels; None if they agree, or if the convolutions differ otherwise too.
    """
    value, want = next(((v, w) for v, w in pairs if v.ndim >= 4), (None, None))
    if value is None or want is None or not is_stem(value, want) or value.shape == want.shape:
        return None
    return value.shape[1], want.shape[1]


def adapt_channels(weight: Tensor, num_channels: int) -> Tensor:
    """Adapt a stem weight (c, n_in, *k) to another number of input channels.

    Each new channel gets the mean over the old ones, scaled to preserve the size of the response.
    """
    mean = weight.sum(dim=1, keepdim=True) / num_channels
    return mean.expand(-1, num_channels, *mean.shape[2:]).clone()


def resample_positions(value: Tensor, want: Tensor) -> Tensor | None:
    """Resample the positions of square images to another size, by timm; None if the grids are others.

    Args:
        value: positions (1, n, c), those of a class token and the like first.
        want: positions of the network (1, m, c).
    """
    if value.ndim != 3 or want.ndim != 3 or len(value) != 1 or value.shape[2] != want.shape[2]:
        return None
    for num_tokens in (1, 0, *range(2, MOST_TOKENS + 1)):
        old, new = (math.isqrt(max(0, x.shape[1] - num_tokens)) for x in (value, want))
        if old and new and (old * old, new * new) == (value.shape[1] - num_tokens, want.shape[1] - num_tokens):
            resampled: Tensor = resample_abs_pos_embed(value, [new, new], [old, old], num_prefix_tokens=num_tokens)
            return resampled
    return None
