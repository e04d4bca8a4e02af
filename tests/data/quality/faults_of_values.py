"""Faults of an image's values and of labels, as a table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tests.data.quality.faults_of_files import Expected, Fault
from tests.data.quality.faults_of_headers import image_of
from tests.data.quality.small_data import AFFINE, SHAPE, SmallData, organs, save, set_fields


def values(name: str, expected: Expected, make: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """An image of other values; a float result is stored as float32."""

    def changed(voxels: np.ndarray) -> tuple[Any, ...]:
        made = make(voxels)
        return (made.astype(np.float32) if made.dtype == np.float64 else made,)

    return image_of(name, expected, changed)


def put(voxels: np.ndarray, value: float, index: Any = (0, 0, 0)) -> np.ndarray:
    """Set one voxel of a float copy."""
    copy = voxels.astype(np.float32)
    copy[index] = value
    return copy


def edge(voxels: np.ndarray, value: float, dtype: str = "int16") -> np.ndarray:
    """Set all outside of a circle, as scanners do."""
    x, y = (np.indices(SHAPE[:2]) - np.array(SHAPE[:2]).reshape(2, 1, 1) / 2) / 8
    return np.where((x**2 + y**2 > 1)[..., None], value, voxels).astype(dtype)


def noise(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """MR and PET by their shapes of histograms."""

    def make(voxels: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(3)
        body = voxels > -300
        if kind == "MR":
            return np.where(
                body, 500 + 0.5 * voxels + rng.normal(0, 30, SHAPE), np.abs(rng.normal(0, 8, SHAPE))
            ).astype(np.int16)
        return np.where(body, rng.gamma(2, 0.7, SHAPE), rng.gamma(1, 0.02, SHAPE))

    return make


VALUES = [
    values("one NaN", "refused", lambda v: put(v, np.nan)),
    values("NaN outside of the field", "refused", lambda v: edge(v, np.nan, "float32")),
    values("all NaN", "refused", lambda v: v * np.float32(np.nan)),
    values("one infinite", "refused", lambda v: put(v, np.inf)),
    values("one minus infinite", "refused", lambda v: put(v, -np.inf)),
    values("one of 1e30", "agree", lambda v: put(v, 1e30)),
    values("one of -1e30", "agree", lambda v: put(v, -1e30)),
    values("constant", "refused", lambda v: np.full_like(v, 40)),
    values("constant 0", "refused", lambda v: np.zeros_like(v)),
    values("constant air", "refused", lambda v: np.full_like(v, -1000)),
    values("all air", "refused", lambda v: v // 10 - 900),
    values("all bone", "agree", lambda v: np.abs(v) + 1500),
    values("one voxel of tissue", "agree", lambda v: put(v // 10 - 900, 40, (8, 8, 8)).astype(np.int16)),
    values("offset of 1024", "refused", lambda v: v + 1024),
    values("offset of 1000 as uint16", "refused", lambda v: (v + 1000).clip(0).astype(np.uint16)),
    values("times 10", "refused", lambda v: v.astype(np.int16) * 10),
    values("inverted", "refused", lambda v: -v),
    values("8 bits", "refused", lambda v: ((v.clip(-160, 240) + 160) / 400 * 255).astype(np.uint8)),
    values("8 bits as float", "refused", lambda v: (v.clip(-160, 240) + 160.0) / 400 * 255),
    values("0 to 1", "refused", lambda v: (v.clip(-160, 240) + 160) / 400),
    values("-1 to 1", "refused", lambda v: v.clip(-1000, 1000) / 1000),
    values("-1 to 1 by bone", "refused", lambda v: (v.clip(-1000, 1000) / 1000).clip(-1, 1) * 0.999),
    values("z-score", "refused", lambda v: (v - v.mean()) / v.std()),
    values(
        "z-score of clipped values",
        "refused",
        lambda v: (v.clip(-200, 300) - v.clip(-200, 300).mean()) / v.clip(-200, 300).std(),
    ),
    values("MR", "refused", noise("MR")),
    values("PET", "refused", noise("PET")),
    values("wrapped to uint16", "refused", lambda v: v.astype(np.uint16)),
    values("label map", "refused", lambda v: organs(0).astype(np.int16)),
    values("label map uint8", "refused", lambda v: organs(0)),
    values("mask", "refused", lambda v: (v > -300).astype(np.uint8)),
    values("padding of -2000", "fine", lambda v: edge(v, -2000)),
    values("padding of -3024", "fine", lambda v: edge(v, -3024)),
    values("padding of -32768", "agree", lambda v: edge(v, -32768)),
    values("air of -1024", "fine", lambda v: v.clip(-1024)),
    values("metal", "fine", lambda v: put(v, 3071, (slice(8, 10), 8, 8)).astype(np.int16)),
    values("metal of 16 bits", "fine", lambda v: put(v, 30000, (slice(8, 10), 8, 8)).astype(np.int16)),
    values("fractions of HU", "fine", lambda v: v + 0.25),
    values("narrow HU window", "agree", lambda v: v.clip(-160, 240)),
    values("wide HU window", "fine", lambda v: v.clip(-1000, 1000)),
    values("body alone on -1024", "fine", lambda v: np.where(v > -300, v, -1024).astype(np.int16)),
    values("body alone on 0", "agree", lambda v: np.where(v > -300, v, 0).astype(np.int16)),
    values("tenths of HU", "agree", lambda v: v.clip(-1024, 3000) * 10),
    values("attenuation", "refused", lambda v: (v / 1000 + 1) * 0.19),
]
"""Faults of an image's values."""


