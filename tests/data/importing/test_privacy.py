"""Nothing of a patient's identity in a data set, and whom its names stand for in a private table alone."""

import csv
import gzip
import hashlib
import json
import stat

import nibabel
import numpy as np
import pytest

from hyspark.data.importing.pseudonyms import Pseudonyms, read_pseudonyms
from tests.data.importing.imports import HU, lines, out_of, refused, run_import, write_mr
from tests.data.readers.dicom_files import write_dicom, write_series, write_slice

SECRETS = ("SMITH", "19510203", "K4711W", "9.8.7.6", "Jane", "Lantern")
"""Name, birth date, ID, UIDs, first name, street: each in many elements, names of files and names of folders."""


def write_export(folder):
    """Scans, scans with faults, other files: each with the secrets where headers, names and paths hold them."""
    person = {
        "PatientName": "SMITH^Jane",
        "PatientID": "K4711W",
        "PatientBirthDate": "19510203",
        "PatientAddress": "Lantern Street",
        "StudyInstanceUID": "9.8.7.6.1",
        "FrameOfReferenceUID": "9.8.7.6.2",
        "SeriesDescription": "SMITH K4711W",
        "StudyDescription": "Jane",
        "ProtocolName": "Jane SMITH",
        "ImageComments": "Lantern Street",
        "StudyDate": "19510203",
        "AcquisitionDate": "19510203",
    }
    base = folder / "SMITH^Jane K4711W" / "19510203"
    write_series(base / "Jane_ct", HU, **{**person, "SeriesInstanceUID": "9.8.7.6.3"})
    for number, text in enumerate(("Jane one", "SMITH two")):  # separated by what their headers say
        extra = {
            **person,
            "SeriesInstanceUID": "9.8.7.6.4",
            "SeriesDescription": text,
            "StudyInstanceUID": f"9.8.7.6.2{number}",
        }
        write_series(base / "two", HU + number, prefix=f"SMITH{number}", **extra)
    missing = {**person, "SeriesInstanceUID": "9.8.7.6.5"}
    write_series(base / "Jane_gap", HU, prefix="SMITH", **missing)
    (base / "Jane_gap" / "SMITH0003").write_bytes(b"\0" * 128 + b"DICM" + b"SMITH^Jane K4711W")
    write_slice(base / "Jane_gap" / "SMITH-scout", HU[:, :, 0].T, (0, 0, 0), **{**missing, "ImageType": ["LOCALIZER"]})
    write_series(base / "colours", HU, **{**person, "SeriesInstanceUID": "9.8.7.6.6", "SamplesPerPixel": 3})
    write_series(base / "short", HU[:, :, :2], **{**person, "SeriesInstanceUID": "9.8.7.6.7"})
    write_series(base / "cut", HU, prefix="Jane", **{**person, "SeriesInstanceUID": "9.8.7.6.8"})
    torn = base / "cut" / "Jane0002"
    torn.write_bytes(torn.read_bytes()[:-50])
    write_series(base / "burned", HU, **{**person, "SeriesInstanceUID": "9.8.7.6.9", "BurnedInAnnotation": "YES"})
    write_series(base / "units", HU, **{**person, "SeriesInstanceUID": "9.8.7.6.10", "RescaleType": "SMITH"})
    write_dicom(base / "SMITH.sr", **{**person, "Modality": "SMITH", "SeriesInstanceUID": "9.8.7.6.11"})
    (base / "SMITH_K4711W.txt").write_text("SMITH")
    image = nibabel.Nifti1Image(np.tile(HU, (3, 2, 1)), np.eye(4))
    image.header["descrip"], image.header["aux_file"] = b"SMITH^Jane K4711W", b"19510203"
    nibabel.save(image, base / "SMITH_Jane_K4711W.nii.gz")
    (base / "Jane.nii.gz").write_bytes(b"SMITH")
    (base / "SMITH.mha").write_bytes(b"Jane")
    (base / "SMITH_seg.mha").write_bytes(b"Jane")
    return folder


def assert_no_secrets(out):
    for path in out.rglob("*"):
        assert not any(secret in path.relative_to(out).as_posix() for secret in SECRETS), path
        if path.is_file():
            content = path.read_bytes()
            texts = [content, gzip.decompress(content) if path.suffix == ".gz" else b""]
            assert [s for s in SECRETS for text in texts if s.encode() in text] == [], path


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "SMITH in")


def test_no_byte_of_a_data_set_says_who(export, capsys):
    out = run_import(export, code=1)
    statuses = [entry["status"] for entry in lines(out)]
    assert {status: statuses.count(status) for status in statuses} == {"imported": 6, "failed": 4, "excluded": 4}
    assert_no_secrets(out)
    whys = " ".join(entry.get("why", "") for entry in lines(out))
    assert "[...]: unreadable pixels ([...])" in whys
    notes = " ".join(note for entry in lines(out, "imported") for note in entry["notes"])
    assert "unreadable files in its folder may be slices of it: [...]" in notes
    assert "RescaleType is [...]" in notes
    assert "SeriesDescription [...]: one of 2 scans" in notes
    shown = capsys.readouterr()
    assert "Jane0002: unreadable pixels" in shown.err  # the terminal names files
    assert "a face" in shown.out
    for entry in lines(out, "imported"):
        header = nibabel.load(out / entry["file"]).header
        assert not any(header[name].item() for name in ("descrip", "aux_file", "db_name", "intent_name"))


