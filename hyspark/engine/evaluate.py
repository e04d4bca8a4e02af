"""Segment whole volumes by sliding window, bring predictions back to the input's own grid, and score them there."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.transforms import LoadImage, SpatialResample
from torch import Tensor, nn

from hyspark.atomic import write_whole
from hyspark.data.store import StoredVolume


def segment(
    model: nn.Module,
    volume: StoredVolume,
    device: torch.device,
    crop_size: Sequence[int],
    overlap: float,
    windows_per_pass: int,
) -> Tensor:
    """Label map of a prepared volume, uint8 (h, w, d) on the CPU, on the prepared grid: Gaussian-blended windows,
    likeliest class.
    """
    shape = volume.entry.shape
    image = torch.from_numpy(volume.read("image", (0,) * len(shape), shape))[None, None]
    scores = sliding_window_inference(
        image.to(device), crop_size, windows_per_pass, model, overlap=overlap, mode="gaussian"
    )
    assert isinstance(scores, Tensor)
    return scores[0].argmax(0).to(torch.uint8).cpu()


def load_label(path: Path) -> MetaTensor:
    """A label map as stored, (1, h, w, d), with its affine."""
    label: MetaTensor = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)(path)
    return label


def to_grid(prediction: Tensor, affine: Sequence[Sequence[float]], reference: MetaTensor) -> Tensor:
    """A label map carried to the grid of `reference`, nearest voxel, background outside: uint8 (1, *shape of the
    reference).

    prediction: (h, w, d). affine: of its grid, to RAS mm. reference: (1, *shape) with its affine.
    """
    moving = MetaTensor(prediction[None].float(), affine=torch.tensor(affine, dtype=torch.float64))
    resample = SpatialResample(mode="nearest", padding_mode="zeros", dtype="float64")
    out = resample(moving, dst_affine=reference.affine, spatial_size=reference.shape[1:])
    return torch.as_tensor(out).to(torch.uint8)


def dice(prediction: Tensor, truth: Tensor, num_classes: int) -> list[float]:
    """Dice of each class but the background; NaN for a class that the truth does not hold. Both (1, h, w, d), whole
    numbers.
    """
    metric = DiceMetric(include_background=False, reduction="none", num_classes=num_classes, ignore_empty=True)
    values = metric(torch.as_tensor(prediction)[None].long(), torch.as_tensor(truth)[None].long())
    assert isinstance(values, Tensor)
    return [float(v) for v in values[0]]


def mean_dice(rows: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Mean over cases of each class, leaving out the cases that do not hold it; NaN where none does.

    rows: one list per case, one value per class. names: of the classes, background excluded.
    """
    values = np.asarray(rows, dtype=np.float64).reshape(-1, len(names))
    held = ~np.isnan(values)
    sums, nums = np.where(held, values, 0).sum(0), held.sum(0)
    return {name: float(s / n) if n else float("nan") for name, s, n in zip(names, sums, nums, strict=True)}


@dataclass(frozen=True)
class Scores:
    """Dice after a step: mean over organs, mean over cases of each organ, and each case's values in the organs'
    order.
    """

    step: int
    mean: float
    organs: dict[str, float]
    cases: dict[str, list[float]]


def write_scores(folder: Path, **entries: Scores) -> None:
    """Put entries ("best", "last") into dice.json of a run folder."""
    path = folder / "dice.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known |= {name: asdict(scores) for name, scores in entries.items()}
    write_whole(path, (json.dumps(known, indent=1) + "\n").encode())


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Dice per organ of the best and of the last weights of a run.

    Raises FileNotFoundError where the folder holds no scores yet.
    """
    path = folder / "dice.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no scores (dice.json); is it a fine-tuning run that was validated?")
    loaded = json.loads(path.read_text())
    return {name: loaded[name]["organs"] for name in ("best", "last")}
