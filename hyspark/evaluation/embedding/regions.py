"""Regions of a prepared volume: the foreground, boxes in mm, labels, or the cells of a grid.

Volumes are (h, w, d) in RAS. World coordinates are mm in RAS, those of a NIfTI file's affine.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import find_objects

from hyspark.utils.tables import read_csv

EDGES = ("x_min", "x_max", "y_min", "y_max", "z_min", "z_max")
"""Columns of a file of boxes, beside `case` and, optionally, `region`."""

VOLUME = "volume"
"""Name of the only region of a volume that is embedded whole."""


class WorldBox(NamedTuple):
    """A box in world coordinates.

    Attributes:
        name: Name of the region.
        low: Least x, y and z, in mm; the lower faces belong to the box.
        high: Greatest x, y and z, in mm; the upper faces do not.
    """

    name: str
    low: np.ndarray
    high: np.ndarray


class Region(NamedTuple):
    """Voxels of a prepared volume.

    Attributes:
        name: Its name, one of its own in the volume.
        start: First voxel of its bounding box.
        mask: bool (h, w, d), which voxels of the bounding box belong to it.
    """

    name: str
    start: tuple[int, ...]
    mask: np.ndarray

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last voxel of the bounding box."""
        return tuple(a + n for a, n in zip(self.start, self.mask.shape, strict=True))

    def centre(self, affine: np.ndarray) -> np.ndarray:
        """Compute the centre of the bounding box in mm."""
        middle = (np.array(self.start) + self.stop - 1) / 2
        found: np.ndarray = apply_affine(affine, middle)
        return found


def read_boxes(path: Path) -> dict[str, list[WorldBox]]:
    """Read boxes by case from a CSV file with the columns case, `EDGES` and, optionally, region.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, a value is no number, a box is empty, or two of a case have one name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--boxes {path}: no such file")
    columns, rows = read_csv(path, ("case", "region", *EDGES))
    if missing := [name for name in ("case", *EDGES) if name not in columns]:
        raise ValueError(f"{path}: expected the columns case, {', '.join(EDGES)}; missing: {', '.join(missing)}")
    boxes: dict[str, list[WorldBox]] = {}
    for number, row in rows.items():
        try:
            edges = np.array([float(row[name]) for name in EDGES]).reshape(3, 2).T
        except ValueError:
            shown = ", ".join(row[name] for name in EDGES)
            raise ValueError(f"{path}, line {number}: expected six numbers in mm, got {shown}") from None
        if not np.isfinite(edges).all() or (edges[0] >= edges[1]).any():
            raise ValueError(f"{path}, line {number}: expected each minimum below its maximum, got {edges.T.tolist()}")
        of_case = boxes.setdefault(row["case"], [])
        name = row.get("region") or f"box_{len(of_case)}"
        if name in [box.name for box in of_case]:
            raise ValueError(f"{path}, line {number}: two boxes of {row['case']} are named {name}; rename one")
        of_case.append(WorldBox(name, *edges))
    return boxes


def foreground_box(image: np.ndarray) -> tuple[list[int], list[int]]:
    """Bound the foreground of a prepared volume (c, h, w, d): first voxel, and one past the last.

    Raises:
        ValueError: There is none.
    """
    above: np.ndarray = np.any(image > 0, axis=0)
    start, stop = [], []
    for axis in range(3):
        filled = np.flatnonzero(np.any(above, axis=tuple({0, 1, 2} - {axis})))
        if not filled.size:
            raise ValueError("no voxel lies above the lowest value that the network sees; is the intensity right?")
        start.append(int(filled[0]))
        stop.append(int(filled[-1]) + 1)
    return start, stop


def volume_region(image: np.ndarray) -> Region:
    """Return the bounding box of the foreground of a volume (c, h, w, d) as its only region."""
    start, stop = foreground_box(image)
    return Region(VOLUME, tuple(start), all_of([b - a for a, b in zip(start, stop, strict=True)]))


def grid_regions(image: np.ndarray, affine: np.ndarray, edge: float) -> Iterator[Region]:
    """Divide the bounding box of the foreground into cells; the last ones of an axis may be smaller.

    Args:
        image: (c, h, w, d).
        affine: Affine of its grid.
        edge: Edge of a cell in mm, rounded to voxels.
    """
    start, stop = foreground_box(image)
    steps = [max(1, round(edge / size)) for size in voxel_sizes(affine)]
    numbers = [math.ceil((b - a) / step) for a, b, step in zip(start, stop, steps, strict=True)]
    for cell in np.ndindex(*numbers):
        first = [a + i * step for a, i, step in zip(start, cell, steps, strict=True)]
        last = [min(f + step, b) for f, step, b in zip(first, steps, stop, strict=True)]
        shape = [b - a for a, b in zip(first, last, strict=True)]
        yield Region("cell_" + "_".join(map(str, cell)), tuple(first), all_of(shape))


def label_regions(label: np.ndarray) -> Iterator[Region]:
    """Yield the region of each value of a label map (h, w, d) but 0."""
    for value, box in enumerate(find_objects(label.astype(np.int32)), 1):
        if box is not None:
            yield Region(f"label_{value}", tuple(along.start for along in box), label[box] == value)


def box_region(box: WorldBox, shape: Sequence[int], affine: np.ndarray) -> Region:
    """Find the voxels of a grid whose centres lie in a box; of a smaller box, the voxel that its centre lies in.

    Args:
        box: The box, in mm.
        shape: (h, w, d) of the grid.
        affine: Affine of the grid, which may be rotated against the box.

    Raises:
        ValueError: The box lies outside of the grid.
    """
    to_voxel = np.linalg.inv(affine)
    corners = np.array([[(box.low, box.high)[side[axis]][axis] for axis in range(3)] for side in np.ndindex(2, 2, 2)])
    found = apply_affine(to_voxel, corners)
    start = np.clip(np.floor(found.min(0)).astype(int), 0, None)
    stop = np.clip(np.ceil(found.max(0)).astype(int) + 1, None, shape)
    if (start < stop).all():
        voxels = np.stack(np.meshgrid(*map(np.arange, start, stop), indexing="ij"), -1)
        world = apply_affine(affine, voxels)
        inside = ((world >= box.low) & (world < box.high)).all(-1)
        if inside.any():
            (tight,) = find_objects(inside.astype(np.int32))
            return Region(box.name, tuple(int(a + s.start) for a, s in zip(start, tight, strict=True)), inside[tight])
    nearest = np.rint(apply_affine(to_voxel, (box.low + box.high) / 2)).astype(int)
    if (nearest < 0).any() or (nearest >= shape).any():
        shown = " x ".join(f"{a:g}..{b:g}" for a, b in zip(box.low, box.high, strict=True))
        raise ValueError(f"the box {shown} mm lies outside of the volume; boxes are in mm of the NIfTI affine (RAS)")
    return Region(box.name, tuple(map(int, nearest)), all_of((1, 1, 1)))


def all_of(shape: Sequence[int]) -> np.ndarray:
    """Return a mask (h, w, d) of all voxels, which takes no memory."""
    return np.broadcast_to(np.True_, tuple(shape))