def test_who_is_who_is_written_on_request_and_outside_alone(export, tmp_path, capsys):
    table = tmp_path / "private" / "table.csv"
    inside = out_of(export) / "table.csv"
    assert "expected a file outside of the data set" in refused(export, capsys, f"--private_table={inside}")
    assert "expected a file outside of the data set" in refused(export, capsys, f"--salt_file={inside}")
    (tmp_path / "link").symlink_to(out_of(export))
    assert "outside of the data set" in refused(export, capsys, f"--private_table={tmp_path / 'link' / 'table.csv'}")
    assert not out_of(export).exists()
    out = run_import(export, f"--private_table={table}", code=1)
    assert_no_secrets(out)
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    rows = {row["id"]: row for row in csv.DictReader(table.read_text().splitlines())}
    entries = {entry["id"]: entry for entry in lines(out)}
    assert rows.keys() == entries.keys()
    ids = {row["patient"]: row["patient_id"] for row in rows.values() if row["status"] == "imported"}
    assert set(ids.values()) == {"K4711W", "SMITH_Jane_K4711W"}
    (ct,) = [row for row in rows.values() if row["series_uid"] == "9.8.7.6.3"]
    assert ct["study_uid"] == "9.8.7.6.1"
    assert ct["source"].endswith("Jane_ct")
    assert entries[ct["id"]]["case"] == ct["case"] == f"{ct['patient']}_{ct['id']}"
    before = table.read_text()
    run_import(export, f"--private_table={table}", code=1)  # what continues knows all of it
    assert sorted(table.read_text().splitlines()) == sorted(before.splitlines())
    table.write_text("my own file")
    assert "expected a new file or a table of before" in refused(export, capsys, f"--private_table={table}")


def test_descriptions_are_kept_on_request(tmp_path):
    write_series(tmp_path / "in", HU, SeriesDescription="Abdomen 5.0")
    assert "description" not in lines(run_import(tmp_path / "in"))[0]
    kept = run_import(tmp_path / "in", "--keep_descriptions", f"--out={tmp_path / 'Dataset002_Kept'}")
    assert kept == out_of(tmp_path / "in")
    assert lines(tmp_path / "Dataset002_Kept")[0]["description"] == "Abdomen 5.0"


def test_names_are_stable_and_need_the_salt(tmp_path):
    """Without it, a plain digest is not the ID of a name; with the same, other folders give the same."""
    write_series(tmp_path / "in", HU, PatientID="K4711W")
    first = lines(run_import(tmp_path / "in"))[0]["case"]
    again = tmp_path / "again"
    run_import(tmp_path / "in", f"--out={again}")
    assert lines(again)[0]["case"] == first
    subject = first.removeprefix("sub-").split("_")[0]
    plain = {f(b"K4711W").hexdigest()[:10] for f in (hashlib.sha256, hashlib.sha1, hashlib.md5)}
    assert subject not in plain
    assert Pseudonyms(b"").patient("K4711W") != f"sub-{subject}"
    salt = tmp_path / "settings" / "hyspark" / "import_salt"
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    run_import(tmp_path / "in", f"--out={tmp_path / 'other'}", f"--salt_file={tmp_path / 'other_salt'}")
    assert lines(tmp_path / "other")[0]["patient"] != f"sub-{subject}"
    assert read_pseudonyms(salt).patient("K4711W") == f"sub-{subject}"


def test_a_salt_that_can_be_guessed_is_refused(tmp_path, capsys):
    write_series(tmp_path / "in", HU)
    (tmp_path / "salt").write_text("pepper\n")
    message = refused(tmp_path / "in", capsys, f"--salt_file={tmp_path / 'salt'}")
    assert "salt: expected a salt of at least 16 bytes, got 6" in message
    (tmp_path / "file").touch()
    message = refused(tmp_path / "in", capsys, f"--salt_file={tmp_path / 'file' / 'salt'}")
    assert "the salt of pseudonyms is not writable" in message
    assert "--salt_file" in message


def test_patients_without_id_are_told_apart_by_their_folders(tmp_path):
    for name in ("anna", "bert"):
        write_mr(tmp_path / "in" / name / "deep", HU + 1024, PatientID="", SeriesInstanceUID=f"1.{name == 'anna':d}")
    out = run_import(tmp_path / "in")
    assert len({entry["patient"] for entry in lines(out)}) == 2
    assert all(entry["notes"] == ["no PatientID; its folder stands for the patient"] for entry in lines(out))
    assert "anna" not in json.dumps(lines(out))
