"""Segment whole volumes by sliding window, bring predictions back to the input's own grid, and score them there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.transforms import LoadImage, SpatialResample
from torch import nn

from hyspark.data.store import StoredVolume


@torch.no_grad()
def segment(
    model: nn.Module,
    volume: StoredVolume,
    device: torch.device,
    crop_size: Sequence[int],
    overlap: float,
    windows_per_pass: int,
) -> np.ndarray:
    """Label map of a prepared volume, uint8 (h, w, d) on the prepared grid: Gaussian-blended windows, most likely
    class.
    """
    shape = volume.entry.shape
    image = torch.from_numpy(volume.read("image", (0,) * len(shape), shape))[None, None]
    scores = sliding_window_inference(
        image.to(device), crop_size, windows_per_pass, model, overlap=overlap, mode="gaussian"
    )
    assert isinstance(scores, torch.Tensor)
    return scores[0].argmax(0).to(torch.uint8).cpu().numpy()


def load_label(path: Path) -> MetaTensor:
    """A label map as stored, (1, h, w, d), with its affine."""
    label: MetaTensor = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)(path)
    return label


def to_grid(prediction: np.ndarray, affine: Sequence[Sequence[float]], reference: MetaTensor) -> np.ndarray:
    """A label map on the prepared grid carried to the grid of `reference` (nearest voxel; background outside):
    uint8, its shape.

    prediction: (h, w, d). affine: of the prepared grid. reference: (1, *shape) with its affine.
    """
    moving = MetaTensor(torch.from_numpy(prediction)[None].float(), affine=torch.tensor(affine, dtype=torch.float64))
    resample = SpatialResample(mode="nearest", padding_mode="zeros", dtype="float64")
    out = resample(moving, dst_affine=reference.affine, spatial_size=reference.shape[1:])
    return out[0].to(torch.uint8).numpy()


def dice(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> list[float]:
    """Dice of each class but the background; NaN for a class that the truth does not hold. Both (h, w, d), whole
    numbers.
    """
    metric = DiceMetric(include_background=False, reduction="none", num_classes=num_classes, ignore_empty=True)
    values = metric(
        torch.from_numpy(prediction.astype(np.int64))[None, None],
        torch.from_numpy(truth.astype(np.int64))[None, None],
    )
    assert isinstance(values, torch.Tensor)
    return [float(v) for v in values[0]]


def mean_dice(rows: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Mean over cases of each class, leaving out the cases that do not hold it; NaN where none does.

    rows: one list per case, one value per class. names: of the classes, background excluded.
    """
    values = np.asarray(rows, dtype=np.float64).reshape(-1, len(names))
    held = ~np.isnan(values)
    sums = np.where(held, values, 0).sum(0)
    nums = held.sum(0)
    return {name: float(s / n) if n else float("nan") for name, s, n in zip(names, sums, nums, strict=True)}
