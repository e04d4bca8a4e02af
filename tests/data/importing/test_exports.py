"""What exports of a PACS hold beside whole original series: archives, empty files, derived series, unclear patients."""

import zipfile

import pytest
import SimpleITK
from filelock import FileLock
from PIL import Image

from hyspark.utils import locks
from tests.data.importing.imports import HU, images, lines, out_of, refused, run_import
from tests.data.readers.dicom_files import write_series

REFORMATTED = ["DERIVED", "SECONDARY", "REFORMATTED"]


def test_archives_and_empty_slices_are_named(tmp_path, capsys):
    write_series(tmp_path / "in", HU)
    with zipfile.ZipFile(tmp_path / "in" / "more.zip", "w") as archive:
        archive.writestr("IM1", "slice")
    (tmp_path / "in" / "notes.txt").touch()
    for name in ("IM0009", "1.2.826.5"):  # neither has an ending, as the series' files
        (tmp_path / "in" / name).touch()
    run_import(tmp_path / "in", code=1)
    printed = capsys.readouterr()
    assert "1 archive, to unpack (e.g. " in printed.out
    assert "1 no image (e.g. " in printed.out
    assert "IM0009: unreadable as DICOM (an empty file among those of a series)" in printed.err
    assert "1.2.826.5: unreadable as DICOM" in printed.err
    assert "notes.txt" not in printed.err


def test_scans_come_before_series_that_were_made_from_them(tmp_path, capsys):
    write_series(tmp_path / "in" / "scan", HU[:, :, :8], SeriesInstanceUID="1.1", StudyInstanceUID="1.9")
    made = {"SeriesInstanceUID": "1.2", "StudyInstanceUID": "1.9", "ImageType": REFORMATTED}
    write_series(tmp_path / "in" / "made", HU, **made)
    out = run_import(tmp_path / "in", "--choose=most_slices")
    assert [entry["slices"] for entry in lines(out, "imported")] == [8]
    assert "--choose most_slices: made from other images (ImageType DERIVED, SECONDARY)" in capsys.readouterr().out


def test_all_scans_have_a_note_on_those_that_were_made_from_others(tmp_path):
    write_series(tmp_path / "in", HU, ImageType=REFORMATTED)
    (entry,) = lines(run_import(tmp_path / "in"), "imported")
    assert entry["notes"] == ["made from other images, as reformatted scans are (ImageType DERIVED, SECONDARY)"]


def test_one_id_of_several_people_is_noted(tmp_path):
    for number, name in enumerate(("Doe^Jane", "DOE^JANE^", "Smith^Bob")):
        known = {"PatientID": "0000", "PatientName": name, "PatientBirthDate": "19500102"}
        write_series(tmp_path / "in" / str(number), HU, SeriesInstanceUID=f"1.{number}", **known)
    entries = lines(run_import(tmp_path / "in"), "imported")
    note = "its PatientID is that of 2 names or birth dates, and all are taken as one patient"
    assert [entry["notes"] for entry in entries] == [[note]] * 3
    assert len({entry["patient"] for entry in entries}) == 1


def test_without_id_a_patient_is_known_by_name_and_birth_date(tmp_path):
    people = [("Doe^Jane", "19500102"), ("doe^jane", "19500102"), ("Doe^Jane", "19770102"), ("Doe^Jane", None)]
    for number, (name, born) in enumerate(people):
        known = {"PatientID": "", "PatientName": name, "PatientBirthDate": born, "SeriesInstanceUID": f"1.{number}"}
        write_series(tmp_path / "in" / f"folder{number}", HU, **known)
    out = run_import(tmp_path / "in")
    entries = lines(out, "imported")
    assert len({entry["patient"] for entry in entries}) == 3
    assert "no PatientID; name and birth date stand for the patient" in entries[0]["notes"] + entries[1]["notes"]
    assert "doe" not in (out / "import.jsonl").read_text().lower()


def test_spacing_that_pictures_ask_for_may_be_given_afterwards(tmp_path, capsys):
    write_series(tmp_path / "in" / "ct", HU)
    (tmp_path / "in" / "png").mkdir()
    for number in range(1, 9):
        Image.new("L", (9, 8), number).save(tmp_path / "in" / "png" / f"{number}.png")
    run_import(tmp_path / "in", code=1)
    assert "--slice_spacing X Y Z" in capsys.readouterr().err
    assert len(images(run_import(tmp_path / "in", "--slice_spacing", "1", "1", "2"))) == 2
    assert "slice_spacing [1.0, 1.0, 2.0], now None" in refused(tmp_path / "in", capsys)


def test_one_import_at_a_time_writes_to_a_data_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_TIMEOUT", 0.1)
    write_series(tmp_path / "in", HU)
    out = out_of(tmp_path / "in")
    out.mkdir()
    with FileLock(out / ".lock"):
        message = refused(tmp_path / "in", capsys)
    assert f"another process is writing to {out}; wait for it, or name another data set" in message
    assert len(images(run_import(tmp_path / "in"))) == 1
    assert not (out / ".lock").exists()


def test_a_folder_of_nothing_leaves_no_data_set(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert "no volume" in refused(tmp_path / "in", capsys)
    assert not out_of(tmp_path / "in").exists()


@pytest.mark.parametrize("ending", ["mha", "nrrd"])
def test_a_file_that_is_cut_short_says_so(tmp_path, capsys, ending):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / f"a.{ending}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(HU.T), str(file))
    file.write_bytes(file.read_bytes()[:-60])
    message = refused(tmp_path / "in", capsys, code=1)
    assert f"unreadable as {ending}; is it cut short?" in message
    assert "No such file" not in message


def test_a_source_is_no_data_set(tmp_path, capsys):
    write_series(out_of(tmp_path), HU)
    message = refused(out_of(tmp_path), capsys, f"--out={out_of(tmp_path)}")
    assert "expected a folder of its own, got a source" in message
    assert len(list(out_of(tmp_path).iterdir())) == 9
