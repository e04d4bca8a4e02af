"""Running `hyspark import` in this process, and reading what it wrote."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from hyspark.cli.main import main
from tests.data.readers.dicom_files import write_series

HU = np.random.default_rng(3).integers(-1024, 1500, (4, 5, 9)).astype(np.int16)
"""Axes to the patient's left, back and head."""
RAS = HU[::-1, ::-1]


def command(sources: Path | list[Path], *more: str) -> list[str]:
    sources = sources if isinstance(sources, list) else [sources]
    return ["import", *map(str, sources), "--out", str(out_of(sources[0])), "--prepare_workers=1", *more]


def out_of(source: Path) -> Path:
    return source.parent / "Dataset042_Mine"


def run_import(sources: Path | list[Path], *more: str, code: int = 0) -> Path:
    """Runs the command; returns the data set."""
    if code:
        with pytest.raises(SystemExit) as exit_:
            main(command(sources, *more))
        assert exit_.value.code == code
    else:
        main(command(sources, *more))
    return out_of(sources[0] if isinstance(sources, list) else sources)


def refused(sources, capsys, *more: str, code: int = 2) -> str:
    capsys.readouterr()
    run_import(sources, *more, code=code)
    return capsys.readouterr().err


def lines(out: Path, status: str = "") -> list[dict]:
    entries = [json.loads(line) for line in (out / "import.jsonl").read_text().splitlines()]
    return [entry for entry in entries if not status or entry["status"] == status]


def images(out: Path) -> list[np.ndarray]:
    """Voxels of the data set's images, by name."""
    return [np.asanyarray(nibabel.load(path).dataobj) for path in sorted((out / "imagesTr").glob("*.nii.gz"))]


def write_mr(folder: Path, values: np.ndarray, **known) -> None:
    """An MR series of values (x, y, z), without scaling."""
    mr = {"Modality": "MR", "SeriesInstanceUID": "1.5.1", "RescaleSlope": None, "RescaleIntercept": None}
    write_series(folder, values.astype(np.int16) - 1024, **{**mr, **known})
