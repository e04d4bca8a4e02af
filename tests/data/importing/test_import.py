"""Import of scans: series wherever they lie, values and geometry, modalities, what goes on after a stop."""

import json
import os
import shlex
from collections import Counter

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from hyspark.cli.main import main
from hyspark.data.importing import write
from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.volumes import read_volume
from tests.data.importing.imports import HU, RAS, command, images, lines, out_of, refused, run_import, write_mr
from tests.data.readers.dicom_files import write_dicom, write_series, write_slice


@pytest.fixture
def export(tmp_path):
    """All files of an export in one folder, in no order: two patients, compressed slices, a scout, MR, a report."""
    folder = tmp_path / "in"
    write_series(folder, HU, prefix="a", PatientID="DOE1", SeriesInstanceUID="1.1")
    write_series(folder, HU + 5, prefix="b", PatientID="DOE2", SeriesInstanceUID="1.2", spacing=3.0)
    for path in sorted(folder.glob("b*"))[::2]:
        data = pydicom.dcmread(path)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(path)
    write_series(folder, HU[:, :, :2], prefix="c", PatientID="DOE2", SeriesInstanceUID="1.3")
    write_slice(folder / "scout", HU[:, :, 0].T, (0, 0, 0), SeriesInstanceUID="1.4", ImageType=["LOCALIZER"])
    write_dicom(folder / "report", Modality="SR", SeriesInstanceUID="1.9")
    (folder / "notes.txt").write_text("notes")
    return folder


def test_a_shuffled_mixed_and_compressed_folder(export, capsys):
    out = run_import(export)
    known = {entry["spacing"][2]: entry for entry in lines(out, "imported")}
    assert len(known) == 2
    for spacing, values in ((2.0, RAS), (3.0, RAS + 5)):
        image = nibabel.load(out / known[spacing]["file"])
        assert image.get_data_dtype() == np.int16
        assert np.array_equal(np.asanyarray(image.dataobj), values)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        assert np.array_equal(image.get_sform(), image.get_qform())
        assert np.array_equal(image.header.get_zooms(), (1, 1, spacing))
    reasons = sorted(entry["why"] for entry in lines(out, "excluded"))
    assert reasons == ["2 slices, fewer than --min_slices 8", "localizer (1 images)"]
    assert json.loads((out / "import.json").read_text())["files_of_other_kinds"] == {"SR": 1, "no image": 1}
    assert json.loads((out / "dataset.json").read_text()) == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    assert "2 scans of 2 patients" in capsys.readouterr().out


def test_what_is_printed_last_can_be_typed(export, capsys, monkeypatch):
    monkeypatch.chdir(export.parent)
    out = run_import(export)
    printed = capsys.readouterr().out
    (check,) = [line.split() for line in printed.splitlines() if line.startswith("  hyspark check ")]
    assert check[2] == out.name
    with pytest.raises(SystemExit, match="1"):  # volumes as small as these are a warning
        main([*check[1:], "--prepare_workers=1"])
    assert "usable       2" in capsys.readouterr().out
    assert f"  hyspark pretrain --data {out.name} --out ckpt/dataset042_mine\n" in printed
    assert "hyspark finetune" not in printed  # there are no labels


def test_a_modality_is_asked_for_where_there_are_several(export, capsys):
    write_mr(export / "mr", HU + 1024, PatientID="DOE1")
    message = refused(export, capsys)
    assert (
        "expected scans of one modality, found CT (2 scans), MR (1 scan); add --modality CT or --modality MR" in message
    )
    assert not out_of(export).exists()
    out = run_import(export, "--modality", "MR")
    assert np.array_equal(*images(out), RAS + 1024)
    assert json.loads((out / "dataset.json").read_text())["channel_names"] == {"0": "MR"}
    reasons = Counter(entry["why"] for entry in lines(out, "excluded"))
    assert reasons["CT, and --modality is MR"] == 2
    assert "--intensity mr" in capsys.readouterr().out
    main(command(export, "--modality=CT", f"--out={export.parent / 'Dataset043_CT'}"))
    assert len(images(export.parent / "Dataset043_CT")) == 2


