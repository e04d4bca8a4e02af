"""The command that writes folders of PNG slices: names, parts, going on after a stop, what it reports."""

import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from hyspark.cli.main import main
from hyspark.data.readers.find import find_volumes
from hyspark.data.settings import PictureSettings
from hyspark.data.slices import write_slices
from tests.data.readers.dicom_files import write_dicom, write_series, write_slice

HU = np.random.default_rng(2).integers(-1000, 1000, (5, 6, 4)).astype(np.int16)


def write_nifti(path: Path, hu: np.ndarray = HU, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(hu, np.eye(4) if affine is None else affine), path)


@pytest.fixture
def visits(tmp_path) -> Path:
    """Six patients, the first of three visits."""
    for name in ("p0_visit1", "p0_visit2", "p0_visit3", "p1", "p2", "p3", "p4", "p5__a"):
        write_nifti(tmp_path / "in" / "deep" / f"{name}.nii.gz")
    return tmp_path / "in"


def command(source: Path, *more: str) -> list[str]:
    return ["slices", "--source", str(source), "--out", str(source.parent / "out"), "--prepare_workers=1", *more]


def sliced(source: Path, *more: str) -> dict:
    """Runs the command; returns its record."""
    main(command(source, *more))
    return json.loads((source.parent / "out" / "slices.json").read_text())


