"""The measurements of the data path run, and give the same finite numbers for any CT."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import nibabel as nib
import pytest

from hyspark.data.synthetic.phantom import make_phantom

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def data(monkeypatch) -> ModuleType:
    """The module, with everything in this process: a fresh one takes long to import its libraries."""
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("data")
    monkeypatch.setattr(module, "in_fresh_process", importlib.import_module("measure").with_peak_memory)
    return module


@pytest.fixture
def image(tmp_path) -> Path:
    phantom = make_phantom(0, spacing=(6.0, 6.0, 6.0), extent_scale=0.4)
    path = tmp_path / "ct_0000.nii.gz"
    nib.save(nib.Nifti1Image(phantom.image, phantom.affine), path)
    return path


def assert_numbers(row: dict[str, float], keys: str) -> None:
    assert list(row) == keys.split()
    assert all(math.isfinite(value) for value in row.values())
    assert all(value > 0 for key, value in row.items() if key.endswith(("ratio", "seconds", "second")))


def test_crops(data, image):
    row = data.crops(image, edge=32, batches=1, repeats=2)
    assert_numbers(row, "crops_per_second monai_crops_per_second speed_ratio bytes monai_bytes bytes_ratio")
    assert row["bytes_ratio"] == row["monai_bytes"] / row["bytes"]


def test_preparing(data, image):
    row = data.preparing(image, repeats=1)
    memory = "start_bytes peak_bytes monai_start_bytes monai_peak_bytes peak_ratio"
    assert_numbers(row, f"seconds monai_seconds speed_ratio difference {memory}")
    assert row["difference"] < 1e-4
    assert 0 < row["start_bytes"] <= row["peak_bytes"]


def test_worker_memory(data, image):
    row = data.worker_memory([image], edge=16, batches=12)
    assert_numbers(row, "start_bytes early_bytes late_bytes growth_bytes peak_bytes late_to_early_ratio")
    assert 0 < row["start_bytes"] <= row["peak_bytes"]


@pytest.mark.spawn
def test_memory_of_a_fresh_process_is_its_own(data, monkeypatch):
    measure = importlib.import_module("measure")
    ballast = bytearray(b"1") * 300_000_000
    assert measure.peak_memory() > len(ballast)
    value, peak = measure.in_fresh_process(math.sqrt, 9)
    assert value == 3
    assert 0 < peak < len(ballast)


def test_the_machine_is_described(data):
    row = importlib.import_module("measure").machine()
    assert list(row) == ["cpu", "cores", "memory_gb", "gpu", "python", "torch", "monai"]
    assert row["cpu"]
    assert row["cores"] >= 1
