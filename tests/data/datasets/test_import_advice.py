"""Verbs on folders of DICOM, NRRD or MetaImage name the command that converts them, and it works when it is typed."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from hyspark.cli.main import main
from hyspark.data.datasets.import_advice import free_data_set
from hyspark.evaluation.segmentation.labelled_data import find_labelled
from tests.data.readers.dicom_files import write_series

HU = np.random.default_rng(4).integers(-1024, 1500, (10, 12, 9)).astype(np.int16)


def write_scans(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True)
    if kind == "dicom":
        write_series(folder / "deep" / "er", HU)
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(HU.transpose(2, 1, 0)), str(folder / f"scan.{kind}"))


def message_of(words: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("kind", ["dicom", "nrrd", "mha", "hdr"])
@pytest.mark.parametrize("verb", ["datalist", "check", "pretrain", "finetune"])
def test_the_command_to_type_has_its_paths(tmp_path, capsys, monkeypatch, verb, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    (tmp_path / "data" / "Dataset001_Other").mkdir(parents=True)
    write_scans(tmp_path / "an export", kind)
    words = {"check": ["check", "an export"], "datalist": ["datalist", "--data=an export"]}
    message = message_of(words.get(verb, [verb, "--data=an export", "--out=run", "--device=cpu"]), capsys)
    command = shlex.split(re.search(r"; type hyspark (import .*)$", message)[1])
    assert command[2:] == ["--out", "data/Dataset002_Imported"]
    main([*command, "--prepare_workers=1"])
    assert len(list(Path(command[3]).glob("imagesTr/*.nii.gz"))) == 1
    if verb == "datalist":
        main(["datalist", f"--data={command[3]}", "--out=list.json"])
        assert len(json.loads(Path("list.json").read_text())["training"]) == 1


def test_evaluate_names_it_too(tmp_path):
    write_scans(tmp_path / "in", "dicom")
    with pytest.raises(ValueError, match=r"type hyspark import .*/in --out data/Dataset"):
        find_labelled(tmp_path / "in")


def test_one_file_instead_of_a_folder(tmp_path, capsys):
    write_scans(tmp_path / "in", "dicom")
    file = next((tmp_path / "in").rglob("IM*"))
    for words in (["check", str(file)], ["datalist", f"--data={file}"], ["pretrain", f"--data={file}", "--out=run"]):
        assert f"{file}: expected NIfTI files, found DICOM files; convert them" in message_of(words, capsys)


def test_folders_of_nothing_to_convert_keep_their_message(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing of use, but long enough for a header")
    assert "hyspark import" not in message_of(["datalist", f"--data={tmp_path}"], capsys)


def test_the_number_of_a_data_set_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_data_set() == "data/Dataset001_Imported"