def test_the_same_command_continues_after_a_kill(tmp_path, capsys, monkeypatch):
    source = tmp_path / "in"
    for number in range(4):
        write_series(source / str(number), HU + number, SeriesInstanceUID=f"1.{number}", PatientID=f"P{number}")
    whole = run_import(source)
    expected = {path.name: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    os.rename(whole, tmp_path / "whole")
    real, done = write.convert_volume, []

    def stopping(*job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job[1])
        return real(*job)

    monkeypatch.setattr(write, "convert_volume", stopping)
    assert "the same command continues" in refused(source, capsys, code=130)
    record = whole / "import.jsonl"
    assert len(lines(whole, "imported")) == 2
    with record.open("a") as file:
        file.write('{"id": "cut sho')  # as a kill leaves it
    (whole / "imagesTr" / ".sub-0123456789_01234567_0000.nii.gz.77.tmp").write_bytes(b"half")
    first, second = sorted((whole / "imagesTr").glob("sub*"))
    second.write_bytes(second.read_bytes()[:-9])
    done.clear()
    monkeypatch.setattr(write, "convert_volume", lambda *job: done.append(job[1]) or real(*job))
    run_import(source)
    assert len(done) == 3  # the damaged one and two that were missing
    assert first.name.removesuffix("_0000.nii.gz") not in done
    assert {path.name: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == expected


def test_a_changed_series_is_read_again_and_a_new_one_added(tmp_path):
    write_series(tmp_path / "in" / "a", HU[:, :, :8], SeriesInstanceUID="1.1")
    out = run_import(tmp_path / "in")
    write_series(tmp_path / "in" / "a", HU, SeriesInstanceUID="1.1")
    write_series(tmp_path / "more", HU, SeriesInstanceUID="1.2")
    run_import([tmp_path / "in", tmp_path / "more"])
    assert [image.shape for image in images(out)] == [HU.shape] * 2


def test_the_data_set_may_lie_in_its_source(tmp_path):
    write_series(tmp_path / "in", HU)
    for _ in range(2):  # also where it is there
        run_import(tmp_path / "in", f"--out={tmp_path / 'in' / 'data' / 'Dataset001_A'}")
        assert len(images(tmp_path / "in" / "data" / "Dataset001_A")) == 1
    other = run_import(tmp_path / "in")
    assert len(images(other)) == 1
    assert [entry["why"] for entry in lines(other, "excluded")] == ["a data set of an earlier import"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--choose=thinnest"], "imported with other settings: choose 'all', now 'thinnest'; choose another folder"),
        (["--salt_file=SALT"], "imported with another salt, so that its names would change; give its file by --salt_f"),
    ],
)
def test_changed_settings_are_refused_with_what_to_do(tmp_path, capsys, change, message):
    write_series(tmp_path / "in" / "a", HU, SeriesInstanceUID="1.1")
    run_import(tmp_path / "in")
    assert message in refused(tmp_path / "in", capsys, *(word.replace("SALT", f"{tmp_path}/salt") for word in change))


def test_sources_that_are_gone_and_folders_of_other_files_are_refused(tmp_path, capsys):
    write_series(tmp_path / "in" / "a", HU, SeriesInstanceUID="1.1")
    run_import(tmp_path / "in")
    write_series(tmp_path / "other", HU, SeriesInstanceUID="1.2")
    message = refused(tmp_path / "other", capsys)
    assert "holds 1 cases whose series are not found any more" in message
    assert "give all sources of before, choose another folder with --out, or delete it" in message
    (tmp_path / "file").touch()
    assert "file: expected a folder, got a file" in refused(tmp_path / "other", capsys, f"--out={tmp_path / 'file'}")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    message = refused(tmp_path / "other", capsys, f"--out={tmp_path / 'new'}")
    assert "expected a new folder or one of an earlier import, found files" in message


def test_one_bad_series_never_ends_the_run(export, capsys):
    for path in sorted(export.glob("b*"))[1:2]:
        path.write_bytes(path.read_bytes()[:-60])
    (export / "torn.dcm").write_bytes(b"\0" * 50)
    message = refused(export, capsys, code=1)
    assert message.count("not imported: ") == 2
    assert "torn.dcm: unreadable as DICOM (expected a header" in message
    assert "unreadable pixels" in message
    out = out_of(export)
    assert len(lines(out, "imported")) == len(images(out)) == 1
    assert len(lines(out, "failed")) == 2
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 1


def test_an_image_of_before_is_kept_where_its_series_is_unreadable_now(tmp_path, capsys):
    write_series(tmp_path / "in", HU)
    out = run_import(tmp_path / "in")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    file = tmp_path / "in" / "IM0004"
    content = file.read_bytes()
    file.write_bytes(content[:-60])
    assert "its image of before is kept" in refused(tmp_path / "in", capsys, code=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    file.write_bytes(content)
    run_import(tmp_path / "in")
    assert [entry["status"] for entry in lines(out)] == ["imported"]


def test_values_that_wrapped_around_are_refused_by_name(tmp_path, capsys):
    hu = HU.copy()
    hu[0] = -3000  # read as 62536
    write_series(tmp_path / "in", hu - 1024, PixelRepresentation=0, RescaleIntercept=0)
    assert "negative HU that were read as unsigned" in refused(tmp_path / "in", capsys, code=1)
    assert lines(out_of(tmp_path / "in"), "failed")[0]["why"].startswith("values from ")


def test_nothing_to_import_says_why(tmp_path, capsys):
    write_series(tmp_path / "in", HU[:, :, :3])
    message = refused(tmp_path / "in", capsys)
    assert "error: no volume" in message
    assert "3 slices, fewer than --min_slices 8" in message
    assert "no such file or folder" in refused(tmp_path / "nowhere", capsys)


def scans_of(folder, *modalities):
    """Values of each scan, by name."""
    found = find_volumes([folder], min_slices=3, skip=folder / "out", modalities=modalities, progress=False)
    assert (found.damaged, found.skipped) == ([], [])
    return [read_volume(volume)[0] for volume in found.volumes]


DIFFERENT = {
    "echoes": [{"EchoNumbers": 1, "EchoTime": 10}, {"EchoNumbers": 2, "EchoTime": 80}],
    "echo times alone": [{"EchoTime": 4.6}, {"EchoTime": 2.3}],
    "magnitude and phase": [{"ImageType": ["ORIGINAL", "PRIMARY", kind, "ND"]} for kind in "MP"],
    "b-values": [{"DiffusionBValue": 0.0}, {"DiffusionBValue": 800.0}, {"DiffusionBValue": 1000.0}],
    "sequence names": [{"SequenceName": "ep_b0"}, {"SequenceName": "ep_b1000t"}],
    "times of a dynamic": [{"TemporalPositionIdentifier": n, "NumberOfTemporalPositions": 3} for n in (1, 2, 3)],
    "times alone": [{"AcquisitionTime": f"10{n}000.0"} for n in (1, 2, 3)],
    "inversion times": [{"InversionTime": 100}, {"InversionTime": 2500}],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_scans_of_an_mr_series_are_volumes_of_their_own(tmp_path, kind):
    for number, values in enumerate(DIFFERENT[kind]):
        write_mr(tmp_path, HU + 1024 + number, prefix=f"{number}_", **values)
    read = scans_of(tmp_path, "MR")
    assert len(read) == len(DIFFERENT[kind])
    assert {int((voxels - (RAS + 1024)).max()) for voxels in read} == set(range(len(read)))
    assert {int((voxels - (RAS + 1024)).min()) for voxels in read} == set(range(len(read)))


def test_echoes_of_magnitude_and_phase_and_directions_of_diffusion(tmp_path):
    for number, (echo, kind) in enumerate([(e, k) for e in (1, 2) for k in "MP"]):
        values = {"EchoTime": 10.0 * echo, "ImageType": ["ORIGINAL", "PRIMARY", kind]}
        write_mr(tmp_path / "in" / "echoes", HU + 1024 + number, prefix=f"{number}_", **values)
    for number in range(5):
        values = {"DiffusionBValue": 1000.0 * (number > 0), "DiffusionGradientOrientation": [0.0, 0.0, float(number)]}
        values |= {"SeriesInstanceUID": "1.5.2", "PatientID": "P2"}
        write_mr(tmp_path / "in" / "dwi", HU + 1024 + number, prefix=f"{number}_", **values)
    read = scans_of(tmp_path, "MR")
    assert sorted(int((voxels - (RAS + 1024)).max()) for voxels in read) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert all(len(np.unique(voxels - (RAS + 1024))) == 1 for voxels in read)


def test_mosaics_are_refused_by_name(tmp_path, capsys):
    for k in range(9):
        values = {"Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], "AcquisitionNumber": k}
        write_slice(tmp_path / "in" / str(k), HU[:, :, k].T, (0, 0, 0), **values)
    assert "mosaics of several slices; convert them to NIfTI" in refused(tmp_path / "in", capsys)


def test_pet_values_are_scaled_slice_by_slice_and_their_unit_is_noted(tmp_path):
    stored = (HU + 1024).transpose(2, 1, 0)
    for k, pixels in enumerate(stored):
        scaling = {"RescaleSlope": 0.5 + k, "RescaleIntercept": 0, "Units": "BQML", "Modality": "PT"}
        write_slice(tmp_path / "in" / str(k), pixels, (0, 0, 3.0 * k), **scaling)
    out = run_import(tmp_path / "in")
    (voxels,) = images(out)
    expected = (stored * (0.5 + np.arange(9))[:, None, None]).transpose(2, 1, 0)[::-1, ::-1]
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, expected.astype(np.float32))
    assert lines(out)[0]["notes"] == ["PET in Bq/ml"]
    assert json.loads((out / "dataset.json").read_text())["channel_names"] == {"0": "PT"}


def test_a_patient_stays_on_one_side_of_a_split(tmp_path, capsys):
    """Whatever the hashes are: 3 patients of 7 scans each, and 3 of one."""
    for patient in range(6):
        for scan in range(7 if patient < 3 else 1):
            uid = f"1.{patient}.{scan}"
            write_series(tmp_path / "in" / uid, HU[:2, :2, :8], SeriesInstanceUID=uid, PatientID=f"P{patient}")
    out = run_import(tmp_path / "in")
    main(["datalist", f"--data={out}", "--splits=auto", "--val_fraction=0.5", f"--out={tmp_path / 'list.json'}"])
    assert "perhaps" not in capsys.readouterr().err
    listed = json.loads((tmp_path / "list.json").read_text())
    sides = [
        {entry["image"].split("/")[-1].split("_")[0] for entry in listed[part]} for part in ("training", "validation")
    ]
    assert [len(side) for side in sides] == [3, 3]
    assert not sides[0] & sides[1]


def test_pieces_of_a_command_are_quoted(tmp_path, capsys):
    write_series(tmp_path / "in", HU)
    out = tmp_path / "my data" / "Dataset001_A"
    main(command(tmp_path / "in", f"--out={out}"))
    (check,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  hyspark check ")]
    assert shlex.split(check)[2] == str(out)
