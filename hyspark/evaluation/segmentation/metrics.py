"""How well a label map agrees with the truth, organ by organ: Dice, HD95, normalised surface Dice; on the label's own
grid, distances in mm.

Distances and surfaces are MONAI's. HD95 is the larger of the two 95th percentiles (of the distances from the border
voxels of one to the other's), between voxel centres. The normalised surface Dice is the share of both surfaces, by
area, that lies within a tolerance of the other (Nikolov et al., arXiv 1809.04430). An organ that reaches the edge of
the volume ends there.

An organ that the truth does not hold has no scores (NaN). One that the truth holds and the prediction does not is
missed: Dice and surface Dice 0, HD95 NaN, since no distance is.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import find_objects

METRICS = ("dice", "hd95_mm", "nsd")


@dataclass(frozen=True)
class OrganScores:
    """One organ of one case. dice, nsd: 0..1; hd95_mm: mm; NaN where undefined. Voxel counts on the label's grid."""

    dice: float
    hd95_mm: float
    nsd: float
    truth_voxels: int
    predicted_voxels: int


def dice(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> list[float]:
    """Dice of each class but the background; NaN for a class that the truth does not hold.

    Both uint8, of one shape, values below `num_classes`.
    """
    predicted, held, both = overlaps(prediction, truth, num_classes)
    return [2 * b / (p + t) if t else math.nan for p, t, b in zip(predicted[1:], held[1:], both[1:], strict=True)]


def overlaps(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> tuple[list[int], list[int], list[int]]:
    """Voxels of each class, background included: in the prediction, in the truth, in both."""
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth differ in shape: {prediction.shape} and {truth.shape}")
    parts = [np.bincount(part.ravel(), minlength=num_classes) for part in (prediction, truth)]
    parts.append(np.bincount(truth[prediction == truth], minlength=num_classes))
    predicted, held, both = (part.tolist() for part in parts)
    return predicted, held, both


def score_case(
    prediction: np.ndarray, truth: np.ndarray, num_classes: int, spacing: Sequence[float], tolerance: float
) -> list[OrganScores]:
    """Scores of each class but the background, in their order.

    prediction, truth: uint8 (h, w, d), values below `num_classes`. spacing: mm per voxel. tolerance: mm, of the
    normalised surface Dice. Raises ValueError where the shapes differ.
    """
    predicted, held, _ = overlaps(prediction, truth, num_classes)
    values = dice(prediction, truth, num_classes)
    boxes = [find_objects(part, max_label=num_classes - 1) for part in (prediction, truth)]
    scores = []
    for value in range(1, num_classes):
        hd95, nsd = math.nan, 0.0 if held[value] else math.nan
        if held[value] and predicted[value]:
            one, other = (part[value - 1] for part in boxes)
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
            hd95, nsd = surface_scores(prediction[box] == value, truth[box] == value, spacing, tolerance)
        scores.append(OrganScores(values[value - 1], hd95, nsd, held[value], predicted[value]))
    return scores


def surface_scores(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """HD95 in mm and normalised surface Dice of two bool arrays (h, w, d), neither of them empty."""
    one, other = (torch.from_numpy(part.astype(np.float32))[None, None] for part in (prediction, truth))
    mm = [float(edge) for edge in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 and 1.6 warn of what they do themselves
        hd95 = compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=mm)
        nsd = compute_surface_dice(one, other, [tolerance], include_background=True, spacing=mm, use_subvoxels=True)
    return float(hd95), float(nsd)
