"""DICOM as SimpleITK reads it: values and geometry of series of many kinds."""

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.hounsfield import read_series
from tests.data.readers.dicom_files import write_slice

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)
COS, SIN = np.cos(0.3), np.sin(0.3)
OBLIQUE = (COS, SIN, 0, -SIN, COS, 0)
TWICE = (COS, SIN, 0, -SIN * COS, COS * COS, SIN)
STORED = np.random.default_rng(0).integers(0, 2000, (5, 4, 6))
"""(slice, row, column)"""
UNSIGNED = {"PixelRepresentation": 0}
TWELVE = {"BitsStored": 12, "HighBit": 11}

SERIES = {
    "axial": {},
    "towards the feet": {"step": -2.5},
    "coronal": {"directions": CORONAL},
    "coronal, reversed": {"directions": CORONAL, "step": -1.0},
    "sagittal": {"directions": SAGITTAL, "step": 0.7},
    "turned by half": {"directions": (-1, 0, 0, 0, -1, 0)},
    "mirrored rows": {"directions": (-1, 0, 0, 0, 1, 0)},
    "oblique": {"directions": OBLIQUE},
    "oblique in two axes": {"directions": TWICE, "step": 3.0},
    "unequal spacing": {"PixelSpacing": [0.5, 0.75]},
    "thin slices": {"step": 0.02},
    "far away": {"origin": (-250.5, 1234.25, -987.125)},
    "no scaling": {"RescaleSlope": 1, "RescaleIntercept": 0},
    "slope": {"RescaleSlope": 2, "RescaleIntercept": -1000},
    "fractions": {"RescaleSlope": 0.125, "RescaleIntercept": -10.5},
    "another slope in each slice": {"RescaleSlope": lambda k: 1 + k, "RescaleIntercept": lambda k: -k},
    "unsigned": UNSIGNED,
    "negative": {"stored": STORED - 1500},
    "12 bits": {**TWELVE, **UNSIGNED},
    "12 bits, others set": {**TWELVE, **UNSIGNED, "stored": STORED | 0xF000},
    "12 bits, signed": {**TWELVE, "stored": (STORED - 1000) & 0x0FFF},
    "8 bits": {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, **UNSIGNED, "stored": STORED % 256},
    "padding": {"PixelPaddingValue": -2000, "stored": np.where(STORED < 300, -2000, STORED)},
    "implicit": {"syntax": ImplicitVRLittleEndian},
    "big-endian": {"syntax": ExplicitVRBigEndian},
    "deflated": {"syntax": DeflatedExplicitVRLittleEndian},
    "RLE": {"syntax": RLELossless},
    "numbers say the opposite": {"InstanceNumber": lambda k: 10 - k},
    "no instance numbers": {"InstanceNumber": None},
}


def write(folder, *, directions=AXIAL, step=2.0, origin=(1.0, 2.0, 3.0), stored=STORED, syntax=None, **values):
    normal = np.cross(directions[:3], directions[3:])
    paths = []
    for k, pixels in enumerate(stored):
        own = {name: value(k) if callable(value) else value for name, value in values.items()}
        if own.get("BitsAllocated") == 8:
            own["PixelData"] = pixels.astype(np.uint8).tobytes()
        path = folder / f"{(7 * k) % 5}"  # names in another order
        position = tuple(round(float(x), 6) for x in origin + step * k * normal)
        shown = [round(float(x), 6) for x in directions]
        write_slice(path, pixels, position, **{"ImageOrientationPatient": shown, **own})
        if syntax is not None:
            convert(path, syntax)
        paths.append(path)
    return paths


def convert(path, syntax):
    data = pydicom.dcmread(path)
    if syntax == RLELossless:
        data.compress(syntax, generate_instance_uid=False)
    else:
        data.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
    pydicom.dcmwrite(
        path, data, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian, force_encoding=True
    )


def reference(paths):
    """Values (column, row, slice), and the affine of RAS, with slices ordered along their normal."""
    first = SimpleITK.ReadImage(str(paths[0]))
    normal = np.array(first.GetDirection()).reshape(3, 3)[:, 2]
    position = {p: np.array(SimpleITK.ReadImage(str(p)).GetOrigin()) @ normal for p in paths}
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in sorted(paths, key=position.get)])
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("kind", SERIES)
def test_values_and_geometry_are_those_of_simpleitk(tmp_path, kind):
    paths = write(tmp_path / "in", **SERIES[kind])
    (volume,) = find_volumes([tmp_path / "in"], min_slices=2, skip=tmp_path / "out", progress=False).volumes
    voxels = read_series(volume.series.slices)
    if SERIES[kind].get("syntax") == RLELossless:  # GDCM does not read it of images as small as these
        paths = write(tmp_path / "plain")
    values, affine = reference(paths)
    np.testing.assert_allclose(voxels, values, atol=1e-4)
    np.testing.assert_allclose(volume.series.affine, affine, atol=1e-3)
    assert volume.series.notes == ()
