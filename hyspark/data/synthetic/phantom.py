"""A procedural, labelled CT of the human trunk, so that the demo and the tests need no patient.

The anatomy is a function of the world coordinates in mm and of a seed: the same seed at another spacing or in
another orientation is the same body, resampled. `anatomy` describes the body.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from hyspark.data.synthetic.anatomy import HALF_HEIGHT, LABELS, draw_body
from hyspark.data.synthetic.painting import Scan, dot, rotation, smooth_field

SPACINGS = ((3.0, 3.0, 3.0), (2.5, 2.5, 4.0), (3.2, 3.2, 2.5), (2.8, 2.8, 3.5), (4.0, 4.0, 4.0))
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS", "LAI", "SAR", "PIR")


@dataclass(frozen=True)
class Phantom:
    """A phantom CT.

    Attributes:
        image: int16 `(h, w, d)` in HU.
        label: uint8 `(h, w, d)`, see `LABELS`.
        affine: `(4, 4)` from voxels to mm in RAS.
    """

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
    """Draw a trunk, a pure function of the arguments.

    Args:
        seed: number of the body, at least 0.
        spacing: mm along right-left, front-back and head-foot, in that order whatever the orientation.
        orientation: nibabel's axis codes of the array; "RAS" runs towards the patient's right, front and head.
        extent_scale: scale factor of the body and its field of view, about 330 x 260 x 330 mm at 1. A small one gives
            a small volume that still holds every organ.

    Raises:
        ValueError: if spacing, scale or orientation is invalid.
    """
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing: expected three lengths above 0 mm, got {spacing}")
    if extent_scale <= 0:
        raise ValueError(f"extent_scale: expected a number above 0, got {extent_scale}")
    if sorted("RLAPSI".find(code) // 2 for code in orientation) != [0, 1, 2]:
        raise ValueError(f"orientation: expected one of R/L, A/P and S/I each, as in 'RAS', got {orientation!r}")

    # Two streams: the noise needs one draw per voxel, and must not shift the draws of the anatomy.
    rng, noise_rng = np.random.default_rng(seed).spawn(2)
    scan, world = empty_scan(rng, spacing, extent_scale)
    draw_body(scan, rng)
    noise = gaussian_filter(noise_rng.standard_normal(scan.image.shape, dtype=np.float32), 0.55)
    noise *= rng.uniform(9, 16) / noise.std()
    image = np.clip(np.rint(scan.image + noise), -1024, 3071).astype(np.int16)

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [axis[0] for axis in world]
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(orientation))
    affine = affine @ orientations.inv_ornt_aff(turn, image.shape)
    stored = [np.ascontiguousarray(orientations.apply_orientation(a, turn)) for a in (image, scan.label)]
    return Phantom(stored[0], stored[1], affine)


def empty_scan(
    rng: np.random.Generator, spacing: Sequence[float], extent_scale: float
) -> tuple[Scan, list[np.ndarray]]:
    """Make air around a body of random size and posture, and the world coordinates (mm) along each axis of the grid."""
    step = np.asarray(spacing) / extent_scale  # from here on the body has its full size
    scale = rng.normal(1.03, 0.04) * (1 + rng.normal(0, 0.025, 3))
    fat = rng.uniform(7, 26)
    half_extent = scale * (np.array([138.0, 100.0, HALF_HEIGHT]) + fat * np.array([1.2, 1.2, 0])) + [8, 8, 0]
    num = np.rint(2 * half_extent / step).astype(int)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(num, step, strict=True)]
    origin = rng.uniform([-25, -200, -600], [25, -100, -200])  # of the body in the scanner

    p = np.meshgrid(*(a.astype(np.float32) for a in axes), indexing="ij", sparse=True)
    turn = rotation(rng.normal(0, (2, 1.5, 3)))
    x, y, z = (dot(row / k, p) for row, k in zip(turn, scale, strict=True))
    for c, amplitude in ((x, 3.0), (y, 2.5), (z, 4.0)):
        c += amplitude * smooth_field(rng, axes, half_extent, 55)
    x += rng.normal(0, 3) * np.sin(z / 50 + rng.uniform(0, 6))  # mild scoliosis
    texture = smooth_field(rng, axes, half_extent, 9)
    image = np.full(x.shape, -1000, np.float32)
    scan = Scan(x, y, z, texture, float(np.mean(step)), fat, image, np.zeros(x.shape, np.uint8))
    return scan, [a * extent_scale + o for a, o in zip(axes, origin, strict=True)]


def write_phantoms(
    folder: Path,
    *,
    num_labelled: int,
    num_unlabelled: int,
    seed: int = 0,
    spacings: Sequence[tuple[float, float, float]] = SPACINGS,
    progress: bool = True,
) -> None:
    """Write both data sets of the demo in the nnU-Net raw layout.

    `Dataset900_PhantomLabelled` holds imagesTr, labelsTr and dataset.json, `Dataset901_PhantomUnlabelled` only
    imagesTr. Spacings and orientations change from case to case. No body occurs twice, in a data set or across the
    two. The same arguments write the same bytes.

    Args:
        folder: folder of the data sets.
        num_labelled: number of labelled cases; 0 omits their data set.
        num_unlabelled: number of unlabelled cases; 0 omits their data set.
        seed: seed of all bodies.
        spacings: mm per voxel, taken in turn.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if a count or the seed is negative, there are no spacings, or an images folder holds other cases.
    """
    if min(num_labelled, num_unlabelled, seed) < 0 or not spacings:
        raise ValueError(
            "num_labelled, num_unlabelled, seed and spacings: expected at least 0, and at least one spacing, got "
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
                f"{dataset}: expected a new folder or the same cases, got also {sorted(extra)[:3]}; remove that folder "
                "or choose another"
            )

    jobs = [(dataset, i, case) for dataset, cases in names.items() for i, case in enumerate(cases)]
    for dataset, i, case in tqdm(jobs, desc="phantoms", unit="case", disable=not progress):
        number = 2 * i + (dataset == unlabelled)  # even and odd: the datasets never share a body
        phantom = make_phantom(
            (seed << 32) + number,
            spacing=spacings[i % len(spacings)],
            orientation=ORIENTATIONS[number % len(ORIENTATIONS)],
        )
        write_nifti(dataset / "imagesTr" / f"{case}_0000.nii.gz", phantom.image, phantom.affine)
        if dataset == labelled:
            write_nifti(dataset / "labelsTr" / f"{case}.nii.gz", phantom.label, phantom.affine)
    if num_labelled:
        description = {
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": num_labelled,
            "file_ending": ".nii.gz",
        }
        (labelled / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write a compressed NIfTI file, the same bytes each time."""
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))  # no time stamp
