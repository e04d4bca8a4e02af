"""Does an exported network compute what `hyspark predict` does with the run? Class scores of crops, and label maps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import nn

from hyspark.evaluation.segmentation.predict import predict_segmentation

LEAST_DICE = 0.999
"""Least Dice of an organ between the label maps of an export and of its run."""
MOST_DIFFERENCE = 1e-3
"""Largest difference of class scores, as a fraction of the largest score."""

Predict = Callable[[Path, Path], Path]
"""Predicts the images of a folder into another, and returns the label map of the first."""


class Agreement(NamedTuple):
    """How the label maps of an export and of its run agree.

    Attributes:
        dice: Dice between the two by organ, of those that either holds.
        different: Number of voxels that differ.
        total: Number of voxels.
    """

    dice: dict[str, float]
    different: int
    total: int

    def text(self) -> str:
        """Write the numbers in a line."""
        voxels = f"{self.different} of {self.total} voxels differ"
        if not self.dice:
            return f"{voxels}; neither holds an organ, so give --check a CT that shows some"
        return f"Dice {', '.join(f'{name} {dice:.4f}' for name, dice in self.dice.items())}; {voxels}"


def compare_scores(run: nn.Module, exported: nn.Module, shapes: Sequence[Sequence[int]], name: str) -> str:
    """Compare class scores of random crops.

    Args:
        run: Network of the run, in evaluation mode.
        exported: The exported network.
        shapes: Shapes (b, c, *size) of the crops.
        name: Name of the export, for messages.

    Returns:
        The largest difference, as text.

    Raises:
        ValueError: Scores differ by more than rounding, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    worst = largest = 0.0
    for shape in shapes:
        crops = torch.rand(*shape, generator=generator)
        with torch.no_grad():
            expected, found = run(crops), exported(crops)
        scale, difference = expected.abs().max().item(), (expected - found).abs().max().item()
        if not difference <= MOST_DIFFERENCE * max(scale, 1e-6):
            raise ValueError(
                f"{name}: expected the class scores of the run, got others by up to {difference:.3g} of {scale:.3g} on "
                f"crops {tuple(shape)}; nothing is written"
            )
        worst, largest = max(worst, difference), max(largest, scale)
    return f"class scores differ by at most {worst:.2g} of {largest:.3g}"


def compare_predictions(source: Path, images: Path, exported: Predict, names: Sequence[str], name: str) -> Agreement:
    """Compare the label map of an export with that of `hyspark predict` on an image.

    Args:
        source: The run.
        images: Folder with the files of the image. Label maps are written beside it.
        exported: Predicts with the export.
        names: Classes, background first.
        name: Name of the export, for messages.

    Raises:
        ValueError: The label maps differ, or one was not written.
    """
    found = [
        np.asanyarray(nib.load(predict(images, images.with_name(folder))).dataobj)  # type: ignore[attr-defined]
        for folder, predict in (("by_run", predict_by(source)), ("by_export", exported))
    ]
    agreement = compare_labels(found[0], found[1], names)
    if worst := {organ: dice for organ, dice in agreement.dice.items() if dice < LEAST_DICE}:
        shown = ", ".join(f"{organ} {dice:.4f}" for organ, dice in worst.items())
        raise ValueError(
            f"{name}: expected the label map of `hyspark predict` with {source} (Dice {LEAST_DICE} or more), got Dice "
            f"{shown}; nothing is written"
        )
    return agreement


def predict_by(network: Path) -> Predict:
    """Return a function that predicts with a run or an exported file, in fp32 on the CPU."""

    def predict(images: Path, out: Path) -> Path:
        made = predict_segmentation(network, [images], out, device="cpu", num_workers=1)
        if made.failures or not made.files:
            raise ValueError(f"{network}: the image of the comparison was not predicted: {made.failures}")
        return made.files[0]

    return predict


def compare_labels(one: np.ndarray, other: np.ndarray, names: Sequence[str]) -> Agreement:
    """Compare two label maps of one shape.

    Raises:
        ValueError: The shapes differ.
    """
    one, other = one.squeeze(), other.squeeze()
    if one.shape != other.shape:
        raise ValueError(f"label maps of the comparison: expected one shape, got {one.shape} and {other.shape}")
    dice = {}
    for value, organ in enumerate(names[1:], start=1):
        sizes = [int((labels == value).sum()) for labels in (one, other)]
        if sum(sizes):
            dice[organ] = 2 * int(((one == value) & (other == value)).sum()) / sum(sizes)
    different = int((one != other).sum())
    return Agreement(dice, different, one.size)
