"""ONNX files: ONNX Runtime computes what the run does, at any batch and size; predict reads them."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hyspark.cli.main import main
from hyspark.evaluation.segmentation.deployed import OnnxNetwork, load_deployed
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.evaluation.segmentation.windows import passes
from hyspark.exports import deploy, onnx_export
from tests.exports.tiny_runs import NAMES, least_dice, write_ct, write_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run and its ONNX file, and the lines of the export."""
    folder = tmp_path_factory.mktemp("onnx")
    run = write_run(folder / "run", intensity=("ct-zscore",), input_mean=(40.0,), input_std=(110.0,))
    text = deploy.export_onnx(run, folder / "net.onnx", str(write_ct(folder / "images")))
    return folder, text


def test_an_export_reports_the_agreement_and_leaves_nothing_else(exported):
    folder, text = exported
    assert "Dice liver 1.0000, aorta 1.0000" in text
    assert "any batch, any size" in text
    assert sorted(path.name for path in folder.iterdir()) == ["images", "net.onnx", "run"]


@pytest.mark.parametrize("shape", [(1, 1, 16, 16, 16), (3, 1, 32, 16, 48), (1, 1, 48, 48, 32)])
def test_onnx_runtime_computes_the_scores_at_any_batch_and_size(exported, shape):
    folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "net.onnx", providers=["CPUExecutionProvider"])
    crops = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    (found,) = session.run(["scores"], {"image": crops.numpy()})
    with torch.no_grad():
        expected = load_network(folder / "run").network(crops).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_its_metadata_is_what_another_program_needs(exported):
    folder, _ = exported
    onnx.checker.check_model(folder / "net.onnx")
    session = onnxruntime.InferenceSession(folder / "net.onnx", providers=["CPUExecutionProvider"])
    known = json.loads(session.get_modelmeta().custom_metadata_map["hyspark.json"])
    assert known["classes"] == NAMES
    assert known["orientation"] == "RAS"
    settings = known["settings"]
    assert settings["spacing"] == [8.0, 7.0, 10.0]
    assert settings["crop_size"] == [32, 16, 16]
    assert (settings["intensity"], settings["input_mean"], settings["hu_max"]) == (["ct-zscore"], [40.0], 250.0)
    assert "moved away" not in json.dumps(known)


def test_predict_reads_it(exported, tmp_path):
    folder, _ = exported
    for weights, out in ((folder / "run", "by_run"), (folder / "net.onnx", "by_onnx")):
        inputs = [str(folder / "images"), "--out", str(tmp_path / out), "--flips", "1", "--overlap", "0.25"]
        main(["predict", str(weights), *inputs, "--device", "cpu", "--prepare_workers", "1"])
    assert least_dice(tmp_path / "by_run" / "ct.nii.gz", tmp_path / "by_onnx" / "ct.nii.gz") > 0.9995


def test_onnx_runtime_is_an_extra(exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for words in (
        ["predict", str(folder / "net.onnx"), str(folder / "images"), "--out", str(tmp_path / "out")],
        ["export", "--onnx", str(folder / "run"), str(tmp_path / "net.onnx")],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        assert "ONNX needs onnxruntime: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "expected ONNX, got a web page or an error message of a server"),
        (b"version https://git-lfs.github.com/spec/v1\n", "expected ONNX, got a Git LFS pointer"),
        (b"", "expected ONNX, got an empty file"),
        (b"\xff" * 40, "unreadable ONNX .*; is it damaged or truncated"),
        (b"some text that is no message", "unreadable ONNX .*; is it damaged or truncated"),
    ],
)
def test_files_that_are_no_onnx_are_named(content, message, tmp_path):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.onnx: {message}"):
        load_deployed(tmp_path / "x.onnx", "onnx")


def test_a_foreign_file_is_refused(exported, tmp_path, capsys, monkeypatch):
    """From its metadata, before ONNX Runtime sees it."""
    folder, _ = exported
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    foreign = onnx.load(folder / "net.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(tmp_path / "foreign.onnx"), str(folder / "images"), "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "foreign.onnx: expected a network of `hyspark export`" in capsys.readouterr().err
    (tmp_path / "damaged.onnx").write_bytes((folder / "net.onnx").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"damaged.onnx: unreadable ONNX"):
        load_deployed(tmp_path / "damaged.onnx", "onnx")


def test_a_file_of_a_later_release_is_not_called_damaged(exported, tmp_path):
    folder, _ = exported
    model = onnx.load(folder / "net.onnx")
    model.ir_version = 99
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"net\.onnx: onnxruntime .* does not run it .*version.*; update onnxruntime"):
        load_deployed(tmp_path / "net.onnx", "onnx")


def test_memory_that_does_not_suffice_splits_the_pass(tmp_path):
    """ONNX Runtime raises errors of types of its own."""

    class Session:
        def run(self, names, given):
            if len(given["image"]) > 1:
                raise Exception("Failed to allocate memory for requested buffer of size 9000000000")
            return [2 * given["image"]]

    network = OnnxNetwork(tmp_path / "net.onnx", Session())
    crops = torch.randn(3, 1, 2, 2, 2)
    found = torch.cat(list(passes(network, crops, torch.device("cpu"))))
    assert torch.equal(found, 2 * crops)


def test_a_network_beyond_the_limit_of_onnx_is_refused(exported, tmp_path, monkeypatch):
    folder, _ = exported
    monkeypatch.setattr(onnx_export, "LARGEST_BYTES", 1000)
    with pytest.raises(ValueError, match="GB of weights, and an ONNX file holds 2; use --torchscript or --bundle"):
        deploy.export_onnx(folder / "run", tmp_path / "net.onnx")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"decoder": "light", "decoder_width": 64}, {"image_channels": (0, 1)}])
def test_other_networks(changes, tmp_path):
    run = write_run(tmp_path / "run", **changes)
    image = write_ct(tmp_path / "images", changes.get("image_channels", (0,)))
    assert "Dice liver 1.0000, aorta 1.0000" in deploy.export_onnx(run, tmp_path / "net.onnx", str(image))
