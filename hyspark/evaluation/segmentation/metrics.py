"""Agreement of a label map with the truth, by organ: Dice, HD95, normalised surface Dice, on the label's own grid.

Distances and surfaces are MONAI's, in mm:
- HD95 is the larger of two 95th percentiles, of the distances from the border voxels of one to those of the other.
  Distances are between voxel centres.
- The normalised surface Dice is the fraction of both surfaces, by area, within a tolerance of the other (Nikolov et
  al., arXiv 1809.04430).
- An organ that reaches the edge of the volume ends there.

Undefined scores are NaN. An organ that the truth does not hold has none. One that the truth holds and the prediction
does not is missed: its Dice and surface Dice are 0, its HD95 is undefined.

Voxels that the truth marks as UNANNOTATED count as background in both.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import find_objects

from hyspark.data.datasets.cases import UNANNOTATED

ORGAN_METRICS = {"dice": ("Dice", "{:.3f}"), "hd95_mm": ("HD95 (mm)", "{:.1f}"), "nsd": ("NSD", "{:.3f}")}
"""Metrics of an organ: by key, the heading and the format in tables."""
VOXEL_COUNTS = ("truth_voxels", "predicted_voxels")


@dataclass(frozen=True)
class OrganScores:
    """Scores of one organ of one case; NaN where undefined.

    Attributes:
        dice: Dice, 0 to 1.
        hd95_mm: HD95 in mm.
        nsd: Normalised surface Dice, 0 to 1.
        truth_voxels: Voxels of the organ in the truth, on the label's grid.
        predicted_voxels: Voxels of the organ in the prediction, on the label's grid.
    """

    dice: float
    hd95_mm: float
    nsd: float
    truth_voxels: int
    predicted_voxels: int


def dice(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> list[float]:
    """Compute the Dice of each class but the background; NaN for a class that the truth does not hold.

    Args:
        prediction: uint8, values below `num_classes`.
        truth: Likewise, or UNANNOTATED; of the same shape.
        num_classes: Number of classes, background included.
    """
    prediction, truth = without_ignored(prediction, truth)
    predicted, held, both = count_overlaps(prediction, truth, num_classes)
    return [2 * b / (p + t) if t else math.nan for p, t, b in zip(predicted[1:], held[1:], both[1:], strict=True)]


def without_ignored(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace the voxels that the truth marks as UNANNOTATED by background, in prediction and truth (of one shape)."""
    ignored = truth == UNANNOTATED
    if prediction.shape != truth.shape or not ignored.any():
        return prediction, truth
    return np.where(ignored, 0, prediction).astype(prediction.dtype), np.where(ignored, 0, truth).astype(truth.dtype)


def count_overlaps(
    prediction: np.ndarray, truth: np.ndarray, num_classes: int
) -> tuple[list[int], list[int], list[int]]:
    """Count the voxels of each class, background included: in the prediction, in the truth, in both.

    Raises:
        ValueError: The shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth differ in shape: {prediction.shape} and {truth.shape}")
    counts = [np.bincount(labels.ravel(), minlength=num_classes) for labels in (prediction, truth)]
    counts.append(np.bincount(truth[prediction == truth], minlength=num_classes))
    predicted, held, both = (count.tolist() for count in counts)
    return predicted, held, both


def score_case(
    prediction: np.ndarray, truth: np.ndarray, num_classes: int, spacing: Sequence[float], tolerance: float
) -> list[OrganScores]:
    """Score each class but the background, in their order.

    Args:
        prediction: uint8 (h, w, d), values below `num_classes`.
        truth: Likewise, or UNANNOTATED; of the same shape.
        num_classes: Number of classes, background included.
        spacing: Edges of a voxel in mm.
        tolerance: Tolerance of the normalised surface Dice in mm.

    Raises:
        ValueError: The shapes differ.
    """
    prediction, truth = without_ignored(prediction, truth)
    predicted, held, _ = count_overlaps(prediction, truth, num_classes)
    values = dice(prediction, truth, num_classes)
    boxes = [find_objects(labels, max_label=num_classes - 1) for labels in (prediction, truth)]
    scores = []
    for value in range(1, num_classes):
        hd95, nsd = math.nan, 0.0 if held[value] else math.nan
        if held[value] and predicted[value]:
            one, other = (found[value - 1] for found in boxes)
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
            hd95, nsd = score_surfaces(prediction[box] == value, truth[box] == value, spacing, tolerance)
        scores.append(OrganScores(values[value - 1], hd95, nsd, held[value], predicted[value]))
    return scores


def score_surfaces(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """Compute HD95 in mm and normalised surface Dice of two bool arrays (h, w, d), neither of them empty."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice  # takes seconds, and tables need none

    one, other = (torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (prediction, truth))
    mm = [float(edge) for edge in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 and 1.6 warn of their own calls
        hd95 = compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=mm)
        nsd = compute_surface_dice(one, other, [tolerance], include_background=True, spacing=mm, use_subvoxels=True)
    return float(hd95), float(nsd)
