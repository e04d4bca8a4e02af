"""The loss of segmentation: Dice and cross entropy, whose mean over micro-batches is that of the batch."""

from typing import Any

import torch
from monai.losses import DiceLoss
from monai.networks import one_hot
from torch import Tensor, nn

from hyspark.data.datasets.cases import UNANNOTATED


class DiceAndCrossEntropy(nn.Module):
    """Dice and cross entropy, in both of which the background counts `background_weight` times as much as an organ.

    A weighted cross entropy is divided by the sum of its voxels' weights, which differs between micro-batches. So the
    caller passes the mean of these sums over micro-batches and processes. Then the mean of the losses is that of the
    whole batch. Voxels of the label value UNANNOTATED count in neither part; their gradient is exactly 0.

    Args:
        num_classes: Number of classes, background included.
        background_weight: Weight of the background.
        has_ignored: Whether labels may hold UNANNOTATED. To look it up in a GPU's labels would make every step wait.
    """

    def __init__(self, num_classes: int, background_weight: float = 1.0, *, has_ignored: bool = False) -> None:
        super().__init__()
        self.background_weight, self.has_ignored = background_weight, has_ignored
        weight = torch.tensor([background_weight] + [1.0] * (num_classes - 1))
        options: dict[str, Any] = {"squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6, "weight": weight}
        self.dice = DiceLoss(to_onehot_y=True, softmax=True, **options)
        self.masked_dice = DiceLoss(**options)
        self.register_buffer("weight", weight)

    def weight_sum(self, labels: Tensor) -> Tensor:
        """Sum the weights of the voxels of label values, any shape -> scalar above 0."""
        ignored = (labels == UNANNOTATED).sum()
        organs = labels.count_nonzero() - ignored
        total = organs + self.background_weight * (labels.numel() - ignored - organs)
        return total.clamp(min=torch.finfo(torch.float32).tiny)

    def forward(self, scores: Tensor, labels: Tensor, weight_sum: float) -> Tensor:
        """Compute the scalar loss.

        Args:
            scores: Class scores (b, n, *size).
            labels: Label values (b, 1, *size).
            weight_sum: Mean of `weight_sum` over all micro-batches.
        """
        weight = self.get_buffer("weight")
        # Summed apart: torch's own sum over voxels has no deterministic kernel on CUDA.
        cross_entropy = nn.functional.cross_entropy(
            scores, labels[:, 0].long(), weight, ignore_index=UNANNOTATED, reduction="none"
        )
        dice: Tensor
        if self.has_ignored:
            keep = labels != UNANNOTATED
            held = one_hot(labels * keep, scores.shape[1])
            dice = self.masked_dice(scores.softmax(1) * keep, held * keep)
        else:
            dice = self.dice(scores, labels)
        return dice + cross_entropy.sum() / weight_sum
