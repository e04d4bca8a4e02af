"""Painting a volume with signed distances: ellipsoids, tubes, rotations and smooth random fields.

A structure is a signed distance (mm, negative inside) that is painted over earlier structures. A ramp one voxel wide
around distance 0 is the partial volume effect. x, y, z are "body coordinates": mm towards the patient's right, front
and head, from a point in front of the lowest thoracic vertebra.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

EVERYWHERE = (slice(None), slice(None), slice(None))
Box = tuple[slice, slice, slice]


def dot(weights: npt.ArrayLike, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Add up three weighted arrays, which may be broadcast, in their own precision."""
    u, v, w = (float(k) for k in np.asarray(weights))
    return u * arrays[0] + v * arrays[1] + w * arrays[2]


def smooth_field(rng: np.random.Generator, axes: Sequence[np.ndarray], limits: np.ndarray, knot: float) -> np.ndarray:
    """Draw a random field, mean 0 and sd 1, smooth over `knot` mm; it depends on the coordinates, not on the grid."""
    counts = [int(np.ceil(limit / knot)) + 2 for limit in limits]
    field = rng.standard_normal([2 * n + 1 for n in counts]).astype(np.float32)
    for axis, n in zip(axes, counts, strict=True):
        weights = np.exp(-((axis[:, None] / knot - np.arange(-n, n + 1)) ** 2))
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        field = np.tensordot(field, weights.astype(np.float32), axes=(0, 1))  # the done axis goes last: h, w, d again
    return field


def rotation(degrees: npt.ArrayLike) -> np.ndarray:
    """Make the matrix `(3, 3)` of a rotation about x, then y, then z."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(np.asarray(degrees))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[j, i], step[i, j] = np.sin(angle), -np.sin(angle)
        turn = step @ turn
    return turn


@dataclass
class Scan:
    """The volume being painted, on an RAS grid; all arrays are `(h, w, d)`.

    Attributes:
        x: body coordinate in mm.
        y: body coordinate in mm.
        z: body coordinate in mm.
        texture: smooth random field, mean 0, sd 1.
        blur: width of the partial volume ramp in mm.
        fat: mm under the skin.
        image: HU.
        label: label values.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    texture: np.ndarray
    blur: float
    fat: float
    image: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        others = ((1, 2), (0, 2), (0, 1))
        axes = (self.x, self.y, self.z)
        self.bounds = [(c.min(axis=o), c.max(axis=o)) for c, o in zip(axes, others, strict=True)]

    def box(self, low: npt.ArrayLike, high: npt.ArrayLike) -> Box:
        """Return the index slices that hold every voxel between `low` and `high` in body coordinates."""
        slices = []
        for (minimum, maximum), lo, hi in zip(self.bounds, np.asarray(low), np.asarray(high), strict=True):
            inside = np.flatnonzero((maximum >= lo - self.blur) & (minimum <= hi + self.blur))
            slices.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
        return slices[0], slices[1], slices[2]

    def paint(self, distance: np.ndarray, hu: float | np.ndarray, label: int | None = 0, box: Box = EVERYWHERE) -> None:
        """Cover `box` with `hu` where `distance` < 0; `label` None keeps the labels."""
        cover = np.clip(0.5 - distance / self.blur, 0, 1)
        self.image[box] += cover * (hu - self.image[box])
        if label is not None:
            self.label[box][distance < 0] = label

    def blob(
        self, centre: npt.ArrayLike, radii: npt.ArrayLike, turn: np.ndarray, box: Box | None = None
    ) -> tuple[Box, np.ndarray]:
        """Compute the distance to an ellipsoid with the rows of `turn` as axes, in `box` or the box that holds it."""
        centre, radii = np.asarray(centre), np.asarray(radii)
        if box is None:
            reach = radii.max() + 4
            box = self.box(centre - reach, centre + reach)
        shifted = [c[box] - m for c, m in zip((self.x, self.y, self.z), centre, strict=True)]
        p = [dot(row, shifted) for row in turn]
        k0 = np.sqrt(dot(1 / radii**2, [c * c for c in p])) + 1e-6
        k1 = np.sqrt(dot(1 / radii**4, [c * c for c in p])) + 1e-6
        return box, k0 * (k0 - 1) / k1

    def tube(self, points: Sequence[npt.ArrayLike], radii: Sequence[float]) -> tuple[Box, np.ndarray]:
        """Compute the distance to a tube along `points`, with a radius at each, in the box that holds it."""
        nodes = np.asarray(points, float)
        reach = max(radii) + 4
        box = self.box(nodes.min(axis=0) - reach, nodes.max(axis=0) + reach)
        p = (self.x[box], self.y[box], self.z[box])
        distance = np.full(p[0].shape, np.inf, np.float32)
        for a, b, ra, rb in zip(nodes[:-1], nodes[1:], radii[:-1], radii[1:], strict=True):
            rel = [c - float(s) for c, s in zip(p, a, strict=True)]
            t = np.clip(dot((b - a) / np.sum((b - a) ** 2), rel), 0, 1)
            off = [r - t * float(s) for r, s in zip(rel, b - a, strict=True)]
            gap = np.sqrt(dot((1, 1, 1), [c * c for c in off]))
            np.minimum(distance, gap - (ra + t * (rb - ra)), out=distance)
        return box, distance
