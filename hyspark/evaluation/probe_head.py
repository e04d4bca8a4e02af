"""The linear head of the probe: its fit on features of voxels, and its scores at every voxel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTY = 3e-3
"""Weight of the squared coefficients (of features with deviation 1) beside the mean cross entropy."""
MAX_ITERATIONS = 30
"""Of L-BFGS; twice as many changed the Dice by .01."""
IGNORED = -1
"""Label of voxels whose class is not in both halves."""


def count_voxels_by_class(labels: Tensor, num_classes: int) -> Tensor:
    """Count the voxels of each class, int64 (num_classes,), without the ignored ones."""
    return torch.bincount(labels[labels != IGNORED].flatten(), minlength=num_classes)


def fit_head(features: Tensor, labels: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression.

    Args:
        features: (n, c).
        labels: int64 (n,).
        fractions: Of the classes among all voxels, (classes,). The intercepts go half the way to them.

    Returns:
        Weight (classes, c) and bias (classes,) for features without normalisation.
    """
    num_classes = len(fractions)
    centre, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - centre) / scale
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + PENALTY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    drawn = count_voxels_by_class(labels, num_classes) / len(labels)
    return weight, bias - weight @ centre + (fractions / drawn).log() / 2


def probe_scores(maps: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the head at every voxel: (1, classes, *size).

    It is applied to each map before its interpolation, which gives the same with less work, since both are linear.
    """
    size = maps[0].shape[2:]
    scores = bias[:, None, None, None]
    for x, w in zip(maps, weight.split([x.shape[1] for x in maps], dim=1), strict=True):
        part = F.conv3d(x, w[:, :, None, None, None])
        scores = scores + F.interpolate(part, size, mode="trilinear", align_corners=False)
    return scores
