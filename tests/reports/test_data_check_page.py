"""The report on a checked data set, and the command that makes it."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from hyspark.cli import main
from hyspark.data.datasets.cases import Case
from hyspark.data.quality.examine import Examined
from hyspark.data.quality.findings import Finding
from hyspark.reports import data_check_page


def run(*words) -> int:
    """The exit code of `hyspark check`."""
    try:
        main.main(["check", *map(str, words), "--prepare_workers", "1", "--spacing", "8", "8", "8"])
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.curves
@pytest.mark.spawn
def test_a_sound_data_set_gives_0_and_a_report(phantoms, tmp_path, capsys):
    assert run(phantoms, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "7, 3 of them labelled" in printed
    assert "0 errors, 0 warnings" in printed
    content = json.loads((tmp_path / "out" / "check.json").read_text())
    assert len(content["cases"]) == 7
    assert not any(case["is_broken"] for case in content["cases"])
    # The estimate is of the order of what preparation gives: 7 volumes of some 60 voxels an axis.
    assert 1e4 < content["estimate"]["store_bytes"] < 1e7
    assert content["estimate"]["seconds"] > 0
    assert content["estimate"]["memory"] > 1e7
    page = (tmp_path / "out" / "check.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 7  # histograms, and a thumbnail for each case
    assert "<script" not in page


def test_faults_give_1_and_are_named_with_their_files(phantoms, tmp_path, capsys):
    folder = tmp_path / "Dataset001_<b>&x"
    shutil.copytree(phantoms / "Dataset901_PhantomUnlabelled", folder)
    first = sorted((folder / "imagesTr").iterdir())[0]
    first.write_bytes(b"")
    assert run(folder, "--out", tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert f"error: empty file (1); expected a NIfTI file: copy or convert it again\n  {first}: no bytes" in printed
    page = (tmp_path / "out" / "check.html").read_text()
    assert "<b>&x" not in page
    assert "&lt;b&gt;&amp;x" in page
    finding, note = json.loads((tmp_path / "out" / "check.json").read_text())["findings"]
    assert (finding["kind"], finding["file"], finding["severity"]) == ("empty file", str(first), "error")
    assert (note["kind"], note["severity"]) == ("image without label", "note")


def test_notes_alone_give_0(phantoms, tmp_path):
    folder = tmp_path / "Dataset001_Test"
    shutil.copytree(phantoms / "Dataset900_PhantomLabelled", folder)
    sorted((folder / "labelsTr").iterdir())[0].unlink()
    assert run(folder, "--out", tmp_path / "out") == 0
    assert [f["severity"] for f in json.loads((tmp_path / "out" / "check.json").read_text())["findings"]] == ["note"]


def test_what_cannot_be_checked_gives_2(tmp_path, capsys):
    assert run(tmp_path / "nothing") == 2
    assert "nothing: no such file or folder" in capsys.readouterr().err


def test_a_data_set_of_broken_files_alone_still_gives_a_report(tmp_path):
    folder = tmp_path / "Dataset001_Test" / "imagesTr"
    folder.mkdir(parents=True)
    (folder / "a_0000.nii.gz").write_bytes(b"x")
    assert run(tmp_path, "--out", tmp_path / "out") == 1
    assert "No case could be read" in (tmp_path / "out" / "check.html").read_text()


def test_the_terminal_names_a_few_files_of_a_kind_and_counts_the_rest(tmp_path):
    findings = [Finding("constant", f"file{n}", "the value 0 everywhere") for n in range(9)]
    findings += [Finding("empty file", "other", "no bytes"), Finding("thin", "thin", "7 voxels")]
    printed = data_check_page.data_check_text([], findings, {})
    assert printed.count("everywhere") == data_check_page.MAX_FILES
    assert "and 4 more" in printed
    assert "10 errors, 1 warnings, 0 notes" in printed
    assert printed.index("empty file") < printed.index("constant") < printed.index("thin")  # errors first


def test_no_text_of_a_header_reaches_the_report(tmp_path, capsys):
    folder = tmp_path / "Dataset001_Test" / "imagesTr"
    folder.mkdir(parents=True)
    voxels = np.where(np.indices((20, 20, 20)).sum(0) > 30, 40, -1000).astype(np.int16)
    image = nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1]))
    image.header["descrip"] = b"DOE^JANE"
    nib.save(image, folder / "a_0000.nii.gz")
    assert run(tmp_path, "--out", tmp_path / "out") == 1
    written = capsys.readouterr().out + "".join(p.read_text() for p in (tmp_path / "out").iterdir())
    assert "may name a patient" in written
    assert "DOE" not in written


def test_ranges_of_one_and_of_several():
    assert data_check_page.ranges([(2, 3), (2, 3)], "{:.0f}") == "2 x 3"
    assert data_check_page.ranges([(1, 3), (2, 3), (5, 4)], "{:.0f}") == "2 x 3 (median; 1 x 3 to 5 x 4)"


@pytest.mark.curves
def test_numbers_of_a_case_are_plain(tmp_path):
    seen = Examined(Case("a", "D", tmp_path / "a.nii.gz"), shape=(1, 2, 3), spacing=(1.0, float("nan"), 1.0))
    data_check_page.write_data_check(tmp_path, "t", [seen], [], {}, None)
    (case,) = json.loads((tmp_path / "check.json").read_text())["cases"]
    assert (case["shape"], case["spacing_mm"]) == ([1, 2, 3], [1.0, None, 1.0])
