"""A procedural, labelled CT of the human trunk, so that the demo and the tests need no patient.

The anatomy is a function of the world coordinates in mm and of a seed: the same seed at another spacing or in
another orientation is the same body, resampled. Each structure is a signed distance (mm, negative inside) that
is painted over what is already there, from the skin inwards; a ramp one voxel wide around distance 0 is the
partial volume effect. Inside this file x, y, z are "body coordinates": mm towards the patient's right, front
and head, from a point in front of the lowest thoracic vertebra.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import orientations
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

LABELS: dict[str, int] = {
    "background": 0,
    "liver": 1,
    "spleen": 2,
    "right_kidney": 3,
    "left_kidney": 4,
    "aorta": 5,
    "spine": 6,
    "right_lung": 7,
    "left_lung": 8,
}
SPACINGS = ((3.0, 3.0, 3.0), (2.5, 2.5, 4.0), (3.2, 3.2, 2.5), (2.8, 2.8, 3.5), (4.0, 4.0, 4.0))
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "LAI", "SAR", "PIR")

_HALF_HEIGHT = 160.0  # mm, of the trunk shown
_EVERYWHERE = (slice(None), slice(None), slice(None))
_Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Phantom:
    """`image` int16 in HU and `label` uint8 (see `LABELS`), both (h, w, d); `affine` voxel -> RAS mm."""

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


def make_phantom(
    seed: int,
    *,
    spacing: tuple[float, float, float] = (3.0, 3.0, 3.0),
    orientation: str = "RAS",
    extent_scale: float = 1.0,
) -> Phantom:
    """Draw the trunk number `seed` (>= 0), the same one each time.

    `spacing` is in mm along right-left, front-back and head-foot, in that order whatever the orientation.
    `orientation` is how the array is stored, as nibabel axis codes ("RAS": its axes run towards the patient's
    right, front and head). `extent_scale` scales the body and its field of view together, about 330 x 260 x
    330 mm at 1: a small one gives a small volume that still holds every organ. Raises ValueError for a spacing,
    scale or orientation that is none.
    """
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing must be three lengths above 0 mm, got {spacing}")
    if extent_scale <= 0:
        raise ValueError(f"extent_scale must be above 0, got {extent_scale}")
    if sorted("RLAPSI".find(code) // 2 for code in orientation) != [0, 1, 2]:
        raise ValueError(f"orientation must be three of R/L, A/P, S/I such as 'RAS' or 'LPS', got {orientation!r}")

    # Two streams: the noise needs one draw per voxel, and must not shift the draws of the anatomy.
    rng, noise_rng = np.random.default_rng(seed).spawn(2)
    scan, world = _empty_scan(rng, spacing, extent_scale)
    _draw_body(scan, rng)
    noise = gaussian_filter(noise_rng.standard_normal(scan.image.shape, dtype=np.float32), 0.55)
    noise *= rng.uniform(9, 16) / noise.std()
    image = np.clip(np.rint(scan.image + noise), -1024, 3071).astype(np.int16)

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [axis[0] for axis in world]
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(orientation))
    affine = affine @ orientations.inv_ornt_aff(turn, image.shape)
    stored = [np.ascontiguousarray(orientations.apply_orientation(a, turn)) for a in (image, scan.label)]
    return Phantom(stored[0], stored[1], affine)


def write_phantoms(
    folder: Path,
    *,
    num_labelled: int,
    num_unlabelled: int,
    seed: int = 0,
    spacings: Sequence[tuple[float, float, float]] = SPACINGS,
    progress: bool = True,
) -> None:
    """Write both datasets of the demo under `folder`, in the nnU-Net raw layout; a count of 0 skips one.

    `Dataset900_PhantomLabelled` holds imagesTr, labelsTr and dataset.json, `Dataset901_PhantomUnlabelled` only
    imagesTr. Spacings and orientations change from case to case. No body occurs twice, in a dataset or across
    the two. The same arguments write the same bytes. Raises ValueError for a negative count or seed, for no
    spacings, and for an images folder that already holds other cases.
    """
    if min(num_labelled, num_unlabelled, seed) < 0 or not spacings:
        raise ValueError(
            "expected counts and a seed of at least 0, and at least one spacing, got "
            f"num_labelled={num_labelled}, num_unlabelled={num_unlabelled}, seed={seed}, spacings={spacings}"
        )
    labelled, unlabelled = (
        Path(folder) / name for name in ("Dataset900_PhantomLabelled", "Dataset901_PhantomUnlabelled")
    )
    names = {labelled: [f"phantom_{i:03d}" for i in range(num_labelled)]}
    names[unlabelled] = [f"trunk_{i:03d}" for i in range(num_unlabelled)]
    for dataset, cases in names.items():
        extra = {p.name for p in (dataset / "imagesTr").glob("*")} - {f"{case}_0000.nii.gz" for case in cases}
        if cases and extra:
            raise ValueError(
                f"expected {dataset} to be new or to hold the same cases, found also {sorted(extra)[:3]}: "
                "remove that folder or choose another"
            )

    jobs = [(dataset, i, case) for dataset, cases in names.items() for i, case in enumerate(cases)]
    for dataset, i, case in tqdm(jobs, desc="phantoms", unit="case", disable=not progress):
        number = 2 * i + (dataset == unlabelled)  # even and odd: the datasets never share a body
        phantom = make_phantom(
            (seed << 32) + number,
            spacing=spacings[i % len(spacings)],
            orientation=ORIENTATIONS[number % len(ORIENTATIONS)],
        )
        _write_nifti(dataset / "imagesTr" / f"{case}_0000.nii.gz", phantom.image, phantom.affine)
        if dataset == labelled:
            _write_nifti(dataset / "labelsTr" / f"{case}.nii.gz", phantom.label, phantom.affine)
    if num_labelled:
        description = {
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": num_labelled,
            "file_ending": ".nii.gz",
        }
        (labelled / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")


def _write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))  # no time stamp: same bytes each run


@dataclass
class _Scan:
    """The volume being painted, on an RAS grid. All arrays are (h, w, d); x, y, z are body coordinates in mm."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    texture: np.ndarray  # smooth random field, mean 0, sd 1
    blur: float  # mm, width of the partial volume ramp
    fat: float  # mm under the skin
    image: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        others = ((1, 2), (0, 2), (0, 1))
        axes = (self.x, self.y, self.z)
        self._bounds = [(c.min(axis=o), c.max(axis=o)) for c, o in zip(axes, others, strict=True)]

    def box(self, low: npt.ArrayLike, high: npt.ArrayLike) -> _Box:
        """Slices that hold every voxel between `low` and `high` in body coordinates."""
        slices = []
        for (minimum, maximum), lo, hi in zip(self._bounds, np.asarray(low), np.asarray(high), strict=True):
            inside = np.flatnonzero((maximum >= lo - self.blur) & (minimum <= hi + self.blur))
            slices.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
        return slices[0], slices[1], slices[2]

    def paint(
        self, distance: np.ndarray, hu: float | np.ndarray, label: int | None = 0, box: _Box = _EVERYWHERE
    ) -> None:
        """Cover `box` with `hu` where `distance` < 0; `label` None leaves the labels as they are."""
        cover = np.clip(0.5 - distance / self.blur, 0, 1)
        self.image[box] += cover * (hu - self.image[box])
        if label is not None:
            self.label[box][distance < 0] = label

    def blob(
        self, centre: npt.ArrayLike, radii: npt.ArrayLike, turn: np.ndarray, box: _Box | None = None
    ) -> tuple[_Box, np.ndarray]:
        """Distance to an ellipsoid whose axes are the rows of `turn`; in `box`, or the box that holds it."""
        centre, radii = np.asarray(centre), np.asarray(radii)
        if box is None:
            reach = radii.max() + 4
            box = self.box(centre - reach, centre + reach)
        shifted = [c[box] - m for c, m in zip((self.x, self.y, self.z), centre, strict=True)]
        p = [_dot(row, shifted) for row in turn]
        k0 = np.sqrt(_dot(1 / radii**2, [c * c for c in p])) + 1e-6
        k1 = np.sqrt(_dot(1 / radii**4, [c * c for c in p])) + 1e-6
        return box, k0 * (k0 - 1) / k1

    def tube(self, points: Sequence[npt.ArrayLike], radii: Sequence[float]) -> tuple[_Box, np.ndarray]:
        """Distance to a tube along `points`, with a radius at each, and the box that holds it."""
        nodes = np.asarray(points, float)
        reach = max(radii) + 4
        box = self.box(nodes.min(axis=0) - reach, nodes.max(axis=0) + reach)
        p = (self.x[box], self.y[box], self.z[box])
        distance = np.full(p[0].shape, np.inf, np.float32)
        for a, b, ra, rb in zip(nodes[:-1], nodes[1:], radii[:-1], radii[1:], strict=True):
            rel = [c - float(s) for c, s in zip(p, a, strict=True)]
            t = np.clip(_dot((b - a) / np.sum((b - a) ** 2), rel), 0, 1)
            off = [r - t * float(s) for r, s in zip(rel, b - a, strict=True)]
            gap = np.sqrt(_dot((1, 1, 1), [c * c for c in off]))
            np.minimum(distance, gap - (ra + t * (rb - ra)), out=distance)
        return box, distance


