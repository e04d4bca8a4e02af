"""CT in HU is told from everything else by its values, and what does not fit the HU window is an error."""

import os
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import zoom

from hyspark.data.quality.image_kind import IN_HU, image_kind
from hyspark.data.quality.modality import Modality, declared_modality
from hyspark.data.quality.value_faults import value_faults
from hyspark.data.settings import PrepareSettings
from hyspark.data.synthetic.phantom import make_phantom

RNG = np.random.default_rng(0)
CT = make_phantom(1, extent_scale=0.5, spacing=(5.0, 5.0, 6.0)).image.astype(np.int16)
BODY = CT[tuple(slice(n // 3, 2 * n // 3) for n in CT.shape)]


def head_mr(scale: float = 1.0, noise: float = 12.0) -> np.ndarray:
    """A head in MR: broad tissue in a background near 0, which holds noise as its sign is kept."""
    grid = np.indices((40, 44, 36)) - np.array([20, 22, 18]).reshape(3, 1, 1, 1)
    inside = (grid**2).sum(0) < 250
    tissue = 500 + 250 * np.sin(grid[0] / 3) * np.cos(grid[1] / 4) + RNG.normal(0, 60, inside.shape)
    return (np.where(inside, tissue, 0) + RNG.normal(0, noise, inside.shape)) * scale


def pet() -> np.ndarray:
    """Uptake in SUV: low nearly everywhere, and one hot spot."""
    values = RNG.gamma(0.5, 0.3, (30, 30, 30))
    values[14:17, 14:17, 14:17] += 12
    return values


def windowed(low: float, high: float, top: float) -> np.ndarray:
    return (CT.clip(low, high) - low) / (high - low) * top


def padded(value: int) -> np.ndarray:
    return np.pad(CT, 12, constant_values=value)


KINDS = {
    "CT": (CT, "CT"),
    "CT of floats": (CT + RNG.normal(0, 0.3, CT.shape), "CT"),
    "CT with padding of -2000": (padded(-2000), "CT"),
    "CT with padding of -3024": (padded(-3024), "CT"),
    "CT with metal": (np.where(RNG.random(CT.shape) < 0.005, 12000, CT), "CT"),
    "CT clipped to -1000..1000": (CT.clip(-1000, 1000), "CT"),
    "lung": (RNG.normal(-850, 60, (20, 20, 20)), "CT"),
    "two values": (np.where(RNG.random((9, 9, 9)) < 0.3, 40, -1000), "CT"),
    "soft tissue and fat": (BODY, None),
    "soft tissue": (RNG.normal(40, 30, (20, 20, 20)), "CT without air"),
    "soft tissue without anything below 0": (RNG.normal(60, 8, (20, 20, 20)), "CT without air"),
    "vessels with contrast": (RNG.normal(250, 40, (20, 20, 20)), "CT without air"),
    "bone": (RNG.gamma(2, 250, (20, 20, 20)) - 60, "CT without air"),
    "body on a background of 0": (np.where(CT < -300, 0, CT), "CT without air"),
    "clipped to -160..240": (CT.clip(-160, 240), "narrow window"),
    "clipped to -50..100": (CT.clip(-50, 100), "narrow window"),
    "0..4095": (CT.clip(-1024, None) + 1024, "offset"),
    "1000 added": (CT.clip(-1000, None) + 1000, "offset"),
    "CT with blurred padding": (zoom(padded(-3024).astype(np.float32), 1.5, order=1), "CT"),
    "CT with noise": (CT + RNG.normal(0, 100, CT.shape), "CT"),
    "CT clipped to -1024..3071": (CT.clip(-1024, 3071), "CT"),
    "CT times 10": (CT.astype(np.int16) * 10, "not HU"),
    "CT times 10, air of one value": (CT.clip(-1024, 3000) * 10, "not HU"),
    "CT times 2": (CT * 2, "not HU"),
    "CT divided by 10": (CT / 10, "not HU"),
    "CT divided by 10 in whole numbers": (CT // 10, "not HU"),
    "1024 subtracted": (CT - 1024, "not HU"),
    "inverted": (-CT, "inverted"),
    "inverted, air of one value": (-CT.clip(-1000, 1000), "inverted"),
    "inverted padding": (-np.pad(CT, 2, constant_values=-3024), "inverted"),
    "8 bits": (windowed(-160, 240, 255).astype(np.uint8), "8-bit"),
    "8 bits of a wide window": (windowed(-1000, 1000, 255).astype(np.uint8), "8-bit"),
    "0..255 in floats": (windowed(-160, 240, 255), "8-bit"),
    "0..100": (windowed(-160, 240, 100), "8-bit"),
    "0..1": (windowed(-175, 250, 1), "scaled"),
    "-1..1": (CT.clip(-1000, 1000) / 1000, "scaled"),
    "z-score": ((CT - CT.mean()) / CT.std(), "scaled"),
    "z-score of noise": (RNG.normal(0, 1, (20, 20, 20)), "scaled"),
    "z-score in the body alone": (np.where(CT > -500, (CT - 40) / 60, 0).clip(-3, 5), "scaled"),
    "unsigned": (CT.astype(np.uint16), "wrapped around"),
    "MR": (np.abs(head_mr()).round().astype(np.int16), "no CT"),
    "MR with negative values": (head_mr().round().astype(np.int16), "no CT"),
    "MR on a background of 0": (head_mr(noise=0), "no CT"),
    "MR from 0 to 1400": (RNG.integers(0, 1401, (20, 20, 20)), "no CT"),
    "MR up to 30000": (np.abs(head_mr(40)), "no CT"),
    "PET": (pet(), "like PET"),
    "PET in Bq/ml": (pet() * 7000, "like PET"),
    "mask": ((CT > 0).astype(np.uint8), "label map"),
    "organs": (np.digitize(CT, [-500, -50, 30, 60, 300]).astype(np.int16), "label map"),
    "mask of 0 and 255": ((CT > 0).astype(np.uint8) * 255, "label map"),
}
UNTAKEN = ("label map", "inverted")
"""Kinds that no window is set to."""
DEFAULT = PrepareSettings()


def faults(values: np.ndarray, settings: PrepareSettings = DEFAULT, modality: str = "") -> list[str]:
    """The kinds of fault of an image."""
    given = (float(values.min()), float(values.max()), values, settings, Modality(modality, "dataset.json"))
    return [kind for kind, _ in value_faults(*given)]


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images_and_whether_they_fit_the_usual_window(name):
    values, expected = KINDS[name]
    kind = image_kind(float(values.min()), float(values.max()), values)
    assert expected is None or kind.name == expected, kind
    fits = {"clipped to -160..240": True, "clipped to -50..100": False}.get(name, kind.name in IN_HU)
    found = set(faults(values)) - {"perhaps no CT", "background of 0", "all air" if name == "lung" else ""}
    assert found == (set() if fits else {kind.name})


@pytest.mark.parametrize("name", [n for n, (_, kind) in KINDS.items() if kind not in (None, *UNTAKEN, *IN_HU)])
def test_a_window_that_was_set_to_the_values_takes_them(name):
    values, _ = KINDS[name]
    kind = image_kind(float(values.min()), float(values.max()), values)
    for low, high in ((kind.low, kind.high), kind.most):
        assert faults(values, PrepareSettings(hu_min=low, hu_max=high)) == ["another scale"]
    wide = 100 * (kind.high - kind.low)
    for low, high in ((-1000.0, 1000.0), (kind.low, kind.low + wide), (kind.low - wide, kind.high)):
        assert faults(values, PrepareSettings(hu_min=low, hu_max=high)) == [kind.name]
    middle = (kind.low + kind.high) / 2
    assert faults(values, PrepareSettings(hu_min=middle, hu_max=middle + (kind.high - kind.low) / 100)) == [kind.name]


@pytest.mark.parametrize(("low", "high"), [(-1000.0, 1000.0), (-175.0, 250.0), (-1100.0, 1024.0)])
def test_no_window_takes_inverted_ct(low, high):
    assert faults(-CT, PrepareSettings(hu_min=low, hu_max=high)) == ["inverted"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, ["another window"]), (849.0, 1274.0, ["another window"]), (-1000.0, 1000.0, []), (0.0, 80.0, [])],
)
def test_a_window_that_was_set_to_other_values_does_not_take_ct(low, high, expected):
    assert faults(KINDS["CT with metal"][0], PrepareSettings(hu_min=low, hu_max=high)) == expected


def test_what_cannot_be_decided_is_decided_by_the_declared_modality():
    values = KINDS["vessels with contrast"][0]
    assert faults(values) == ["perhaps no CT"]
    assert faults(values, modality="CT") == []
    assert faults(values, modality="T1") == ["MR as CT"]
    assert faults(CT, modality="T1") == ["another modality"]
    assert faults(CT, modality="anything") == []
    assert faults(KINDS["MR"][0], modality="CT") == ["no CT"]
    assert faults(KINDS["MR"][0], PrepareSettings(hu_min=0.0, hu_max=900.0), modality="MRI") == ["another scale"]


@pytest.mark.parametrize(
    "name", ["T1", "T2w", "FLAIR", "MRI", "MR", "mr_T1ce", "PET", "zscore", "noNorm", "rgb_to_0_1"]
)
def test_names_that_are_not_ct(name):
    assert Modality(name).is_other
    assert not Modality(name).is_ct


@pytest.mark.parametrize(("name", "is_ct"), [("CT", True), ("CBCT", True), ("ct_arterial", True), ("portal", False)])
def test_names_that_are_ct_or_say_nothing(name, is_ct):
    assert not Modality(name).is_other
    assert Modality(name).is_ct == is_ct


@pytest.mark.parametrize(
    ("content", "channel", "expected"),
    [
        ('{"channel_names": {"0": "CT", "1": "PET"}}', "0000", "CT"),
        ('{"channel_names": {"0": "CT", "1": "PET"}}', "0001", "PET"),
        ('{"modality": {"0": "MRI"}}', None, "MRI"),
        ('{"modality": "MRI"}', None, "MRI"),
        ('{"modality": ["CT"]}', None, "CT"),
        ('{"modality": 3}', None, ""),
        ("[]", None, ""),
        ("{", None, ""),
        (None, None, ""),
    ],
)
def test_the_modality_that_a_data_set_declares(tmp_path, content, channel, expected):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    image = tmp_path / "imagesTr" / f"case{f'_{channel}' if channel else ''}.nii.gz"
    assert declared_modality(image).name == expected


REAL = os.environ.get("HYSPARK_REAL_DATA", "")


@pytest.mark.skipif(not REAL, reason="HYSPARK_REAL_DATA is not set")
@pytest.mark.parametrize("name", ["502_BodyCT", "503_NativeCT", "511_STS-CT", "512_LIDC-Nodules", "513_MoreCT"])
def test_no_real_ct_is_refused(name):
    files = sorted((Path(REAL) / f"Dataset{name}").glob("imagesT?/*.nii.gz"))
    kinds: Counter[str] = Counter()
    for file in files[:: max(1, len(files) // 40)]:
        kinds.update(faults(np.asanyarray(nib.load(file).dataobj)[::3, ::3]) or ["none"])
    assert set(kinds) <= {"none", "all air"}
    assert kinds["none"] > 0.9 * kinds.total()


@pytest.mark.skipif(not REAL, reason="HYSPARK_REAL_DATA is not set")
def test_every_real_mr_is_refused():
    for file in sorted((Path(REAL) / "Dataset514_HippocampusMR").glob("imagesTr/*.nii.gz"))[::8]:
        assert faults(np.asanyarray(nib.load(file).dataobj)) == ["no CT"]