def refused(source: Path, capsys, *more: str, code: int = 2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(command(source, *more))
    assert exit_.value.code == code
    return capsys.readouterr().err


def written(source: Path) -> dict[str, int]:
    """Pictures in the folder, by path, with the time they were written at."""
    out = source.parent / "out"
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.png*")}


def test_every_patient_is_in_one_part_and_imagefolder_reads_it(visits, capsys):
    record = sliced(visits, "--val_fraction=0.34")
    parts = {}
    for entry in record["volumes"].values():
        parts.setdefault(entry["patient"], set()).add(entry["part"])
    assert sorted(parts) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert all(len(part) == 1 for part in parts.values())
    assert sum(part == {"val"} for part in parts.values()) == 2
    assert "train: " in capsys.readouterr().out
    num = 0
    for part in ("train", "val"):
        folder = ImageFolder(visits.parent / "out" / part)
        assert folder.classes == ["1"]
        assert folder[0][0].size == (5, 6)
        num += len(folder)
    assert num == 8 * 4 == sum(entry["slices"] for entry in record["volumes"].values())
    assert not [path for path in visits.parent.rglob("*.tmp")]


def test_a_picture_is_the_slice_that_its_name_says(tmp_path):
    write_nifti(tmp_path / "in" / "a b_0000.nii", affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    sliced(tmp_path / "in", "--stride=2", "--val_fraction=0")
    paths = sorted((tmp_path / "out").rglob("*.png"))
    assert [path.name[:4] + path.name[12:] for path in paths] == ["a-b__0000.png", "a-b__0002.png"]
    values = HU[:, :, 2].T.astype(float)
    expected = np.rint((values - values.min()) * 255 / (values.max() - values.min()))
    with Image.open(paths[1]) as picture:
        assert picture.mode == "L"
        assert np.abs(np.asarray(picture) - expected).max() <= 1


def test_settings_reach_the_pictures(tmp_path, capsys):
    write_nifti(tmp_path / "in" / "a.nii")
    record = sliced(tmp_path / "in", "--axis=sagittal", "--size=8", "--scaling=window", "--hu_max=100")
    assert record["settings"]["hu_min"] == -175
    assert record["settings"]["hu_max"] == 100
    assert record["settings"]["source"] == [str(tmp_path / "in")]
    assert "no patient is held out" in capsys.readouterr().out
    (path, *others) = (tmp_path / "out").rglob("*.png")
    assert len(others) == 4
    with Image.open(path) as picture:
        assert picture.size == (12, 8)


def test_the_same_command_continues(visits, capsys):
    record = sliced(visits)
    before = written(visits)
    assert sliced(visits) == record
    assert written(visits) == before

    first, second, *_ = sorted(record["volumes"])
    lost = next(path for path in before if first in path)
    (visits.parent / "out" / lost).unlink()
    half = visits.parent / "out" / Path(lost).with_name(f".{first}_0009.png.17.tmp")  # of a process that was killed
    half.write_bytes(b"half")
    write_nifti(Path(record["volumes"][second]["source"]), HU[:, :, :3])
    record = sliced(visits)
    after = written(visits)
    assert set(before) - set(after) == {path for path in before if second in path and path.endswith("_0003.png")}
    assert not set(after) - set(before)
    redone = {path for path in after if after[path] != before[path]}
    assert redone == {path for path in after if first in path or second in path}
    assert record["volumes"][second]["slices"] == 3


def test_a_stop_keeps_what_is_done(visits, monkeypatch, capsys):
    def stopping(volume, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(volume.name)
        return real(volume, *arguments)

    done, real = [], write_slices.slice_volume
    monkeypatch.setattr(write_slices, "slice_volume", stopping)
    assert "the same command continues" in refused(visits, capsys, code=130)
    assert set(json.loads((visits.parent / "out" / "slices.json").read_text())["volumes"]) == set(done)
    before = written(visits)
    monkeypatch.undo()
    assert len(sliced(visits)["volumes"]) == 8
    after = written(visits)
    assert {path: after[path] for path in before} == before


def test_other_settings_on_a_folder_are_refused(visits, capsys):
    sliced(visits)
    message = refused(visits, capsys, "--stride=2", "--seed=3")
    assert "stride 1, now 2; seed 0, now 3" in message
    assert "--out" in message


def test_a_patient_does_not_change_sides_between_commands(visits, capsys):
    sliced(visits, "--val_fraction=0.5")
    before = written(visits)
    for number in range(6, 10):
        write_nifti(visits / f"p{number}.nii.gz")
    assert re.search(r"patients change between train and val: p0;", refused(visits, capsys, "--val_fraction=0.5"))
    for path in visits.glob("*.nii.gz"):
        path.unlink()
    gone = visits / "deep" / "p1.nii.gz"
    gone.unlink()
    assert f"not found any more: {gone}" in refused(visits, capsys, "--val_fraction=0.5")
    assert written(visits) == before


def test_folders_of_others_are_left_alone(visits, capsys):
    (visits.parent / "out" / "train").mkdir(parents=True)
    assert "no slices.json" in refused(visits, capsys)
    (visits.parent / "out" / "slices.json").write_text("[]")
    assert "expected a record of slices" in refused(visits, capsys)


def test_a_damaged_volume_is_told_and_the_others_are_done(tmp_path, capsys):
    write_nifti(tmp_path / "in" / "good.nii.gz")
    write_nifti(tmp_path / "in" / "whole.nii.gz")
    torn = tmp_path / "in" / "torn.nii.gz"
    torn.write_bytes((tmp_path / "in" / "whole.nii.gz").read_bytes()[:150])
    write_nifti(tmp_path / "in" / "nan.nii", np.full((3, 3, 3), np.nan, np.float32))
    message = refused(tmp_path / "in", capsys, code=1)
    assert f"not read: {torn}: " in message
    assert f"not read: {tmp_path / 'in' / 'nan.nii'}: holds NaN" in message
    record = json.loads((tmp_path / "out" / "slices.json").read_text())
    assert [entry["slices"] for entry in record["volumes"].values()] == [4, 4]
    assert [Path(entry["source"]).name for entry in record["failed"]] == ["nan.nii", "torn.nii.gz"]
    write_nifti(torn)
    (tmp_path / "in" / "nan.nii").unlink()
    assert sliced(tmp_path / "in")["failed"] == []


def test_linked_folders_are_looked_into_and_are_no_files_themselves(tmp_path, capsys):
    write_nifti(tmp_path / "elsewhere" / "a.nii.gz")
    source = tmp_path / "in"
    write_nifti(source / "b.nii.gz")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    record = sliced(source)
    assert sorted(entry["patient"] for entry in record["volumes"].values()) == ["a", "b"]
    (source / "gone").symlink_to(tmp_path / "nowhere")
    assert "gone: unreadable as DICOM" in refused(source, capsys, code=1)


def test_blank_slices_are_excluded_and_counted(tmp_path, capsys):
    hu = HU.copy()
    hu[:, :, 1] = -1000
    write_nifti(tmp_path / "in" / "a.nii", hu)
    (entry,) = sliced(tmp_path / "in")["volumes"].values()
    assert (entry["slices"], entry["blank"]) == (3, 1)
    assert "excluded: 1 blank slices" in capsys.readouterr().out
    before = written(tmp_path / "in")
    sliced(tmp_path / "in")
    assert written(tmp_path / "in") == before


def test_nnunet_folders_give_images_alone(tmp_path):
    for place in ("imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/a", "imagesTs/b_0000"):
        write_nifti(tmp_path / "in" / "Dataset001_A" / f"{place}.nii.gz")
    record = sliced(tmp_path / "in")
    assert [Path(entry["source"]).name for entry in record["volumes"].values()] == ["a_0000.nii.gz"]
    assert record["files_of_other_kinds"] == {"another channel": 1}


def test_dicom_from_the_command_line(tmp_path, capsys):
    for patient in "ABC":
        for visit in "12":
            write_series(tmp_path / "in" / patient / visit, HU, PatientID=patient, SeriesInstanceUID=f"1.{visit}")
    write_series(tmp_path / "in" / "scout", HU[:, :, :1], SeriesInstanceUID="1.7")
    write_dicom(tmp_path / "in" / "A" / "segmentation", Modality="SEG", PatientID="A")
    record = sliced(tmp_path / "in", "--min_slices=2", "--axis=coronal", "--keep_patient_id")
    assert sorted(entry["patient"] for entry in record["volumes"].values()) == ["A", "A", "B", "B", "C", "C"]
    assert [Path(other["file"]).name for other in record["other_files"]] == ["segmentation"]
    assert record["files_of_other_kinds"] == {"SEG": 1}
    told = capsys.readouterr().out
    assert "val: 12 slices of 2 volumes, 1 patients" in told
    assert "1 slices, fewer than --min_slices 2" in told
    with Image.open(next((tmp_path / "out").rglob("*.png"))) as picture:
        assert picture.size == (5, 8)  # 4 slices, 2 mm apart


def test_slices_across_an_uneven_series_are_skipped_but_not_its_own(tmp_path, capsys):
    write_series(tmp_path / "in", np.concatenate([HU] * 3, axis=2))
    next(iter(sorted((tmp_path / "in").iterdir()))).unlink()
    record = sliced(tmp_path / "in")
    assert "warnings:\n" in capsys.readouterr().out
    (entry,) = record["volumes"].values()
    assert entry["slices"] == 11
    assert "1 slices are missing" in entry["notes"][0]
    main(command(tmp_path / "in", "--axis=coronal", f"--out={tmp_path / 'coronal'}"))  # the last --out counts
    record = json.loads((tmp_path / "coronal" / "slices.json").read_text())
    assert record["volumes"] == {}
    assert "1 slices are missing" in record["skipped"][0]["why"]
    assert "--axis axial" in record["skipped"][0]["why"]


def test_what_goes_to_another_process_and_back(tmp_path):
    write_series(tmp_path / "in", HU)
    (volume,) = find_volumes([tmp_path / "in"], min_slices=1, skip=tmp_path, num_workers=1, progress=False).volumes
    volume, *rest = pickle.loads(pickle.dumps((volume, tmp_path / "out", "val", PictureSettings())))
    sent = pickle.loads(pickle.dumps(write_slices.slice_volume(volume, *rest)))
    assert sent.entry["slices"] == len(os.listdir(tmp_path / "out" / "val" / "1")) == 4


def test_wrong_commands(visits, capsys):
    assert "--stride" in refused(visits, capsys, "--strides=2")
    assert "expected hu_min below hu_max, got 5.0 and 5.0" in refused(visits, capsys, "--hu_min=5", "--hu_max=5")
    assert "prepare_workers and min_slices: expected at least 0 and at least 1, got -1" in refused(
        visits, capsys, "--prepare_workers=-1"
    )
    assert "no such file or folder" in refused(visits / "none", capsys)
    (visits / "empty").mkdir()
    assert "no CT volume" in refused(visits / "empty", capsys)
    (visits.parent / "out").write_text("a file")
    assert "slices are not writable" in refused(visits, capsys)
    assert "choose another folder with --out" in refused(visits, capsys)


def test_records_show_pseudonyms_unless_asked(tmp_path, capsys):
    write_series(tmp_path / "in", HU, PatientID="Doe^Jane")
    sliced(tmp_path / "in", "--min_slices=2", "--val_fraction=0")
    text = (tmp_path / "out" / "slices.json").read_text()
    assert "Doe" not in text
    assert '"patient": "patient-' in text
    assert all(path.name.startswith("patient-") for path in (tmp_path / "out").rglob("*.png"))
    main([*command(tmp_path / "in", "--min_slices=2", "--keep_patient_id"), f"--out={tmp_path / 'shown'}"])
    assert all(path.name.startswith("Doe-Jane_") for path in (tmp_path / "shown").rglob("*.png"))
    assert "keep_patient_id False, now True" in refused(
        tmp_path / "in", capsys, "--min_slices=2", "--val_fraction=0", "--keep_patient_id"
    )


@pytest.mark.parametrize("is_dicom", [False, True])
def test_a_folder_of_an_earlier_version_continues(tmp_path, capsys, is_dicom):
    """Its record has neither the setting nor pseudonyms; for DICOM, the message says what to add."""
    if is_dicom:
        write_series(tmp_path / "in", HU, PatientID="Doe")
    else:
        write_nifti(tmp_path / "in" / "a.nii.gz")
    flags = ["--min_slices=2", *["--keep_patient_id"] * is_dicom]
    record = sliced(tmp_path / "in", *flags)
    before = written(tmp_path / "in")
    del record["settings"]["keep_patient_id"], record["other_files"]
    for entry in record["volumes"].values():
        del entry["padded"]
    (tmp_path / "out" / "slices.json").write_text(json.dumps(record))
    if is_dicom:
        assert "add --keep_patient_id to continue it" in refused(tmp_path / "in", capsys, "--min_slices=2")
    sliced(tmp_path / "in", *flags)
    assert written(tmp_path / "in") == before


def test_values_that_are_no_hu_are_noted(tmp_path, capsys):
    hu = HU.astype(np.float32)
    for name, voxels in {"hu": hu, "scaled": (hu + 1000) / 2000, "stored": hu + 1000}.items():
        write_nifti(tmp_path / "in" / f"{name}.nii", voxels)
    volumes = sliced(tmp_path / "in", "--min_slices=2")["volumes"].values()
    notes = {entry["patient"]: [note.split("? ")[1].split(":")[0] for note in entry["notes"]] for entry in volumes}
    assert notes == {"hu": [], "scaled": ["scaled"], "stored": notes["stored"]}
    assert "no Hounsfield units? scaled: values from 0" in capsys.readouterr().out


def test_values_that_wrapped_around_are_a_fault(tmp_path, capsys):
    write_nifti(tmp_path / "in" / "wrapped.nii", (HU - 1000).astype(np.uint16))
    write_series(tmp_path / "in" / "dicom", HU, PixelRepresentation=0, RescaleIntercept=-1024)
    stored = HU[:, :, 0].T.copy()
    stored[:] = -2000  # read as 63536
    write_slice(tmp_path / "in" / "dicom" / "padded", stored, (0, 0, 8), PixelRepresentation=0)
    message = refused(tmp_path / "in", capsys, "--min_slices=2", code=1)
    assert message.count("negative HU that were read as unsigned, as by PixelRepresentation 0") == 2
    assert "not read: " in message


def test_padding_is_summed_up(tmp_path, capsys):
    hu = HU.copy()
    hu[0] = -3024
    write_nifti(tmp_path / "in" / "a.nii", hu)
    sliced(tmp_path / "in")
    assert "1 volumes reach far below air (padding)" in capsys.readouterr().out
    main([*command(tmp_path / "in", "--hu_min=-1024"), f"--out={tmp_path / 'clipped'}"])
    assert "far below air" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [MemoryError("no room"), IndexError("strange"), KeyError("Rows"), OSError("disk")])
def test_no_fault_of_one_volume_ends_the_others(visits, capsys, monkeypatch, error):
    def failing(volume):
        if volume.name.startswith("p3"):
            raise error
        return real(volume)

    real = write_slices.read_volume
    monkeypatch.setattr(write_slices, "read_volume", failing)
    assert "not read: " in (message := refused(visits, capsys, code=1))
    assert "p3.nii.gz" in message
    assert len(json.loads((visits.parent / "out" / "slices.json").read_text())["volumes"]) == 7


def test_scans_that_cannot_be_separated_are_a_fault(tmp_path, capsys):
    write_series(tmp_path / "in" / "a", HU)
    write_series(tmp_path / "in" / "b", HU + 9)
    message = refused(tmp_path / "in", capsys, "--min_slices=2", code=1)
    assert "series 1.2.3: up to 2 slices at one position" in message


def test_the_record_is_written_less_often_as_it_grows(visits, monkeypatch):
    """The time between two writes is a multiple of the time that the last one took."""
    now, times = [0.0], []

    def writing(path, record):
        times.append(now[0])
        now[0] += 1.0
        real(path, record)

    def slicing(*arguments):
        now[0] += 10.0
        return cut(*arguments)

    real, cut = write_slices.write_json, write_slices.slice_volume
    monkeypatch.setattr(write_slices, "write_json", writing)
    monkeypatch.setattr(write_slices, "slice_volume", slicing)
    monkeypatch.setattr(write_slices, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sliced(visits)
    assert len(times) == 4  # at the start, after 10 s and 50 s more, at the end
