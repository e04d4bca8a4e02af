"""A file that is no NIfTI file, or has the wrong ending, is named by its first bytes, with advice that works."""

import gzip
import io
import tarfile
import zipfile

import nibabel as nib
import numpy as np
import pytest

from hyspark.data.quality.faults import file_fault
from hyspark.data.quality.findings import FINDING_KINDS
from hyspark.data.readers.header import NiftiError, read_nifti_header

NIFTI = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)).to_bytes()


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(9))
    return file.getvalue()


def zip_file() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.nii", NIFTI)
    return file.getvalue()


def tar_file() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.nii"))
    return file.getvalue()


CONTENTS = {
    "web page": (b"\n<!DOCTYPE html><html>", "failed download", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "failed download", "a Git LFS pointer"),
    "zip": (zip_file(), "archive", "a zip archive"),
    "tar": (tar_file(), "archive", "a tar archive"),
    "DICOM": (bytes(128) + b"DICM" + bytes(300), "not NIfTI", "a DICOM file"),
    "numpy": (numpy_file(), "not NIfTI", "a numpy array"),
}


@pytest.mark.parametrize("form", ["x.nii", "x.nii.gz", "compressed"])
@pytest.mark.parametrize("name", CONTENTS)
def test_other_contents_are_named(tmp_path, name, form):
    content, kind, what = CONTENTS[name]
    path = tmp_path / ("x.nii" if form == "x.nii" else "x.nii.gz")
    path.write_bytes(gzip.compress(content) if form == "compressed" else content)
    assert file_fault(path) is None
    with pytest.raises(NiftiError, match=what) as error:
        read_nifti_header(path)
    assert error.value.kind == kind
    assert kind == "not NIfTI" or FINDING_KINDS[kind].advice in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"), [("x.nii.gz", NIFTI), ("x.nii", gzip.compress(NIFTI))], ids=("plain", "packed")
)
def test_a_file_of_the_wrong_ending_is_readable_under_the_name_that_is_advised(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(NiftiError, match="rename it") as error:
        read_nifti_header(path)
    assert error.value.kind == "misnamed"
    renamed = path.rename(tmp_path / error.value.found.rpartition(" ")[2])
    assert read_nifti_header(renamed).shape == (4, 5, 6)
