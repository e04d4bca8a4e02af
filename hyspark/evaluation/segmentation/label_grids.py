"""Label maps on a file's grid, from slabs of class scores on the prepared grid.

Shapes: n classes, background included; (h, w, d) voxels of the prepared grid, in RAS. Rows are the scores of one index
of axis 0, (n, w, d); a grid takes them one after the other and keeps two.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.ndimage import find_objects, label, map_coordinates
from torch import Tensor

from hyspark.data.readers.geometry import Grid

MAX_DRIFT = 0.05
"""Voxels by which two grids may drift apart over a whole axis and still count as parallel."""
ON_VOXEL = 1e-3
"""Voxels within which a position counts as that of a voxel, which avoids interpolation."""
UINT8_CLASSES = 256
"""Number of classes that uint8 holds."""


class LabelMaps(NamedTuple):
    """Label maps of a volume, uint8, or uint16 where there are more classes.

    Attributes:
        on_file: On the grid of the volume's file.
        prepared: On the prepared grid.
    """

    on_file: np.ndarray
    prepared: np.ndarray


def label_dtype(num_classes: int) -> np.dtype:
    """Return the smallest type of label values."""
    return np.dtype(np.uint8 if num_classes <= UINT8_CLASSES else np.uint16)


def label_maps(slabs: Iterable[tuple[int, Tensor]], prepared: Grid, file: Grid) -> LabelMaps:
    """Compute label maps: the likeliest class, on the file's grid by linearly interpolated scores.

    A voxel of the file whose centre lies in no voxel of the prepared grid is background. Up to half a voxel beyond the
    outermost centres of that grid, the scores are those of its edge.

    Args:
        slabs: First index of each slab on axis 0, and its scores (n, rows, w, d) on the CPU; in order.
        prepared: The grid of the scores.
        file: The grid of the file.
    """
    grid: LabelGrid | None = None
    likeliest: list[np.ndarray] = []
    for start, slab in slabs:
        dtype = label_dtype(len(slab))
        grid = grid or label_grid(prepared, file, dtype)
        likeliest.append(slab.max(0).indices.numpy().astype(dtype))
        *rows, last = slab.unbind(1)
        for i, row in enumerate([*rows, last.clone()]):  # the last is kept: the slab is not
            grid.add(start + i, row)
    assert grid is not None
    return LabelMaps(grid.labels, np.concatenate(likeliest))


class LabelGrid(Protocol):
    """A label map that grows with rows of scores.

    Attributes:
        labels: The label map; voxels without scores are background.
    """

    labels: np.ndarray

    def add(self, index: int, row: Tensor) -> None:
        """Take the scores of an index of axis 0, (n, w, d); the indices come in order, from 0."""


def label_grid(prepared: Grid, file: Grid, dtype: np.dtype) -> LabelGrid:
    """Make an empty label map on the grid of a file, for scores on the prepared grid."""
    to_scores = np.linalg.solve(*(np.asarray(grid.affine, dtype=np.float64) for grid in (prepared, file)))
    rotation, offset, shape = to_scores[:3, :3], to_scores[:3, 3], np.asarray(file.shape)
    own = np.abs(rotation).argmax(axis=0)  # the scores' axis that runs along each axis of the file
    rest = np.abs(rotation)
    rest[own, range(3)] = 0
    if len(set(own)) < 3 or (rest @ (shape - 1)).max() > MAX_DRIFT:
        return SlantedGrid(rotation, offset, prepared.shape, file.shape, dtype)
    return ParallelGrid(rotation[own, range(3)], offset, own, prepared.shape, file.shape, dtype)


class ParallelGrid:
    """A label map whose axes run along those of the scores, at any spacing, in any order and direction.

    Args:
        scale: Voxels of the scores per voxel of the file, by axis of the file.
        offset: Position of the file's first voxel in the scores' grid.
        own: The scores' axis that runs along each axis of the file.
        scores_shape: (h, w, d) of the scores.
        shape: Shape of the file.
        dtype: Type of the labels.
    """

    def __init__(
        self,
        scale: np.ndarray,
        offset: np.ndarray,
        own: np.ndarray,
        scores_shape: Sequence[int],
        shape: Sequence[int],
        dtype: np.dtype,
    ) -> None:
        self.labels = np.zeros(tuple(shape), dtype)
        rows = [row_weights(scale[i] * np.arange(shape[i]) + offset[own[i]], scores_shape[own[i]]) for i in range(3)]
        first = int(np.flatnonzero(own == 0)[0])
        second, third = (i for i in range(3) if i != first)
        self.across = [rows[second].weights, rows[third].weights.T]
        self.is_transposed = own[second] > own[third]
        self.targets = np.moveaxis(self.labels, first, 0)[rows[first].inside, rows[second].inside, rows[third].inside]
        self.along = rows[first].weights
        self.by_row: dict[int, list[int]] = defaultdict(list)
        for i, weights in enumerate(self.along):
            self.by_row[int(weights.nonzero()[-1])].append(i)
        self.before: Tensor | None = None

    def add(self, index: int, row: Tensor) -> None:
        """Take the scores of an index of axis 0; see `LabelGrid`."""
        for i in self.by_row[index]:
            near = int(self.along[i].nonzero()[0])  # this index, or the one before
            earlier = row if near == index or self.before is None else self.before
            source = earlier.lerp(row, self.along[i, index])
            source = source.transpose(1, 2) if self.is_transposed else source
            self.targets[i] = (self.across[0] @ source @ self.across[1]).max(0).indices.numpy()
        self.before = row


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


class SlantedGrid:
    """A label map that is not parallel to the scores (a sheared image, as of a tilted gantry).

    SciPy interpolates, which takes ten times as long as `ParallelGrid`. Voxel i of the file lies at
    `rotation @ i + offset` in the scores' grid.

    Args:
        rotation: (3, 3).
        offset: (3,).
        scores_shape: (h, w, d) of the scores.
        shape: Shape of the file.
        dtype: Type of the labels.
    """

    def __init__(
        self,
        rotation: np.ndarray,
        offset: np.ndarray,
        scores_shape: Sequence[int],
        shape: Sequence[int],
        dtype: np.dtype,
    ) -> None:
        self.labels = np.zeros(tuple(shape), dtype)
        self.rotation, self.offset, self.scores_shape = rotation, offset, tuple(scores_shape)
        self.first = int(np.abs(rotation[0]).argmax())  # the file's axis whose 2D slices span the fewest rows
        self.before: Tensor | None = None

    def add(self, index: int, row: Tensor) -> None:
        """Take the scores of an index of axis 0; see `LabelGrid`."""
        pair = torch.stack([row if self.before is None else self.before, row], dim=1).numpy()
        self.before = row
        if index == 0 and self.scores_shape[0] > 1:
            return
        low = max(0, index - 1)
        found = [*self.slices_between(low, index)]
        if not found:
            return
        points = np.concatenate([at for _, at in found], axis=1)
        points[0] -= low  # exact, as both are multiples of the last bit
        best, labels = np.full(points.shape[1], -np.inf, np.float32), np.zeros(points.shape[1], self.labels.dtype)
        for value, score in enumerate(pair):
            resampled = map_coordinates(score, points, output=np.float32, order=1, mode="nearest")
            likelier = resampled > best
            labels[likelier], best[likelier] = value, resampled[likelier]
        for (where, _), values in zip(
            found, np.split(labels, np.cumsum([at.shape[1] for _, at in found])[:-1]), strict=True
        ):
            self.labels[where] = values

    def slices_between(self, low: int, high: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """Find the voxels of the file that lie between two rows, or beyond the edge where one is the first or last.

        Yields:
            Indices of voxels of one 2D slice, and their positions (3, m) in the scores' grid, at its edge if beyond.
        """
        h = self.scores_shape[0]
        slope, spread = self.rotation[0].copy(), np.asarray(self.labels.shape) - 1
        slope[self.first] = 0
        least, most = (float((slope.clip(*sign) * spread).sum()) for sign in ((None, 0), (0, None)))
        for i in range(self.labels.shape[self.first]):
            middle = self.offset[0] + self.rotation[0, self.first] * i
            if (low > 0 and middle + most < low - 1) or (high < h - 1 and middle + least > high + 1):
                continue
            where, at = self.positions(i)
            between = ((at[0] >= low) | (low == 0)) & ((at[0] < high) | (high == h - 1))
            size = np.asarray(self.scores_shape)[:, None]
            between &= ((np.floor(at + 0.5) >= 0) & (np.floor(at + 0.5) < size)).all(0)
            if between.any():
                yield tuple(axis[between] for axis in where), at[:, between].clip(0, size - 1)

    def positions(self, i: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Compute indices of the voxels of a 2D slice of the file, and their positions (3, m) in the scores' grid."""
        axes = [np.arange(n) for n in self.labels.shape]
        axes[self.first] = axes[self.first][i : i + 1]
        where = [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]
        at = np.repeat(self.offset[:, None], len(where[0]), axis=1)
        for axis, indices in enumerate(where):  # in SciPy's order of additions, for the same last bit
            at += self.rotation[:, axis, None] * indices
        return where, at


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