def _dot(weights: npt.ArrayLike, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Weighted sum of arrays, which may still have to be broadcast, in their own precision."""
    u, v, w = (float(k) for k in np.asarray(weights))
    return u * arrays[0] + v * arrays[1] + w * arrays[2]


def _smooth_field(rng: np.random.Generator, axes: Sequence[np.ndarray], limits: np.ndarray, knot: float) -> np.ndarray:
    """Random field, mean 0 and sd 1, smooth over `knot` mm; tied to the coordinates, not to the grid."""
    counts = [int(np.ceil(limit / knot)) + 2 for limit in limits]
    field = rng.standard_normal([2 * n + 1 for n in counts]).astype(np.float32)
    for axis, n in zip(axes, counts, strict=True):
        weights = np.exp(-((axis[:, None] / knot - np.arange(-n, n + 1)) ** 2))
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        field = np.tensordot(field, weights.astype(np.float32), axes=(0, 1))  # the done axis goes last: h, w, d again
    return field


def _rotation(degrees: npt.ArrayLike) -> np.ndarray:
    """Rotation about x, then y, then z."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(np.asarray(degrees))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[j, i], step[i, j] = np.sin(angle), -np.sin(angle)
        turn = step @ turn
    return turn


def _empty_scan(
    rng: np.random.Generator, spacing: Sequence[float], extent_scale: float
) -> tuple[_Scan, list[np.ndarray]]:
    """Air around a body of random size and posture, and the world coordinates (mm) along each axis of the grid."""
    step = np.asarray(spacing) / extent_scale  # from here on the body has its full size
    scale = rng.normal(1.03, 0.04) * (1 + rng.normal(0, 0.025, 3))
    fat = rng.uniform(7, 26)
    half_extent = scale * (np.array([138.0, 100.0, _HALF_HEIGHT]) + fat * np.array([1.2, 1.2, 0])) + [8, 8, 0]
    num = np.rint(2 * half_extent / step).astype(int)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(num, step, strict=True)]
    origin = rng.uniform([-25, -200, -600], [25, -100, -200])  # of the body in the scanner

    p = np.meshgrid(*(a.astype(np.float32) for a in axes), indexing="ij", sparse=True)
    turn = _rotation(rng.normal(0, (2, 1.5, 3)))
    x, y, z = (_dot(row / k, p) for row, k in zip(turn, scale, strict=True))
    for c, amplitude in ((x, 3.0), (y, 2.5), (z, 4.0)):
        c += amplitude * _smooth_field(rng, axes, half_extent, 55)
    x += rng.normal(0, 3) * np.sin(z / 50 + rng.uniform(0, 6))  # mild scoliosis
    texture = _smooth_field(rng, axes, half_extent, 9)
    image = np.full(x.shape, -1000, np.float32)
    scan = _Scan(x, y, z, texture, float(np.mean(step)), fat, image, np.zeros(x.shape, np.uint8))
    return scan, [a * extent_scale + o for a, o in zip(axes, origin, strict=True)]


