"""From weights to label maps: the trained network, its class scores by sliding window, label maps on a file's grid.

Shapes: n classes, background included; (h, w, d) voxels of the prepared grid, in RAS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy.ndimage import affine_transform, find_objects, label
from torch import Tensor, nn

from hyspark.config.recipes import typed_values
from hyspark.config.segmentation import SegmentationConfig, network_options
from hyspark.evaluation.network_kind import read_fine_tuned
from hyspark.models.segmentation import Hybird, build_hybird
from hyspark.training.labelled_cases import left_right_pairs, unpaired_sides

MAX_DRIFT = 0.05
"""Voxels by which two grids may drift apart over a whole axis and still count as parallel."""
ON_VOXEL = 1e-3
"""Voxels within which a position counts as that of a voxel, which avoids interpolation."""


@dataclass(frozen=True)
class Windows:
    """How class scores are assembled from windows.

    Attributes:
        size: Voxels per axis.
        overlap: Fraction of a window that its neighbour covers.
        per_pass: Windows in one forward pass.
        flips: Axes (0 left-right, 1 back-front, 2 foot-head). Scores are averaged over all combinations of their flips.
        swaps: Pairs of classes that a flip of axis 0 swaps.
    """

    size: tuple[int, ...]
    overlap: float = 0.5
    per_pass: int = 4
    flips: tuple[int, ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()


class TrainedNetwork(NamedTuple):
    """A network fine-tuned for segmentation, on the CPU, in evaluation mode.

    Attributes:
        network: The network.
        config: Its settings.
        names: Names of its classes, background first.
        trained_on: Digests (`content_digest`) of the images that it was trained on; empty if its file names none.
    """

    network: Hybird
    config: SegmentationConfig
    names: list[str]
    trained_on: list[str]


def load_network(path: Path) -> TrainedNetwork:
    """Load the segmentation network that fine-tuning left in a file. Nothing stored in it is executed.

    Args:
        path: best.pth of a fine-tuning run, or the run folder.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no best.pth.
        ValueError: The file is damaged, or holds no network fine-tuned for segmentation.
    """
    file = read_fine_tuned(path, "segmentation")
    config = SegmentationConfig(**typed_values(file.contents["config"], SegmentationConfig, str(file.path)))
    names = [str(name) for name in file.contents["classes"]]
    model = hybird_from_config(config, len(names))
    file.load_weights(model)
    return TrainedNetwork(model.eval(), config, names, list(file.contents.get("trained_on", [])))


def hybird_from_config(config: SegmentationConfig, num_classes: int) -> Hybird:
    """Build the network that the settings describe, randomly initialised by torch's generator."""
    return build_hybird(config.in_channels, num_classes, config.crop_shape, **network_options(config))


