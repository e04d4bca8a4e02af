"""Import of the real DICOM series: values by pydicom, geometry by SimpleITK. Runs where HYSPARK_REAL_DATA is set."""

import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from hyspark.data.datasets.subjects import subjects_of
from tests.data.importing.imports import images, lines, run_import

REAL = os.environ.get("HYSPARK_REAL_DATA", "")
pytestmark = pytest.mark.skipif(not REAL, reason="HYSPARK_REAL_DATA is not set")


def test_values_and_geometry_are_those_of_pydicom_and_simpleitk(tmp_path):
    files = sorted((Path(REAL) / "dicom").rglob("*.dcm"))
    for number, file in enumerate(files):  # no endings, another order of names, two folders
        target = tmp_path / "in" / str(number % 2) / f"{(17 * number) % len(files):03d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    out = run_import(tmp_path / "in")
    (entry,) = lines(out)
    image = nibabel.load(out / entry["file"])

    headers = sorted((pydicom.dcmread(file) for file in files), key=lambda data: float(data.ImagePositionPatient[2]))
    slices = [data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept) for data in headers]
    ras = np.stack(slices).transpose(2, 1, 0)[::-1, ::-1]  # this series lies axial, to the left and the back
    assert image.get_data_dtype() == np.int16
    assert np.array_equal(np.asanyarray(image.dataobj), ras)
    assert entry["notes"] == []

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent)))
    series, written = reader.Execute(), SimpleITK.ReadImage(str(out / entry["file"]))
    assert written.GetSize() == series.GetSize()
    for index in ((0, 0, 0), (511, 0, 34), (100, 300, 20)):
        at = written.TransformPhysicalPointToContinuousIndex(series.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(at, np.rint(at), atol=1e-3)
        assert written[tuple(round(x) for x in at)] == series[index]


def test_mr_in_nifti_is_imported_as_it_is(tmp_path):
    source = Path(REAL) / "Dataset514_HippocampusMR"
    (tmp_path / "in" / "imagesTr").mkdir(parents=True)
    for file in sorted((source / "imagesTr").glob("*.nii.gz"))[:3]:
        (tmp_path / "in" / "imagesTr" / file.name).symlink_to(file)
    out = run_import(tmp_path / "in", "--modality=MR")
    originals = [nibabel.load(file) for file in sorted((tmp_path / "in" / "imagesTr").iterdir())]
    known = {image.shape: np.asanyarray(image.dataobj) for image in originals}
    assert all(np.array_equal(voxels, known[voxels.shape]) for voxels in images(out))
    names = [entry["case"] for entry in lines(out)]
    assert len(set(subjects_of(names, [out / entry["file"] for entry in lines(out)]))) == 3
