"""Label maps: in the geometry and with the header of their inputs, several at a time, broken files apart."""

import errno
import gzip
import logging
import multiprocessing
import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.nifti1 import Nifti1Extension
from nibabel.orientations import axcodes2ornt, ornt_transform

from hyspark.cli.main import main
from hyspark.config.recipes import as_plain
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets.inputs import read_inputs
from hyspark.evaluation.segmentation import predict, segmenter
from hyspark.evaluation.segmentation import prepare_ahead as prepare_ahead_module
from hyspark.evaluation.segmentation.inference import TrainedNetwork, hybird_from_config
from hyspark.evaluation.segmentation.prepare_ahead import prepare_ahead
from hyspark.evaluation.segmentation.scoring_protocol import Scoring
from hyspark.tasks import api
from hyspark.training import checkpoint
from hyspark.utils.log import LOG

NAMES = ["background", "liver", "aorta"]
CONFIG = SegmentationConfig(
    encoder_widths=(6, 6, 12, 12, 24),
    encoder_depths=(1,) * 5,
    expansions=(2,) * 5,
    vit_depth=1,
    spacing=(2.0, 2.0, 3.0),
    crop_size=(16,),
)
GEOMETRY = ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b")


class Levels(torch.nn.Module):
    """The class whose level the voxel's brightness is nearest to: right wherever `write_volume` wrote it."""

    def forward(self, x):
        return torch.cat([-((x - (hu + 175) / 425).abs()) for hu in (-50, 80, 200)], dim=1)


@pytest.fixture
def weights(tmp_path):
    """A run folder with an untrained network."""
    contents = {"model": hybird_from_config(CONFIG, 3).state_dict(), "config": as_plain(CONFIG), "classes": NAMES}
    checkpoint.save(contents, tmp_path / "run" / "best.pth")
    return tmp_path / "run"


@pytest.fixture
def knowing(monkeypatch):
    """In place of the untrained network one that knows."""
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(Levels(), CONFIG, NAMES, []))
    monkeypatch.setattr(api, "kind_of_network", lambda path: "segmentation")


def write_volume(path, orientation="RAS", turn=0.0):
    """A box of body with two organs at 2 x 2 x 3 mm, and scraps of one; returns its true label map, as it lies on the
    disk. turn: degrees by which the patient lies askew.
    """
    label = np.zeros((24, 22, 20), np.uint8)
    label[6:14, 6:14, 6:14] = 1
    label[16:20, 8:12, 4:15] = 2
    label[4, 4, 4] = 1
    image = np.full(label.shape, -1000, np.int16)
    image[2:22, 2:20, 2:18] = -50
    image[label == 1], image[label == 2] = 80, 200
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    affine = np.array([[cos, -sin, 0, -30], [sin, cos, 0, 12], [0, 0, 1, 500], [0, 0, 0, 1]]) @ np.diag([2, 2, 3, 1])
    turned = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    nifti = nibabel.Nifti1Image(image, affine).as_reoriented(turned)
    nifti.header.set_xyzt_units("mm", "sec")
    nifti.header["descrip"] = b"a patient's name"
    nifti.header["cal_max"] = 250
    nifti.header["scl_slope"], nifti.header["scl_inter"] = 1, 0
    nifti.header.extensions.append(Nifti1Extension("comment", b"a patient's name"))
    nifti.set_sform(nifti.affine, 1)
    nifti.set_qform(nifti.affine, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nifti, path)
    return nibabel.Nifti1Image(label, affine).as_reoriented(turned).get_fdata()


@pytest.mark.parametrize("turn", [0.0, 20.0])
@pytest.mark.parametrize(("orientation", "ending"), [("RAS", ".nii.gz"), ("LPS", ".nii"), ("SAR", ".nii.gz")])
def test_a_label_map_lies_where_its_volume_does(knowing, tmp_path, orientation, ending, turn):
    source = tmp_path / "in" / f"case_0000{ending}"
    truth = write_volume(source, orientation, turn)
    assert (
        predict.predict_segmentation(tmp_path, [source], tmp_path / "out", device="cpu", num_workers=1).failures == {}
    )
    found, given = nibabel.load(tmp_path / "out" / "case.nii.gz"), nibabel.load(source)
    assert np.array_equal(found.get_fdata(), truth)
    assert np.array_equal(found.affine, given.affine)
    for field in GEOMETRY:
        assert np.array_equal(found.header[field], given.header[field]), field


def test_a_header_says_a_label_map_and_names_nobody(knowing, tmp_path):
    write_volume(tmp_path / "in" / "case.nii.gz")
    predict.predict_segmentation(tmp_path, [tmp_path / "in"], tmp_path / "out", device="cpu", num_workers=1)
    path = tmp_path / "out" / "case.nii.gz"
    header = nibabel.load(path).header
    assert header.get_data_dtype() == np.uint8
    assert np.asarray(nibabel.load(path).dataobj).dtype == np.uint8
    assert header["cal_max"] == 0
    assert not header.extensions
    assert b"patient" in gzip.decompress((tmp_path / "in" / "case.nii.gz").read_bytes())
    assert b"patient" not in gzip.decompress(path.read_bytes())
    assert sorted(p.name for p in path.parent.iterdir()) == ["case.nii.gz"]


def test_several_volumes_and_a_broken_one(knowing, tmp_path, capsys):
    names = ("ras", "lps", "ial")
    truth = {name: write_volume(tmp_path / "in" / f"{name}_0000.nii.gz", name.upper()) for name in names}
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"no volume")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.uint8), np.eye(4)), tmp_path / "in" / "many.nii.gz")
    with pytest.raises(SystemExit) as exit_:
        main(["predict", "any", f"{tmp_path}/in", "--out", f"{tmp_path}/out", "--device=cpu", "--prepare_workers=1"])
    assert exit_.value.code == 1
    told = capsys.readouterr().err
    assert "broken.nii.gz: a file that is not compressed" in told
    assert "many.nii.gz: shape (4, 4, 4, 2)" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ial.nii.gz", "lps.nii.gz", "ras.nii.gz"]
    for name, labels in truth.items():
        assert np.array_equal(nibabel.load(tmp_path / "out" / f"{name}.nii.gz").get_fdata(), labels)


@pytest.mark.parametrize("given", ["folder", "files"])
def test_files_that_are_not_used_are_named(knowing, tmp_path, caplog, given):
    """The level of the log is set before the files are found."""
    for channel in ("0000", "0001"):
        write_volume(tmp_path / "in" / f"a_{channel}.nii.gz")
    inputs = [tmp_path / "in"] if given == "folder" else sorted((tmp_path / "in").iterdir())
    LOG.setLevel(logging.WARNING)
    main(["predict", "any", *map(str, inputs), f"--out={tmp_path / 'out'}", "--device=cpu", "--prepare_workers=1"])
    assert "1 file not used, another channel" in caplog.text
    assert "a_0001.nii.gz" in caplog.text


def test_workers_keep_the_order(tmp_path):
    for name in "cab":
        write_volume(tmp_path / f"{name}.nii.gz")
    cases = read_inputs([tmp_path / "c.nii.gz", tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]).cases
    ahead = list(prepare_ahead(cases, CONFIG, 2, 10**12))
    assert [case.name for case, _ in ahead] == ["c", "a", "b"]
    alone = list(prepare_ahead(cases, CONFIG, 1, 10**12))
    assert all(np.array_equal(a["image"], b["image"]) for (_, a), (_, b) in zip(ahead, alone, strict=True))


def test_only_the_largest_part_if_asked(knowing, tmp_path):
    truth = write_volume(tmp_path / "x.nii.gz")
    options = {"device": "cpu", "num_workers": 1, "scoring": Scoring(largest_component=True)}
    predict.predict_segmentation(tmp_path, [tmp_path / "x.nii.gz"], tmp_path / "out", **options)
    truth[4, 4, 4] = 0
    assert np.array_equal(nibabel.load(tmp_path / "out" / "x.nii.gz").get_fdata(), truth)


def test_nothing_is_replaced_unasked(weights, tmp_path, capsys):
    write_volume(tmp_path / "in" / "x.nii.gz")
    words = ["predict", str(weights), str(tmp_path / "in"), "--device", "cpu", "--prepare_workers", "1"]
    main([*words, "--out", str(tmp_path / "out")])
    written = (tmp_path / "out" / "x.nii.gz").stat().st_mtime_ns
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "replace them with --overwrite" in capsys.readouterr().err
    main([*words, "--out", str(tmp_path / "out"), "--overwrite", "--flips", "1", "2", "--overlap", "0.25"])
    assert (tmp_path / "out" / "x.nii.gz").stat().st_mtime_ns > written
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path / "in"), "--overwrite"])
    assert "would replace the volumes themselves" in capsys.readouterr().err


def test_a_volume_that_is_named_twice_is_one_case(tmp_path, monkeypatch):
    for name in ("x_0000", "y_0000"):
        write_volume(tmp_path / "a" / f"{name}.nii.gz")
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "a", tmp_path / "a" / "x_0000.nii.gz"
    for inputs in ([folder, folder], [folder, file], [file, folder], [folder, Path("a")], [file, file, folder]):
        assert sorted(case.name for case in read_inputs(inputs).cases) == ["x", "y"]
    write_volume(tmp_path / "b" / "x_0000.nii.gz")
    assert sorted(case.name for case in read_inputs([tmp_path, file]).cases) == ["b-x", "x", "y"]


def test_inputs_that_cannot_be(tmp_path):
    for folder in ("a", "b"):
        write_volume(tmp_path / folder / "x_0000.nii.gz")
    with pytest.raises(ValueError, match="two volumes are named x"):
        read_inputs([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(FileNotFoundError, match="c: no such file or folder"):
        read_inputs([tmp_path / "c"])
    assert [case.name for case in read_inputs([tmp_path]).cases] == ["a-x", "b-x"]
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no NIfTI file"):
        read_inputs([tmp_path / "c"])
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="is no NIfTI file"):
        read_inputs([tmp_path / "x.txt"])


def test_flips_of_left_and_right_need_pairs(monkeypatch, tmp_path):
    sided = ["background", "left kidney", "right kidney"]
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(Levels(), CONFIG, sided, []))
    write_volume(tmp_path / "x.nii.gz")
    with pytest.raises(ValueError, match="omit axis 0"):
        predict.predict_segmentation(
            tmp_path, [tmp_path / "x.nii.gz"], tmp_path / "out", scoring=Scoring(flips=(0,)), device="cpu"
        )
    paired = replace(CONFIG, left_right=("left kidney=right kidney",))
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(Levels(), paired, sided, []))
    options = {"scoring": Scoring(flips=(0,)), "device": "cpu", "num_workers": 1}
    assert predict.predict_segmentation(tmp_path, [tmp_path / "x.nii.gz"], tmp_path / "out", **options).failures == {}


# One case never ends a run of many


class Failing(Levels):
    """Raises an error on volumes of a marker's brightness."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if x.max() > 0.99:
            raise self.error
        return super().forward(x)


FAULTS = {
    "memory": (MemoryError(), "out of memory (MemoryError); free memory"),
    "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto"), "out of memory (DefaultCPU"),
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory (CUDA out of memory"),
    "any": (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
}


def write_marked(folder):
    """Three volumes; b has a bright voxel. Returns the true label maps of the others."""
    truth = {name: write_volume(folder / f"{name}.nii.gz") for name in "abc"}
    image = nibabel.load(folder / "b.nii.gz")
    voxels = np.asarray(image.dataobj).copy()
    voxels[10, 10, 10] = 1000
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), folder / "b.nii.gz")
    return {name: truth[name] for name in "ac"}


def assert_others_are_whole(out, truth):
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.nii.gz" for name in truth]
    for name, labels in truth.items():
        assert np.array_equal(nibabel.load(out / f"{name}.nii.gz").get_fdata(), labels)


def predict_with(network, monkeypatch, tmp_path, *words):
    monkeypatch.setattr(predict, "load_network", lambda path: TrainedNetwork(network, CONFIG, NAMES, []))
    monkeypatch.setattr(api, "kind_of_network", lambda path: "segmentation")
    with pytest.raises(SystemExit) as exit_:
        main(["predict", "any", f"{tmp_path}/in", "--out", f"{tmp_path}/out", "--device=cpu", *words])
    return exit_.value.code


@pytest.mark.parametrize("kind", FAULTS)
def test_a_case_that_the_network_fails_on(kind, monkeypatch, tmp_path, capsys):
    error, reason = FAULTS[kind]
    truth = write_marked(tmp_path / "in")
    assert predict_with(Failing(error), monkeypatch, tmp_path, "--prepare_workers=1") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not predicted" in line]
    assert line.startswith(f"not predicted: {tmp_path}/in/b.nii.gz: {reason}")
    assert_others_are_whole(tmp_path / "out", truth)


@pytest.mark.parametrize("name", ["file_grid", "label_maps"])
def test_a_case_whose_label_map_cannot_be_made(name, monkeypatch, tmp_path, capsys):
    """The thread that makes and writes label maps fails; the network does not wait for it."""
    truth = write_marked(tmp_path / "in")
    right = getattr(segmenter, name)
    calls = []

    def fails_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("Unable to allocate 9 GiB")
        return right(*args)

    monkeypatch.setattr(segmenter, name, fails_second)
    assert predict_with(Levels(), monkeypatch, tmp_path, "--prepare_workers=1") == 1
    assert "b.nii.gz: out of memory (Unable to allocate 9 GiB)" in capsys.readouterr().err
    assert_others_are_whole(tmp_path / "out", truth)


def test_a_full_disk_ends_the_run_in_one_line(monkeypatch, tmp_path, capsys):
    write_marked(tmp_path / "in")
    written = []

    def full(path, content, write=predict.write_whole):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        write(path, content)

    monkeypatch.setattr(predict, "write_whole", full)
    assert predict_with(Levels(), monkeypatch, tmp_path, "--prepare_workers=1") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines == [
        f"error: {tmp_path}/out/b.nii.gz: label maps are not writable (No space left on device); make room, or choose "
        "another folder with --out"
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii.gz"]


def test_an_output_that_only_one_case_cannot_have(monkeypatch, tmp_path, capsys):
    truth = write_marked(tmp_path / "in")
    (tmp_path / "out" / "b.nii.gz").mkdir(parents=True)
    assert predict_with(Levels(), monkeypatch, tmp_path, "--prepare_workers=1", "--overwrite") == 1
    assert "not predicted: " in capsys.readouterr().err
    (tmp_path / "out" / "b.nii.gz").rmdir()
    assert_others_are_whole(tmp_path / "out", truth)


def test_control_c_still_stops(monkeypatch, tmp_path):
    write_marked(tmp_path / "in")
    monkeypatch.setattr(
        predict, "load_network", lambda path: TrainedNetwork(Failing(KeyboardInterrupt()), CONFIG, NAMES, [])
    )
    with pytest.raises(KeyboardInterrupt):
        predict.predict_segmentation(tmp_path, [tmp_path / "in"], tmp_path / "out", device="cpu", num_workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii.gz"]


def killed_or_prepared(case, settings, is_whole):
    """Stands for `prepared_or_reason` in a worker: case b kills its process."""
    if case.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"image": case.name}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_worker_that_is_killed_costs_its_case_alone(monkeypatch, tmp_path):
    for name in "abcd":
        write_volume(tmp_path / f"{name}.nii.gz")
    monkeypatch.setattr(prepare_ahead_module, "prepared_or_reason", killed_or_prepared)
    forked = multiprocessing.get_context("fork")  # in place of processes that import torch anew
    monkeypatch.setattr(prepare_ahead_module, "worker_pool", lambda num: ProcessPoolExecutor(num, forked))
    found = {case.name: made for case, made in prepare_ahead(read_inputs([tmp_path]).cases, CONFIG, 2, 10**12)}
    assert list(found) == ["a", "b", "c", "d"]
    assert "was killed, perhaps for its memory" in found.pop("b")
    assert found == {name: {"image": name} for name in "acd"}


def test_large_volumes_are_prepared_by_fewer_workers(monkeypatch, tmp_path):
    """As many as their memory allows, one at least."""
    for name in "abcd":
        write_volume(tmp_path / f"{name}.nii.gz")
    cases = read_inputs([tmp_path]).cases
    size = prepare_ahead_module.estimate_bytes(cases[0], CONFIG)
    assert 24 * 22 * 20 * 12 < size < 24 * 22 * 20 * 100
    at_once = []

    class Now:
        """A pool that works at once, and notes how many results wait."""

        waiting = 0

        def submit(self, function, *args):
            Now.waiting += 1
            at_once.append(Now.waiting)
            future = Future()
            future.set_result(args[0].name)
            return future

    monkeypatch.setattr(prepare_ahead_module, "worker_pool", lambda num: nullcontext(Now()))
    for memory, most in ((1, 1), (2 * size, 2), (3.5 * size, 3), (10**12, 4)):
        Now.waiting, at_once[:] = 0, []
        for _ in prepare_ahead(cases, CONFIG, 4, memory):
            Now.waiting -= 1
        assert max(at_once) == most


def test_the_file_of_class_scores_leaves_nothing_behind(knowing, tmp_path):
    truth = write_volume(tmp_path / "in" / "x.nii.gz")
    options = {"device": "cpu", "num_workers": 1, "scoring": Scoring(memory=1e-9, flips=(1,))}
    assert predict.predict_segmentation(tmp_path, [tmp_path / "in"], tmp_path / "out", **options).failures == {}
    assert_others_are_whole(tmp_path / "out", {"x": truth})