def windows_from_config(
    config: SegmentationConfig, names: Sequence[str], overlap: float, flips: tuple[int, ...] = ()
) -> Windows:
    """Return the windows of a network with these settings and classes.

    Args:
        config: Settings of the network.
        names: Its classes, background first.
        overlap: Fraction of a window that its neighbour covers.
        flips: Axes of the flips to average over.

    Raises:
        ValueError: There are no such overlap or axes, or a flip of axis 0 would mix up classes.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, but it is {overlap}")
    if len(set(flips)) < len(flips) or not set(flips) <= {0, 1, 2}:
        raise ValueError(f"flips: expected axes 0 (left-right), 1 (back-front), 2 (foot-head), got {list(flips)}")
    swaps = left_right_pairs(config, names)
    deliberate = swaps and config.flip_prob[0]  # trained with flips that leave these classes as they are
    if 0 in flips and not deliberate and (unpaired := unpaired_sides(names, swaps)):
        raise ValueError(
            f"flips: a flip of axis 0 would mix up {', '.join(unpaired)}, since left_right of the network's training "
            "does not pair them; omit axis 0"
        )
    return Windows(config.crop_shape, overlap, config.sw_batch_size, flips, swaps)


def class_scores(model: nn.Module, image: Tensor, windows: Windows, device: torch.device) -> Tensor:
    """Compute the class scores of a prepared volume from windows that are blended with Gaussian weights.

    Only windows are ever on the device: the scores of a large volume need many times its memory.

    Args:
        model: In evaluation mode, on `device`.
        image: (h, w, d) in [0, 1], on the CPU.
        windows: How to assemble the scores.
        device: Device of the forward passes.

    Returns:
        float32 (n, h, w, d), on the CPU.
    """
    total: Tensor | None = None
    subsets = [axes for num in range(len(windows.flips) + 1) for axes in combinations(windows.flips, num)]
    with torch.no_grad():
        for axes in subsets:
            volume = image.flip(axes)[None, None]
            scores = sliding_window_inference(
                volume,
                windows.size,
                windows.per_pass,
                lambda crops: model(crops).float(),
                overlap=windows.overlap,
                mode="gaussian",
                sw_device=device,
                device=torch.device("cpu"),
            )
            assert isinstance(scores, Tensor)
            back = scores[0].flip([1 + axis for axis in axes]) if axes else scores[0]
            if 0 in axes:
                back = back[swap_classes(len(back), windows.swaps)]
            total = back if total is None else total.add_(back)
    assert total is not None
    return total.div_(len(subsets))


def swap_classes(num_classes: int, swaps: Sequence[tuple[int, int]]) -> list[int]:
    """List the class numbers in order, those of each pair swapped."""
    order = list(range(num_classes))
    for a, b in swaps:
        order[a], order[b] = b, a
    return order


def to_grid(
    scores: Tensor, affine: np.ndarray, reference_shape: Sequence[int], reference_affine: np.ndarray
) -> np.ndarray:
    """Compute the label map on a reference grid: the likeliest class by linearly interpolated scores.

    A voxel of the reference whose centre lies in no voxel of the scores' grid is background. Up to half a voxel beyond
    the outermost centres of that grid, the scores are those of its edge.

    Args:
        scores: Class scores (n, h, w, d), on the CPU.
        affine: Affine (4, 4) of their grid, to RAS mm.
        reference_shape: Shape of the reference grid.
        reference_affine: Affine (4, 4) of the reference grid, to RAS mm.

    Returns:
        uint8 of `reference_shape`.
    """
    to_scores = np.linalg.solve(np.asarray(affine, dtype=np.float64), np.asarray(reference_affine, dtype=np.float64))
    rotation, offset, shape = to_scores[:3, :3], to_scores[:3, 3], np.asarray(reference_shape)
    own = np.abs(rotation).argmax(axis=0)  # the scores' axis that runs along each axis of the reference
    along = rotation[own, range(3)]
    rest = np.abs(rotation).copy()
    rest[own, range(3)] = 0
    if len(set(own)) < 3 or (rest @ (shape - 1)).max() > MAX_DRIFT:
        return to_slanted_grid(scores, rotation, offset, reference_shape)

    rows = [row_weights(along[i] * np.arange(shape[i]) + offset[own[i]], scores.shape[1 + own[i]]) for i in range(3)]
    first = int(np.flatnonzero(own == 0)[0])  # 2D slices across the scores' slowest axis are contiguous in memory
    second, third = (i for i in range(3) if i != first)
    labels = np.zeros(tuple(shape), np.uint8)
    slices = np.moveaxis(labels, first, 0)[rows[first].inside, rows[second].inside, rows[third].inside]
    for target, weights in zip(slices, rows[first].weights, strict=True):
        near = weights.nonzero()[:, 0].tolist()  # one or two
        source = scores[:, near[0]].lerp(scores[:, near[-1]], weights[near[-1]])
        source = source.transpose(1, 2) if own[second] > own[third] else source
        target[...] = (rows[second].weights @ source @ rows[third].weights.T).max(0).indices.numpy()
    return labels


class InterpolationRows(NamedTuple):
    """Linear interpolation in a row of voxels as a matrix.

    Attributes:
        inside: Indices of the positions that lie in the row.
        weights: (positions inside, voxels of the row).
    """

    inside: slice
    weights: Tensor


def row_weights(positions: np.ndarray, num: int) -> InterpolationRows:
    """Compute the interpolation at positions in a row of `num` voxels.

    Positions are in voxels. Those up to half a voxel beyond an end count as that end.
    """
    nearest = np.rint(positions)
    positions = np.where(np.abs(positions - nearest) < ON_VOXEL, nearest, positions)
    within = np.flatnonzero((positions > -0.5 - ON_VOXEL) & (positions < num - 0.5 + ON_VOXEL))
    inside = slice(within[0], within[-1] + 1) if within.size else slice(0)
    distance = np.abs(positions[inside, None].clip(0, num - 1) - np.arange(num))
    return InterpolationRows(inside, torch.from_numpy((1 - distance).clip(min=0)).float())


def to_slanted_grid(scores: Tensor, rotation: np.ndarray, offset: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Compute the label map on a reference grid that is not parallel (a sheared image, as of a tilted gantry).

    SciPy interpolates, which takes ten times as long as `to_grid`. Voxel i of the reference lies at
    `rotation @ i + offset` in the scores' grid.
    """
    grid: dict[str, Any] = {"matrix": rotation, "offset": offset, "output_shape": tuple(shape)}
    labels, best = np.zeros(grid["output_shape"], np.uint8), np.full(grid["output_shape"], -np.inf, np.float32)
    for value, score in enumerate(scores.numpy()):
        resampled = affine_transform(score, **grid, output=np.float32, order=1, mode="nearest")
        likelier = resampled > best
        labels[likelier] = value
        best[likelier] = resampled[likelier]
    held = np.ones(tuple(scores.shape[1:]), np.uint8)
    return labels * affine_transform(held, **grid, order=0, mode="grid-constant")


def largest_components(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Keep the largest connected component of each class in a label map (h, w, d); voxels that share a corner touch.

    Of components of one size the first by its first voxel is kept. MONAI's KeepLargestConnectedComponent keeps
    another one, and needs scikit-image.
    """
    kept = labels.copy()
    for value, box in enumerate(find_objects(labels, max_label=num_classes - 1), start=1):
        if box is None:
            continue
        components, num = label(labels[box] == value, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel(), minlength=num + 1)
        kept[box][(components > 0) & (components != 1 + sizes[1:].argmax())] = 0
    return kept
