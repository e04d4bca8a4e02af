"""`hyspark import --labels`: structures of the sources become labelsTr, and what is missing is named."""

import csv
import json

import nibabel
import numpy as np
import pytest

from hyspark.cli.main import main
from tests.data.readers.known_series import made_series, save
from tests.data.structures.structure_files import write_rtstruct, write_seg

SHAPE = (16, 13, 9)
NAMES = "liver: [Leber, hepar]\nspleen: ['SPLEEN*']\ntumour:\n"


def square(low, high, part):
    corners = np.array([[low, low], [high, low], [high, high], [low, high]], float)
    z = float(part.ImagePositionPatient[2])
    return np.column_stack([corners, np.full(4, z)])


@pytest.fixture
def sources(tmp_path):
    """Three patients: with contours, with segments, and without labels."""
    draw = np.random.default_rng(2)
    for number, kind in enumerate(("rt", "seg", "none")):
        hu = draw.integers(-1000, 500, SHAPE).astype(np.int16)
        slices = made_series(tmp_path / "made" / kind, hu)
        for k, data in enumerate(slices):
            data.PatientID, data.PatientName = f"SECRET{number}", f"Hidden^{kind}"
            data.SeriesInstanceUID, data.StudyInstanceUID = f"1.2.7.{number}", f"1.2.6.{number}"
            data.FrameOfReferenceUID = f"1.2.5.{number}"
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.7.{number}.{k}"
        save(tmp_path / "pacs" / kind, slices)
        if kind == "rt":
            structures = {"Leber": [square(3.5, 9.5, slices[4])], "Hidden thing": [square(1.5, 3.5, slices[4])]}
            write_rtstruct(tmp_path / "pacs" / "elsewhere" / "a", slices, structures)
        if kind == "seg":
            pixels = np.zeros(SHAPE[::-1], np.uint8)
            pixels[2:4, 3:7, 5:9], pixels[4] = 1, 2
            write_seg(tmp_path / "pacs" / "b.dcm", slices, pixels, ["Spleen 1", "tumour"])
    (tmp_path / "names.yaml").write_text(NAMES)
    return tmp_path / "pacs"


def run(tmp_path, *flags):
    own = ["--out", str(tmp_path / "Dataset1_A"), "--salt_file", str(tmp_path / "salt"), "--prepare_workers=1"]
    main(["import", str(tmp_path / "pacs"), *own, *flags])
    return tmp_path / "Dataset1_A"


def with_names(tmp_path):
    return "--labels", "--label_names", str(tmp_path / "names.yaml")


def test_labels_lie_on_their_images_and_what_is_missing_is_named(tmp_path, sources, capsys):
    out = run(tmp_path, *with_names(tmp_path))
    printed = capsys.readouterr().out
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2, "tumour": 3}
    entries = [json.loads(line) for line in (out / "import.jsonl").read_text().splitlines()]
    assert len(list((out / "imagesTr").iterdir())) == len(entries) == 3
    found = {}
    for entry in entries:
        missing = tuple(entry["labels"]["missing"])
        if not entry["labels"]["file"]:
            assert missing == ("liver", "spleen", "tumour")
            assert f"{entry['case']}: no label map" in printed
            continue
        image, label = nibabel.load(out / entry["file"]), nibabel.load(out / entry["labels"]["file"])
        assert label.shape == image.shape
        assert np.array_equal(label.affine, image.affine)
        assert label.get_data_dtype() == np.uint8
        found[missing] = np.asarray(label.dataobj)[::-1, ::-1]  # in the order of the slices
        assert f"{entry['case']}: without {', '.join(missing)}" in printed
    expected = np.zeros(SHAPE, np.uint8)
    expected[4:10, 4:10, 4] = 1
    assert np.array_equal(found["spleen", "tumour"], expected)
    expected = np.zeros(SHAPE, np.uint8)
    expected[5:9, 3:7, 2:4], expected[:, :, 4] = 2, 3
    assert np.array_equal(found["liver",], expected)
    assert f"  hyspark finetune --data {out} --out ckpt/{out.name.lower()}_labels\n" in printed
    assert "labels: 2 of 3 scans; classes: 1 liver, 2 spleen, 3 tumour" in printed
    assert "structures without class, add their names to --label_names: 'Hidden thing' (1)" in printed
    rows = list(csv.DictReader((out / "labels.csv").read_text().splitlines()))
    assert sorted((row["liver"], row["spleen"], row["tumour"]) for row in rows) == [
        ("", "", ""),
        ("", "32", str(16 * 13)),
        ("36", "", ""),
    ]
    for path in out.rglob("*"):
        content = nibabel.load(path).to_bytes() if path.name.endswith(".gz") else path.is_file() and path.read_bytes()
        for private in (b"SECRET", b"Hidden", b"1.2.7", b"elsewhere"):
            assert not content or private not in content, path


def test_the_labelled_cases_are_a_list(tmp_path, sources, capsys):
    out = run(tmp_path, *with_names(tmp_path))
    main(["datalist", "--data", str(out), "--labels", "--out", str(tmp_path / "list.json")])
    listed = json.loads((tmp_path / "list.json").read_text())
    assert len(listed["training"]) == 2
    assert all("label" in case for case in listed["training"])


def test_the_same_command_gives_the_same_and_images_alone_keep_the_classes(tmp_path, sources, capsys):
    out = run(tmp_path, *with_names(tmp_path))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run(tmp_path, *with_names(tmp_path))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run(tmp_path)
    assert (out / "dataset.json").read_bytes() == before[out / "dataset.json"]
    (sources / "b.dcm").unlink()
    run(tmp_path, *with_names(tmp_path))
    assert len(list((out / "labelsTr").iterdir())) == 1


def test_without_synonyms_each_name_is_a_class(tmp_path, sources, capsys):
    out = run(tmp_path, "--labels")
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    assert list(labels) == ["background", "Hidden thing", "Leber", "Spleen 1", "tumour"]
    assert "classes are the names of structures, in which people write" in capsys.readouterr().out


def test_faulty_structures_are_named_and_the_others_are_written(tmp_path, sources, capsys):
    (sources / "elsewhere" / "cut").write_bytes((sources / "elsewhere" / "a").read_bytes()[:700])
    content = (sources / "b.dcm").read_bytes()
    (sources / "b.dcm").write_bytes(content[:-200])
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *with_names(tmp_path))
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "b.dcm" in error
    assert "unreadable as SEG" in error
    assert len(list((tmp_path / "Dataset1_A" / "labelsTr").iterdir())) == 1


def test_files_of_no_imported_series_are_named(tmp_path, sources, capsys):
    for path in (sources / "rt").iterdir():
        path.unlink()
    run(tmp_path, *with_names(tmp_path))
    assert f"1 file of structures of no imported series: {sources / 'elsewhere' / 'a'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--label_names", "names.yaml"], "--label_names: read with --labels alone; add --labels"),
        (["--labels", "--label_names", "none.yaml"], "--label_names none.yaml: no such file; expected {class: "),
        (["--labels", "--label_names", "salt"], "--label_names salt: "),
    ],
)
def test_wrong_use_is_one_message_before_any_work(tmp_path, sources, capsys, monkeypatch, flags, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "salt").write_bytes(b"- no classes, but a salt")
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *flags)
    assert caught.value.code == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "Dataset1_A").exists()


def test_sources_without_structures_are_named(tmp_path, sources, capsys):
    (sources / "b.dcm").unlink()
    (sources / "elsewhere" / "a").unlink()
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--labels")
    assert caught.value.code == 2
    assert "--labels: expected RTSTRUCT or SEG files in the sources, found none" in capsys.readouterr().err
