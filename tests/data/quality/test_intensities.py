"""`check` judges values against the intensities of the run, and its advice works when it is typed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from hyspark.cli.main import main
from hyspark.data.datasets.cases import Case
from hyspark.data.quality.case_files import read_case
from hyspark.data.quality.check import check_dataset
from hyspark.data.settings import PrepareSettings
from tests.data.quality.small_data import SHAPE, SPACING, SmallData, mr, organs, save, write_mr

SMALL = ["--spacing", "3", "3", "3", "--prepare_workers", "1"]


def kinds(folder: Path, **settings: object) -> set[str]:
    examined, found = check_dataset(folder, spacing=SPACING, num_workers=1, progress=False, **settings)
    return {f.kind for f in [*found.findings, *(f for seen in examined for f in seen.findings)] if f.severity != "note"}


def exit_code(*words: str) -> int:
    try:
        main(["check", *words, *SMALL])
    except SystemExit as error:
        return int(error.code)
    return 0


@pytest.mark.parametrize("name", ["T1", "MRI", "FLAIR", "ADC", "mprage", None])
def test_mr_under_ct_is_an_error_whose_advice_works(tmp_path, capsys, name):
    folder = write_mr(tmp_path / "Dataset001_Small", channels=(0,))
    content = json.loads((folder / "dataset.json").read_text())
    names = {"channel_names": {"0": name}} if name else {"channel_names": {}}
    (folder / "dataset.json").write_text(json.dumps(content | names))
    assert exit_code(str(folder), "--out", str(tmp_path / "one")) == 1
    text = capsys.readouterr().out
    assert "train with --intensity mr" in text
    assert ("error: MR as CT (4)" in text) == (name is not None)
    exit_code(str(folder), "--out", str(tmp_path / "two"), "--intensity", "mr")
    text = capsys.readouterr().out
    assert "0 errors" in text
    assert "Hounsfield" not in text
    assert not kinds(folder, intensity=("mr",)) - {"thin"}
    assert json.loads((tmp_path / "two" / "check.json").read_text())["estimate"] is not None
    page = re.sub(r"data:image[^\"]*", "", (tmp_path / "two" / "check.html").read_text())
    assert "HU" not in page


def test_ct_under_mr_is_a_warning(tmp_path):
    data = SmallData(tmp_path)
    assert kinds(data.folder, intensity=("mr",)) - {"thin"} == {"CT as MR"}
    assert kinds(data.folder, intensity=("ct",)) - {"thin"} == set()
    assert kinds(data.folder, intensity=("none",)) - {"thin"} == set()


def test_pet_under_ct_is_an_error_whose_advice_works(tmp_path):
    values = np.random.default_rng(0).exponential(0.3, (40, 40, 40)).astype(np.float32)
    values[10:14, 10:14, 10:14] = 12
    save(tmp_path / "a_0000.nii.gz", values)
    case = Case("a", "D", tmp_path / "a_0000.nii.gz")
    assert "train with --intensity none" in str(read_case(case, PrepareSettings()).errors[0])
    assert not read_case(case, PrepareSettings(intensity=("none",))).errors


def test_two_channels_are_checked(tmp_path, capsys):
    folder = write_mr(tmp_path / "Dataset001_Small")
    code = exit_code(str(folder), "--out", str(tmp_path / "out"), "--intensity", "mr", "--image_channels", "0", "1")
    text = capsys.readouterr().out
    assert "0 errors" in text
    assert "another channel" not in text
    assert code in (0, 1)  # of warnings on thin volumes
    (folder / "imagesTr" / "p02_0001.nii.gz").unlink()
    assert kinds(folder, intensity=("mr",), image_channels=(0, 1)) - {"thin"} == {"missing channel"}
    assert kinds(folder, intensity=("mr",)) - {"thin"} == set()


def test_channels_are_on_one_grid_and_the_message_names_both_files(tmp_path):
    folder = write_mr(tmp_path / "Dataset001_Small")
    first, second = (folder / "imagesTr" / f"p01_000{number}.nii.gz" for number in range(2))
    settings = PrepareSettings(intensity=("mr",), image_channels=(0, 1))
    save(second, mr(0, 1)[:-1])
    found = read_case(Case("p01", "D", first, others=(second,)), settings).errors
    assert [f.kind for f in found] == ["channel of another shape"]
    assert str(first) in str(found[0])
    assert str(second) in str(found[0])


def test_a_case_of_fewer_files_than_channels_is_named(tmp_path):
    """As of a caller that knows of one file alone."""
    folder = write_mr(tmp_path / "Dataset001_Small")
    image = folder / "imagesTr" / "p01_0000.nii.gz"
    found = read_case(Case("p01", "D", image), PrepareSettings(intensity=("mr",), image_channels=(0, 1))).errors
    assert [(f.kind, f.found) for f in found] == [("missing channel", "1 file, for 2 channels")]


def test_a_mask_has_no_range_of_mr_but_values(tmp_path):
    path = tmp_path / "a_0000.nii.gz"
    save(path, (500 * (organs(0) == 1)).astype(np.int16))
    case = Case("a", "D", path)
    assert "no foreground" in {f.kind for f in read_case(case, PrepareSettings(intensity=("mr",))).errors}
    assert not read_case(case, PrepareSettings(intensity=("none",))).errors
    save(path, np.full(SHAPE, 3, np.int16))
    assert [f.kind for f in read_case(case, PrepareSettings(intensity=("none",))).errors] == ["constant"]


def test_loose_files_of_channels_become_a_data_set(tmp_path, capsys):
    for case in ("x", "y"):
        for channel in (0, 1):
            (tmp_path / "loose").mkdir(exist_ok=True)
            save(tmp_path / "loose" / f"{case}_{channel:04d}.nii.gz", mr(0, channel))
    target = tmp_path / "data" / "Dataset042_Mine"
    words = ["--organize_from", str(tmp_path / "loose"), "--organize_to", str(target), "--channel", "0", "1"]
    main(["datalist", "--data", str(tmp_path / "data"), *words])
    assert "2 images linked" in capsys.readouterr().out
    assert sorted(path.name for path in (target / "imagesTr").iterdir()) == [
        f"{case}_{channel:04d}.nii.gz" for case in "xy" for channel in (0, 1)
    ]
    entries = json.loads((tmp_path / "data" / "dataset.json").read_text())["training"]
    assert [len(entry["image"]) for entry in entries] == [2, 2]