def label_of(name: str, expected: Expected, make: Callable[[np.ndarray], tuple[Any, ...]]) -> Fault:
    """A label written anew from its values: the arguments of `save` behind the path."""
    return Fault(
        f"label {name}", "label", expected, lambda data, case: save(data.label(case), *make(data.organs(case)))
    )


def shifted(*mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


def reoriented(codes: str) -> Callable[[np.ndarray], tuple[Any, ...]]:
    """Store a label in another order or direction of its axes, at the same position in space."""

    def make(voxels: np.ndarray) -> tuple[Any, ...]:
        wanted = nib.orientations.axcodes2ornt(codes)
        turned = nib.Nifti1Image(voxels, AFFINE).as_reoriented(wanted)
        return np.ascontiguousarray(turned.dataobj), turned.affine

    return make


def near_whole(data: SmallData, case: str) -> None:
    """Values such as .99999994 by a scale factor, as other tools write them."""
    path = data.label(case)
    save(path, (data.organs(case).astype(np.int16)) * 16000)
    set_fields(path, scl_slope=1 / 16000, scl_inter=0.0)


def lose_a_voxel(data: SmallData, case: str) -> None:
    """A fine grid, of whose voxels preparation keeps every third."""
    fine = AFFINE @ np.diag([1 / 3, 1 / 3, 1 / 3, 1])
    save(data.image(case), np.kron(data.voxels(case), np.ones((3, 3, 3), np.int16)), fine)
    label = np.kron(data.organs(case), np.ones((3, 3, 3), np.uint8))
    label[25, 25, 25] = 3
    save(data.label(case), label, fine)


def unplaced(path: Path) -> None:
    set_fields(path, sform_code=0, qform_code=0)


LABELS = [
    Fault("label missing", "label", "otherwise", lambda data, case: data.label(case).unlink()),
    label_of("cropped", "refused", lambda v: (v[:-1],)),
    label_of("of another size", "refused", lambda v: (v[::2, ::2, ::2], AFFINE @ np.diag([2.0, 2, 2, 1]))),
    label_of("padded at the same position", "refused", lambda v: (np.pad(v, ((0, 1), (0, 0), (0, 0))),)),
    label_of("30 mm away", "refused", lambda v: (v, shifted(30, 0, 0))),
    *(
        label_of(
            f"2 mm away on axis {axis}", "refused", lambda v, axis=axis: (v, shifted(*(2.0 * (np.arange(3) == axis))))
        )
        for axis in range(3)
    ),
    *(
        label_of(
            f"1.2 mm away on axis {axis}", "fine", lambda v, axis=axis: (v, shifted(*(1.2 * (np.arange(3) == axis))))
        )
        for axis in range(3)
    ),
    label_of("1e-3 mm away", "fine", lambda v: (v, shifted(1e-3, -1e-3, 1e-3))),
    *(label_of(f"stored as {codes}", "fine", reoriented(codes)) for codes in ("LPS", "RAI", "ARS", "SPL", "SLA")),
    label_of(
        "mirrored in its header alone",
        "refused",
        lambda v: (v, np.diag([-3.0, 3, 3, 1]) + np.pad(AFFINE[:3, 3:], ((0, 1), (3, 0)))),
    ),
    label_of("of another spacing", "refused", lambda v: (v, AFFINE @ np.diag([1.1, 1, 1, 1]))),
    Fault("label without codes", "label", "agree", lambda data, case: unplaced(data.label(case))),
    label_of("fractional", "refused", lambda v: (v * np.float32(0.5),)),
    label_of("blurred", "refused", lambda v: ((v * 0.25 + np.roll(v, 1, 0) * 0.75).astype(np.float32),)),
    Fault("label near whole by its slope", "label", "fine", near_whole),
    label_of("near whole as float", "fine", lambda v: ((v * 0.9999999).astype(np.float64),)),
    label_of("1e-2 from whole", "refused", lambda v: ((v * 1.01).astype(np.float32),)),
    label_of("negative", "refused", lambda v: (-v.astype(np.int16),)),
    label_of("negative background", "refused", lambda v: (np.where(v, v.astype(np.int16), -1),)),
    label_of("tiny negative", "fine", lambda v: ((v - 1e-7 * (v == 0)).astype(np.float64),)),
    label_of("above 255", "refused", lambda v: (v.astype(np.int16) * 300,)),
    label_of("NaN", "refused", lambda v: (put(v, np.nan),)),
    label_of("infinite", "refused", lambda v: (put(v, np.inf),)),
    label_of("of an undeclared class", "refused", lambda v: (v * np.uint8(9),)),
    label_of("of one undeclared voxel", "refused", lambda v: (put(v, 3, (8, 8, 8)).astype(np.uint8),)),
    Fault("label of one undeclared voxel, which resampling loses", "label", "refused", lose_a_voxel),
    label_of("0 and 255", "refused", lambda v: ((v > 0) * np.uint8(255),)),
    label_of("empty", "otherwise", lambda v: (v * np.uint8(0),)),
    label_of("organ everywhere", "agree", lambda v: (np.ones_like(v),)),
    label_of("without one organ", "fine", lambda v: (np.where(v == 2, 0, v).astype(np.uint8),)),
    label_of("organ in the corner alone", "agree", lambda v: (put(v * 0, 1).astype(np.uint8),)),
    label_of("4D with one volume", "fine", lambda v: (v[..., None],)),
    label_of("4D one-hot", "refused", lambda v: (np.stack([v == k for k in range(3)], -1).astype(np.uint8),)),
    label_of("2D", "refused", lambda v: (v[:, :, 9],)),
    *(
        label_of(f"of {kind}", "fine", lambda v, kind=kind: (v.astype(kind),))
        for kind in ("int16", "int32", "int64", "uint16", "float32", "float64", "int8")
    ),
    label_of("RGB", "refused", lambda v: (np.zeros(SHAPE, np.dtype([(c, "u1") for c in "RGB"])),)),
    label_of("complex", "refused", lambda v: (v.astype(np.complex64),)),
    Fault(
        "label is the image",
        "label",
        "refused",
        lambda data, case: data.label(case).write_bytes(data.image(case).read_bytes()),
    ),
    Fault(
        "image is the label",
        "image",
        "refused",
        lambda data, case: data.image(case).write_bytes(data.label(case).read_bytes()),
    ),
]
"""Faults of labels."""