def _draw_body(scan: _Scan, rng: np.random.Generator) -> None:
    """Paint everything, what lies outside first and what lies in front last."""
    x, y, z = scan.x, scan.y, scan.z
    contrast = rng.uniform(0.3, 1)  # how much contrast medium has arrived
    blood = 50 + rng.uniform(90, 170) * contrast
    muscle = rng.uniform(48, 60)

    # The cavity of chest and belly: a superellipse that changes along z.
    knots = [-170, -110, -50, 10, 70, 130, 180]
    width, depth = (
        np.interp(z, knots, k).astype(np.float32)
        for k in ([116, 110, 109, 116, 119, 114, 104], [72, 71, 73, 79, 82, 78, 70])
    )
    rho = np.hypot(x, y)
    ratio = ((np.abs(x) / width) ** 2.4 + (np.abs(y) / depth) ** 2.4) ** (1 / 2.4) + 1e-6
    cavity = rho - rho / ratio
    angle = np.arctan2(np.abs(x), -y)  # 0 behind, pi in front
    back = np.exp(-((angle / 0.75) ** 2))
    low = 1 / (1 + np.exp((z + 10) / 35))
    wall = 11 + 11 * back + 2 * np.exp(-(((angle - 1.6) / 0.5) ** 2))
    fat = scan.fat * (0.6 + 0.55 * low + 0.25 * back * low - 0.15 * np.exp(-(((angle - 2.2) / 0.4) ** 2)))
    groove = 6 * np.exp(-((x / 14) ** 2)) * (y < 0)
    skin = cavity - wall - fat + groove
    scan.paint(skin, 25)
    scan.paint(skin + 2.2, -105 + 6 * scan.texture)
    scan.paint(cavity - wall + 0.4 * groove, muscle - 5 + 9 * scan.texture)
    spine_y = -44 + 10 * np.sin(-(z + 10) / 62)  # forward in the lumbar part, backward in the chest
    back_muscle = (np.hypot((np.abs(x) - 31) / 29, (y - spine_y + 38) / 19) - 1) * 19
    cavity = np.maximum(cavity, -back_muscle)
    scan.paint(cavity, -92 + 12 * scan.texture)

    # The diaphragm: a dome on each side, higher on the right, falling to the ribs.
    q2 = (np.maximum(np.abs(x) - 58, 0.35 * (58 - np.abs(x))) / 62) ** 2 + ((y - 8) / 80) ** 2
    breath = rng.normal(0, 7)
    dome = (46 + breath + 7 * np.tanh(x / 20) - 78 * q2**1.5 - z) / np.sqrt(1 + 10 * q2**2)  # > 0: below it
    chest, belly = np.maximum(cavity, dome), np.maximum(cavity, -dome)
    scan.paint(np.maximum(np.abs(dome) - 1.5, cavity), muscle)

    _draw_ribs(scan, cavity, angle)
    _draw_lungs(scan, rng, chest, spine_y, blood)
    _draw_heart(scan, rng, chest, blood, muscle)
    _draw_gut(scan, rng, belly, contrast)
    _draw_organs(scan, rng, belly, contrast, blood)
    _draw_spine_and_vessels(scan, rng, skin, spine_y, blood, muscle)
    scan.image += scan.texture * np.where(scan.image > -200, 4, 0)


def _levels(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the nearest vertebra (0: T12, upwards positive) and mm above its middle; pitch 24 to 36 mm."""
    pitch = 30 - 0.035 * z
    phase = -np.log(pitch / 30) / 0.035
    number = np.rint(phase)
    return number, (phase - number) * pitch


def _draw_ribs(scan: _Scan, cavity: np.ndarray, angle: np.ndarray) -> None:
    """Ribs descend towards the front, then rise as cartilage to the breastbone; the lowest two end early."""
    box = scan.box((-150, -120, -70), (150, 120, _HALF_HEIGHT + 40))
    cavity, angle, x, z = (a[box] for a in (cavity, angle, scan.x, scan.z))
    bend = np.maximum(angle - 2.35, 0)
    number, above = _levels(z + 90 * np.sin(angle / 2) ** 2 - 105 * bend - 6)
    end = np.select([number < 0, number == 0, number == 1], [0.0, 1.1, 1.6], 2.4)
    shell = (np.hypot((cavity - 5) / 3.6, above / 6.5) - 1) * 3.6
    cartilage = np.maximum(shell + 0.3, 50 * (angle - np.where(number > 2, 3.0, end)))
    bone = np.maximum(shell, 50 * (angle - end))
    sternum = np.max([np.abs(cavity - 6) - 5, np.abs(x) - 16, (60 - z), 50 * (1.6 - angle)], axis=0)
    scan.paint(cartilage, 105, box=box)
    for distance in (bone, sternum):
        scan.paint(distance, np.where(distance > -1.8, 480, 170), box=box)


def _draw_lungs(scan: _Scan, rng: np.random.Generator, chest: np.ndarray, spine_y: np.ndarray, blood: float) -> None:
    """Two lungs with a gravity gradient and a branching tree of vessels, and the bronchi."""
    x, y, z = scan.x, scan.y, scan.z
    beside = 9 + 17 * np.exp(-(((y + 8) / 38) ** 2)) + 8 * np.exp(-(((z - 122) / 22) ** 2 + ((y + 5) / 25) ** 2))
    lung = np.max([chest + 1.5, beside - np.abs(x + 3), 26 - np.hypot(x, y - spine_y)], axis=0)
    air = rng.uniform(-870, -790) - 0.5 * y + 14 * scan.texture
    for side, label in ((1, LABELS["right_lung"]), (-1, LABELS["left_lung"])):
        scan.paint(np.maximum(lung, -side * x), air, label)
        hilum = np.array([side * 30, -6, 118])
        for _ in range(20):
            way = rng.normal((0.9 * side, 0, -0.3), (0.7, 1, 1.3))
            way /= np.linalg.norm(way)
            fork = hilum + way * rng.uniform(30, 75)
            twigs = [fork + (way + rng.normal(0, 0.5, 3)) * rng.uniform(20, 50) for _ in range(4)]
            for points in ((hilum, fork), *((fork, tip) for tip in twigs)):
                box, distance = scan.tube(points, (4.2, 2.4) if points[0] is hilum else (2.2, 0.8))
                scan.paint(np.maximum(distance, lung[box] + 2), 0.8 * blood - 20, None, box)
        box, distance = scan.tube([(0, -14, 190), (0, -14, 152), (side * 34.0, -12, 122)], (8, 8, 6))
        scan.paint(distance - 2, 30, box=box)
        scan.paint(distance, -985, box=box)


def _draw_heart(scan: _Scan, rng: np.random.Generator, chest: np.ndarray, blood: float, muscle: float) -> None:
    """Heart in its fat, two pairs of chambers, and the great vessels above it (not the aorta)."""
    centre = np.array([-18, 24, 88]) + rng.normal(0, 4, 3)
    size = rng.normal(1, 0.06)
    turn = _rotation((-20, 20, 35))
    for grow, hu in ((6, -85.0), (0, muscle + 0.35 * (blood - 50))):
        box, distance = scan.blob(centre, size * np.array([52, 37, 40]) + grow, turn)
        scan.paint(np.maximum(distance, chest[box] + 2), hu, box=box)
    for shift, radii in (
        ((-15, 4, -6), (22, 14, 17)),
        ((12, 17, -4), (19, 13, 20)),
        ((22, -6, 10), (17, 15, 18)),
    ):
        box, distance = scan.blob(centre + shift, radii, turn)
        scan.paint(distance, blood + 8 * scan.texture[box], box=box)
    for points, radius in (
        ([(22, 8, 180), (24, 6, 110)], 9.0),  # superior vena cava
        ([(-8, 24, 108), (-10, 14, 130), (-26, -2, 132)], 12.0),  # pulmonary trunk
        ([(-2, -24, 180), (-3, -20, 70), (-10, -8, 45)], 6.0),  # oesophagus
    ):
        box, distance = scan.tube(points, [radius] * len(points))
        scan.paint(distance, muscle if radius < 8 else blood, box=box)


def _draw_gut(scan: _Scan, rng: np.random.Generator, belly: np.ndarray, contrast: float) -> None:
    """Loops of small bowel, the colon with gas and contents, and the stomach with its air-fluid level."""
    for _ in range(110):
        centre = rng.uniform((-78, -12, -175), (78, 58, -50))
        box, distance = scan.blob(centre, rng.uniform(10, 22, 3), _rotation(rng.uniform(0, 180, 3)))
        distance = np.maximum(distance, belly[box] + 2)
        scan.paint(distance, 45 + 45 * contrast, box=box)
        scan.paint(distance + 2.5, rng.uniform(5, 45), box=box)
    left, right = rng.normal(0, 5, 2)
    frame = [
        (84, -8, -190),
        (86, -5 + right, -110),
        (80, 15, -62),
        (40, 52, -75 + left),
        (-30, 54, -70 + right),
    ]
    frame += [(-76, 20, -40), (-92, -16, -70), (-90, -14 + left, -190)]
    bumps = 1.5 * np.sin(scan.x / 7) * np.cos(scan.z / 7)
    box, distance = scan.tube(frame, (23, 21, 18, 16, 16, 16, 14, 13))
    distance = np.maximum(distance + bumps[box], belly[box] + 2)
    scan.paint(distance, 50 + 25 * contrast, box=box)
    gas = scan.texture[box] + scan.y[box] / 40 > rng.uniform(0.3, 1.2)
    scan.paint(distance + 3, np.where(gas, -850, 15 + 45 * scan.texture[box]), box=box)

    centre = np.array([-48, 22, 2]) + rng.normal(0, 4, 3)
    radii = np.array([30, 31, 46]) * rng.uniform(0.8, 1.1)
    box, distance = scan.blob(centre, radii, _rotation((15, -30, 0)))
    distance = np.maximum(distance, belly[box] + 4)
    scan.paint(distance, 45 + 40 * contrast, box=box)
    level = rng.uniform(8, 20)  # gas lies in front: the patient lies on the back
    scan.paint(distance + 4, np.where(scan.y[box] > centre[1] + level, -920, rng.uniform(5, 40)), box=box)


def _draw_organs(scan: _Scan, rng: np.random.Generator, belly: np.ndarray, contrast: float, blood: float) -> None:
    """Liver with vessels and gall bladder, pancreas, spleen, kidneys: each varies in place, size and pose."""

    def pose(*nominal: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centre, radii, degrees = (np.asarray(n) for n in nominal)
        radii = radii * rng.normal(1, 0.05) * (1 + rng.normal(0, 0.04, 3))
        return centre + rng.normal(0, 3, 3), radii, _rotation(degrees + rng.normal(0, 5, 3))

    liver_hu = 52 + 55 * contrast + rng.normal(0, 4)
    for place, size, degrees, slope in (
        ((56, -4, 0), (60, 74, 72), (0, 0, 0), 0.6),  # right lobe
        ((4, 36, 16), (64, 34, 32), (0, 12, -8), 0.3),  # left lobe
    ):
        box, distance = scan.blob(*pose(place, size, degrees))
        under = slope * (36 - scan.x[box]) - 0.8 * (scan.z[box] + 32)  # the lower surface rises to the middle
        distance = np.max([distance, belly[box] + 2, under], axis=0)
        scan.paint(distance, liver_hu + 3 * scan.texture[box], LABELS["liver"], box)
    vessels: list[tuple[list[npt.ArrayLike], Sequence[float]]] = [
        ([(10, -22, 44), (40, -4, 40), (80, 0, 26)], (5, 4, 2)),  # hepatic veins
        ([(10, -22, 44), (34, 24, 34), (52, 48, 16)], (5, 4, 2)),
        ([(10, -22, 44), (-6, 18, 34), (-24, 34, 26)], (4, 3, 2)),
        ([(12, 2, -34), (28, 4, -4), (56, -8, 4), (88, -20, -6)], (7, 6, 4, 2)),  # portal vein
        ([(28, 4, -4), (16, 30, 8), (-16, 42, 12)], (5, 4, 2)),
        ([(56, -8, 4), (68, 28, -8), (70, 40, -20)], (4, 3, 1.5)),
    ]
    for points, widths in vessels:
        box, distance = scan.tube(points, widths)
        scan.paint(np.maximum(distance, belly[box] + 3), liver_hu + 0.35 * (blood - 40), None, box)
    box, distance = scan.blob(*pose((44, 36, -34), (13, 24, 15), (25, 0, 0)))
    scan.paint(distance, 45 + 25 * contrast, box=box)
    scan.paint(distance + 2.5, 8, box=box)
    box, distance = scan.tube([(36, 6, -46), (16, 14, -38), (-20, 6, -26), (-62, -22, -14)], (13, 10, 9, 8))
    scan.paint(distance + 1.5 * scan.texture[box], 45 + 50 * contrast, box=box)

    box, distance = scan.blob(*pose((-78, -32, -8), (38, 53, 54), (20, 0, -15)))
    hollow = 34 - np.hypot(scan.x[box] + 42, scan.y[box] - 2)  # the stomach's side is concave
    distance = np.max([distance, hollow, belly[box] + 2], axis=0)
    spleen_hu = 50 + 70 * contrast + rng.normal(0, 4)
    scan.paint(distance, spleen_hu + 3 * scan.texture[box], LABELS["spleen"], box)

    for side, label, height in ((1, LABELS["right_kidney"], -62.0), (-1, LABELS["left_kidney"], -46.0)):
        centre, radii, turn = pose((side * 62.0, -36.0, height), (26.0, 23.5, 51.0), (8, side * 14, side * 20))
        box, distance = scan.blob(centre, radii + 7, turn)
        scan.paint(np.maximum(distance, belly[box] + 1), -100, box=box)
        box, distance = scan.blob(centre, radii, turn)
        _, sinus = scan.blob(centre + radii[0] * np.array([-0.75 * side, 0.35, 0]), (15, 10, 22), turn, box)
        distance = np.maximum(distance, -sinus)  # its fat makes the bean
        pyramids = (distance < -6) & (scan.texture[box] > -0.3)
        scan.paint(distance, 38 + 140 * contrast - 35 * contrast * pyramids, label, box)
        start = centre + radii[0] * np.array([-0.5 * side, 0.2, 0])
        box, distance = scan.tube([start, (side * 10, -12, centre[2] + 8)], (4, 4))
        scan.paint(distance, blood - 20, box=box)


def _draw_spine_and_vessels(
    scan: _Scan, rng: np.random.Generator, skin: np.ndarray, spine_y: np.ndarray, blood: float, muscle: float
) -> None:
    """Spine with discs, canal, arches and processes; psoas muscles; vena cava and aorta in front of it."""
    box = scan.box((-60, -140, -200), (60, 40, 200))
    x, y, z, texture = (a[box] for a in (scan.x, scan.y - spine_y, scan.z, scan.texture))  # y from the bodies' middle
    side = np.abs(x)
    low = np.clip((20 - z) / 150, 0, 1.3)  # grows downwards from the lowest rib
    psoas = (np.hypot((side - 33 - 5 * low) / (17 * low + 1), (y - 1) / (19 * low + 1)) - 1) * 12
    scan.paint(np.maximum(psoas, 2 - 40 * low), muscle + 5 * texture, box=box)

    size = rng.normal(1, 0.05)
    spongy = rng.uniform(170, 240) + 25 * texture
    above = _levels(z)[1]
    above += 0.08 * y  # the end plates tilt a little
    waist = 1 - 0.0006 * np.minimum(above**2, 150)
    column = (np.hypot(x / 22, y / 16.5) / (size * waist * (1 - 0.0007 * z)) - 1) * 17
    disc_half = 3.4 + 0.8 * low
    disc = 15 - 0.0175 * z - disc_half - np.abs(above)  # < 0 in a disc
    canal = (np.hypot(x / 11, (y + 24) / 8.5) - 1) * 9
    arch = np.max([np.abs(canal - 3) - 3.5, y + 16, np.abs(above + 5) - 10], axis=0)
    spinous = np.max([side - 3.6, y + 30, -58 - y, np.abs(above + 9 + 0.35 * (y + 36)) - 8.5], axis=0)
    spinous = np.maximum(spinous, skin[box] + 6)  # even in a thin back
    transverse = np.max([side - 38 + 4 * low, np.hypot(y + 21 + 0.18 * side, above - 1) - 5.5], axis=0)
    bone = np.minimum.reduce([column, arch, spinous, transverse])
    scan.paint(bone, np.where(bone > -2.2, 430, spongy), LABELS["spine"], box)
    plate = np.maximum(column, np.abs(disc) - 1.2)
    scan.paint(plate, 400, None, box)
    scan.paint(np.maximum(column, disc), 85, None, box)
    scan.paint(canal, 28, box=box)

    bow = rng.normal(0, 5)
    box = scan.box((-70, -120, -200), (70, 60, 200))
    x, y, z = (a[box] for a in (scan.x, scan.y - spine_y, scan.z))
    rise = np.clip((z - 20) / 90, 0, 1)
    cava = np.hypot(x - 20 - 3 * rise, (y - 26 - 16 * rise) * 1.25) - 11 * size
    scan.paint(np.maximum(cava, z - 58), 0.85 * blood, box=box)
    middle = -10 - 12 * rise + bow * np.sin(z / 45)
    radius = rng.uniform(9.5, 12.5) * (1 + 0.0012 * z)
    aorta = np.hypot(x - middle, y - 28 * size + 8 * rise) - radius
    scan.paint(aorta, blood + 15, LABELS["aorta"], box)
    box, distance = scan.tube([(4, 20, 98), (12, 22, 120), (14, 12, 190)], (13, 14.5, 14.5))  # ascending part
    scan.paint(distance, blood + 15, LABELS["aorta"], box)
