"""Slices -> stacks in space: one plane, ordered by position, with an affine.

Slices are ordered by their position along their normal (DICOM PS3.3, C.7.6.2.1.1), not by name or number.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from hyspark.data.readers.elements import Header

SAME_POSITION = 0.01
"""mm along the normal within which two slices have one position."""
SAME_PLANE = 0.01
"""Largest difference of direction cosines, and relative one of pixel spacings, in a stack."""
MAX_GAP_DEVIATION = 0.1
"""Largest deviation of a gap between slices, as a fraction of the median gap, in an even stack."""
MAX_SHIFT = 1.0
"""mm by which a slice of a straight stack may leave the line of the others."""
TILT = 0.02
"""Cosine between slices and their stack's direction from which on a stack is tilted."""


def has_plane(header: Header) -> bool:
    """Return whether a slice has a position, a spacing and perpendicular directions in the patient."""
    if header.plane is None or header.position is None:
        return False
    row, column = np.array(header.plane[4:7]), np.array(header.plane[7:])
    lengths = np.linalg.norm([row, column], axis=1)
    return min(header.plane[:4]) > 0 and np.abs(lengths - 1).max() <= SAME_PLANE and abs(row @ column) <= SAME_PLANE


def by_plane(headers: Sequence[Header]) -> list[list[Header]]:
    """Group slices by size, pixel spacing and orientation; the largest group comes first."""
    planes = np.array([header.plane for header in headers])
    sized = np.column_stack([planes[:, :2] / SAME_PLANE, np.log(planes[:, 2:4]), planes[:, 4:]])
    groups: list[tuple[np.ndarray, list[Header]]] = []
    for values, header in zip(sized, headers, strict=True):
        near = (group for first, group in groups if np.abs(values - first).max() <= SAME_PLANE)
        group = next(near, None)
        if group is None:
            groups.append((values, [header]))
        else:
            group.append(header)
    return sorted((group for _, group in groups), key=len, reverse=True)


def describe_planes(groups: Sequence[Sequence[Header]]) -> str:
    """Explain by what groups of slices differ: size, pixel spacing, orientation."""
    planes = np.array([group[0].plane for group in groups])
    sizes = Counter({f"{rows:g} x {columns:g}": 0 for rows, columns in planes[:, :2]})
    for group, (rows, columns) in zip(groups, planes[:, :2], strict=True):
        sizes[f"{rows:g} x {columns:g}"] += len(group)
    if len(sizes) > 1:
        return "slices of different sizes: " + ", ".join(f"{n} of {size}" for size, n in sizes.most_common())
    if np.abs(planes[:, 2:4] / planes[0, 2:4] - 1).max() > SAME_PLANE:
        return "slices of different pixel spacing"
    return "slices of different orientation"


def positions_of(headers: Sequence[Header]) -> np.ndarray:
    """Compute the position of each slice along the normal of the first one, in mm."""
    plane = np.array(headers[0].plane)
    return np.array([header.position for header in headers]) @ np.cross(plane[4:7], plane[7:])


def position_indices(headers: Sequence[Header]) -> np.ndarray:
    """Number the positions along the normal, from 0; slices within SAME_POSITION have one number."""
    where = positions_of(headers)
    indices = np.zeros(len(where), dtype=int)
    index, first = -1, -np.inf
    for i in np.argsort(where, kind="stable"):
        if where[i] - first > SAME_POSITION:
            index, first = index + 1, where[i]
        indices[i] = index
    return indices


def num_repeats(headers: Sequence[Header]) -> int:
    """Count the slices at the position that holds most; 1 if all positions differ."""
    return int(np.bincount(position_indices(headers)).max())


def ordered(headers: Sequence[Header]) -> list[Header]:
    """Sort slices by their position along their normal."""
    return [headers[i] for i in np.argsort(positions_of(headers), kind="stable")]


def why_uneven(headers: Sequence[Header]) -> str:
    """Explain why ordered slices are no even stack: missing slices, changing gaps, shifts; empty if they are one."""
    if len(headers) < 3:
        return ""
    where = positions_of(headers)
    positions = np.array([header.position for header in headers])
    steps = np.diff(where)
    usual = float(np.median(steps))
    missing = int((np.rint(steps / usual) - 1).clip(0).sum())
    if missing and (np.abs(steps / usual - np.rint(steps / usual)) <= MAX_GAP_DEVIATION).all():
        return f"{missing} slices are missing: gaps are {usual:.4g} mm, but up to {steps.max():.4g} mm"
    if np.abs(steps - usual).max() > MAX_GAP_DEVIATION * usual:
        return f"slices lie from {steps.min():.4g} to {steps.max():.4g} mm apart"
    line = positions[0] + np.outer((where - where[0]) / (where[-1] - where[0]), positions[-1] - positions[0])
    shift = np.linalg.norm(positions - line, axis=1).max()
    return f"slices are shifted against each other by up to {shift:.4g} mm" if shift > MAX_SHIFT else ""


def why_tilted(affine: np.ndarray) -> str:
    """Explain by how much the slices of a stack lean, as with a tilted gantry; empty if they do not."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    lean = float(np.linalg.norm(directions[:, :2].T @ directions[:, 2]))
    return (
        f"its slices lean by {np.rad2deg(np.arcsin(min(lean, 1.0))):.1f} degrees (gantry tilt)" if lean > TILT else ""
    )


def affine_of(headers: Sequence[Header]) -> np.ndarray:
    """Compute the affine `(4, 4)` of ordered slices, from (column, row, slice) to mm in RAS."""
    plane = np.array(headers[0].plane)
    first, last = np.array(headers[0].position), np.array(headers[-1].position)
    normal = np.cross(plane[4:7], plane[7:])
    step = (last - first) / (len(headers) - 1) if len(headers) > 1 else normal * headers[0].thickness
    affine = np.eye(4)
    affine[:3] = np.column_stack([plane[4:7] * plane[3], plane[7:10] * plane[2], step, first])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS
