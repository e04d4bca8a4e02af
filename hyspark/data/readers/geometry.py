"""The position of voxels in space by a NIfTI header, and whether a label lies on its image.

The standard decides: the sform if its code is above 0, else the qform if its code is, else the edges of a voxel alone
(pixdim). The others are compared with it, and a disagreement is a fault that `check` reports.

Two grids are compared in space, per axis: half a voxel of an axis is the largest difference. So a label may be stored
in another order or direction of voxels than its image.
"""

from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from hyspark.utils.text import list_of

MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""mm by the code of the unit of length; without one mm are meant."""
UNIT_NAMES = {1: "metres", 3: "micrometres"}
KNOWN_CODES = range(6)
"""Codes of sform and qform that NIfTI defines."""
SINGULAR = 1e-3
"""Determinant of the axes' directions below which an affine counts as singular."""
SPAN = (1.0, 10_000.0)
"""Range of mm that a volume of a patient spans on its longest axis."""
HALF_VOXEL = 0.5 + 1e-3
"""Voxels by which two grids may differ on each axis, with room for rounding."""
EDGE_TOLERANCE = 0.01
"""Relative difference of the edges of a voxel above which they differ in any case."""

Fault = tuple[str, str]
"""A kind of finding, and its text."""


class Grid(NamedTuple):
    """A grid of voxels.

    Attributes:
        shape: voxels per axis `(h, w, d)`.
        affine: `(4, 4)`, RAS mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray


def read_geometry(raw: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, list[Fault]]:
    """Read where the voxels of a file lie.

    Args:
        raw: nibabel's header, unchanged.
        shape: voxels per axis.

    Returns:
        The affine `(4, 4)` in RAS mm, and the faults of the fields. The affine is NaN if no field gives one.
    """
    with np.errstate(all="ignore"):  # of fields that are no number
        return affine_and_faults(raw, shape)


def affine_and_faults(raw: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, list[Fault]]:
    """Read where the voxels of a file lie, see `read_geometry`."""
    faults: list[Fault] = []
    edges = [float(edge) for edge in raw["pixdim"][1:4]]
    is_edged = all(np.isfinite(edge) and edge > 0 for edge in edges)
    sform = raw.get_sform() if raw["sform_code"] > 0 else None
    qform = None
    if is_edged:
        qform, odd = read_qform(raw) if raw["qform_code"] > 0 else (None, [])
        faults += odd
    else:
        faults.append(("impossible spacing", f"{list_of(edges)} mm"))
    if sform is not None:
        affine = sform
    elif qform is not None:
        affine = qform
    else:
        affine = raw.get_base_affine() if is_edged and not raw["qform_code"] > 0 else np.full((4, 4), np.nan)
    if sform is None and not raw["qform_code"] > 0:
        faults.append(("no orientation", "neither sform nor qform"))
    faults += unknown_codes(raw)
    scale, unit_faults = unit_of_length(raw)
    if scale != 1:
        affine = np.diag([scale, scale, scale, 1]) @ affine
    if not is_edged and sform is None:
        return affine, faults
    if reason := why_singular(affine):
        return affine, [*faults, ("singular affine", reason)]
    faults += unit_faults
    span = np.array(shape) * voxel_sizes(affine)
    if not SPAN[0] <= max(span) <= SPAN[1]:
        faults.append(("impossible spacing", f"{list_of(voxel_sizes(affine))} mm between {list_of(shape)} voxels"))
    if sform is not None and qform is not None:
        faults += compare_forms(sform, qform, shape)
    if is_edged and sform is not None:
        faults += compare_edges(voxel_sizes(sform), edges, shape)
    return affine, faults


def read_qform(raw: Any) -> tuple[np.ndarray, list[Fault]]:
    """Read the qform: a sign of the third axis other than -1 is 1, and too long a quaternion is scaled to length 1.

    Returns:
        The affine `(4, 4)` in the header's unit, NaN if a field is no number, and the faults of the fields.
    """
    valid, faults = raw.copy(), []
    sign = float(raw["pixdim"][0])
    valid["pixdim"][0] = -1 if sign < 0 else 1
    if sign not in (-1, 0, 1):
        faults.append(("odd field", f"pixdim[0] is {sign:g} and not 1 or -1; it is read as {valid['pixdim'][0]:g}"))
    try:
        return valid.get_qform(), faults
    except ValueError:  # of a quaternion that is too long
        names = ("quatern_b", "quatern_c", "quatern_d")
        length = float(np.linalg.norm([float(raw[name]) for name in names]))
        if not np.isfinite(length):
            return np.full((4, 4), np.nan), faults
        for name in names:
            valid[name] = valid[name] / length
        faults.append(("odd field", f"a quaternion of length {length:.8g}, read as one of length 1"))
        return valid.get_qform(), faults


def unknown_codes(raw: Any) -> list[Fault]:
    """List the codes of sform and qform that NIfTI does not define; the standard uses those above 0."""
    codes = {name: int(raw[name]) for name in ("sform_code", "qform_code")}
    return [("odd field", f"{name} is {code}") for name, code in codes.items() if code not in KNOWN_CODES]


def unit_of_length(raw: Any) -> tuple[float, list[Fault]]:
    """Return mm per unit of length of a header, and a fault if it is no mm."""
    code = int(raw["xyzt_units"]) & 7
    if code not in MM_PER_UNIT:
        return 1.0, [("odd field", f"xyzt_units is {int(raw['xyzt_units'])}; mm are assumed")]
    if name := UNIT_NAMES.get(code):
        return MM_PER_UNIT[code], [("not in mm", f"lengths in {name}, converted to mm")]
    return 1.0, []


def why_singular(affine: np.ndarray) -> str:
    """Return the axes of an affine that do not span the space; empty if they do."""
    axes = affine[:3, :3]
    if np.isfinite(affine).all():
        sizes = voxel_sizes(affine)
        if np.isfinite(sizes).all() and sizes.all() and abs(np.linalg.det(axes / sizes)) >= SINGULAR:
            return ""
    return f"{np.round(axes, 3).tolist()}"


def compare_forms(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, ...]) -> list[Fault]:
    """Compare the positions by sform and qform: sizes, handedness, distance."""
    if why_singular(qform):
        return [("sform and qform disagree", "an invalid qform")]
    if drift(sform, qform, shape).max() <= HALF_VOXEL:
        return []
    texts = []
    if np.linalg.det(sform) * np.linalg.det(qform) < 0:
        texts.append("one mirrors the other")
    sizes = voxel_sizes(sform), voxel_sizes(qform)
    if edges_differ(*sizes, shape):
        texts.append(f"{list_of(sizes[0])} mm by the sform, {list_of(sizes[1])} mm by the qform")
    texts.append(f"corners up to {corner_distance(sform, qform, shape):.3g} mm apart")
    return [("sform and qform disagree", ", ".join(texts))]


def compare_edges(sizes: np.ndarray, edges: list[float], shape: tuple[int, ...]) -> list[Fault]:
    """Compare the edges of a voxel by the affine and by pixdim."""
    if not edges_differ(sizes, np.array(edges), shape):
        return []
    return [("pixdim disagrees", f"{list_of(edges)} mm by pixdim, {list_of(sizes)} mm by the sform")]


def edges_differ(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether edges of a voxel differ by half a voxel over a volume, or by more than rounding."""
    ratio = np.abs(other / one - 1)
    return bool((ratio * shape > HALF_VOXEL).any() or (ratio > EDGE_TOLERANCE).any())


def drift(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Compute how far apart two affines put the corners of a volume, in voxels of the first per axis `(3,)`."""
    corners = corners_of(shape)
    return np.abs(apply_affine(np.linalg.solve(one, other), corners) - corners).max(axis=0)


def corner_distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Compute the largest distance in mm between the corners of a volume under two affines."""
    corners = corners_of(shape)
    return float(np.linalg.norm(apply_affine(one, corners) - apply_affine(other, corners), axis=1).max())


def corners_of(shape: tuple[int, ...]) -> np.ndarray:
    """List the corners of a volume, voxel indices `(8, 3)`."""
    return np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape) - 1)


def voxel_order(image: Grid, label: Grid) -> np.ndarray:
    """Find the order and direction of a label's axes in its image, as nibabel's orientation `(3, 2)`."""
    return io_orientation(np.linalg.solve(image.affine, label.affine))


def in_order(grid: Grid, order: np.ndarray) -> Grid:
    """Return a grid with its axes in another order and direction, at the same positions in space."""
    shape = [0, 0, 0]
    for n, axis in zip(grid.shape, order[:, 0].astype(int), strict=True):
        shape[axis] = n
    return Grid((shape[0], shape[1], shape[2]), grid.affine @ inv_ornt_aff(order, grid.shape))


def pair_fault(image: Grid, label: Grid) -> Fault | None:
    """Return why a label does not lie on its image's voxels, as a kind of finding and its text; None if it does."""
    turned = in_order(label, voxel_order(image, label))
    if turned.shape != image.shape:
        return "label of another shape", f"{list_of(turned.shape)} voxels, the image {list_of(image.shape)}"
    apart = drift(image.affine, turned.affine, image.shape)
    if not apart.max() <= HALF_VOXEL:
        distance = corner_distance(image.affine, turned.affine, image.shape)
        return (
            "label elsewhere",
            f"corners up to {distance:.3g} mm ({list_of(apart, digits=3)} voxels) from the image's",
        )
    return None


class Turned(NamedTuple):
    """Voxels whose axes are in the order and direction of another grid's.

    Attributes:
        voxels: `(h, w, d)`.
        affine: `(4, 4)` by their own file, for this order.
    """

    voxels: np.ndarray
    affine: np.ndarray


def put_in_order(voxels: np.ndarray, label: Grid, image: Grid) -> Turned:
    """Bring the voxels of a label into the order and direction of its image's, without interpolation."""
    order = voxel_order(image, label)
    return Turned(apply_orientation(voxels, order), in_order(label, order).affine)
