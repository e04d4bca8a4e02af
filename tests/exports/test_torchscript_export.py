"""TorchScript files: PyTorch alone computes what the run does; predict and evaluate read them."""

import json
import zipfile

import pytest
import torch

from hyspark.cli.main import main
from hyspark.evaluation.network_kind import kind_of_network
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.exports import deploy
from hyspark.tasks import api
from hyspark.training import checkpoint
from tests.exports.tiny_runs import NAMES, least_dice, write_ct, write_labelled, write_run

JIT = "ignore:.torch.jit.*is deprecated"


@pytest.fixture(scope="module", params=["released", pytest.param("light", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """A run and its TorchScript file."""
    folder = tmp_path_factory.mktemp("torchscript")
    width = {"decoder_width": 64} if request.param == "light" else {}
    run = write_run(folder / "run", decoder=request.param, **width)
    text = deploy.export_torchscript(run, folder / "net.pt", str(write_ct(folder / "images")))
    assert "Dice liver 1.0000, aorta 1.0000; 0 of" in text
    assert "crops of 32 x 16 x 16 voxels alone" in text
    return folder


@pytest.mark.filterwarnings(JIT)
def test_torch_alone_computes_the_scores(exported):
    files = {"hyspark.json": ""}
    network = torch.jit.load(exported / "net.pt", _extra_files=files)
    assert json.loads(files["hyspark.json"])["classes"] == NAMES
    crops = torch.randn(3, 1, 32, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(network(crops), load_network(exported / "run").network(crops))


def test_predict_reads_it(exported, tmp_path):
    for weights, out in ((exported / "run", "by_run"), (exported / "net.pt", "by_export")):
        inputs = [str(exported / "images"), "--out", str(tmp_path / out)]
        main(["predict", str(weights), *inputs, "--device", "cpu", "--prepare_workers", "1"])
    assert least_dice(tmp_path / "by_run" / "ct.nii.gz", tmp_path / "by_export" / "ct.nii.gz") == 1


def test_evaluate_reads_it(exported, tmp_path):
    data = write_labelled(tmp_path / "Dataset001_Two")
    options = {"device": "cpu", "prepare_workers": 1}
    one, other = (
        api.evaluate(exported / name, data, tmp_path / out, **options)
        for name, out in (("run", "by_run"), ("net.pt", "by_export"))
    )
    assert one.table == other.table
    assert one.summary["organs"] == other.summary["organs"]


def test_a_foreign_file_is_refused_before_it_runs(exported, tmp_path, monkeypatch):
    with zipfile.ZipFile(exported / "net.pt") as own, zipfile.ZipFile(tmp_path / "foreign.pt", "w") as foreign:
        for name in own.namelist():
            if not name.endswith("hyspark.json"):
                foreign.writestr(name, own.read(name))
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: pytest.fail("it was loaded"))
    assert kind_of_network(tmp_path / "foreign.pt") == "segmentation"
    with pytest.raises(ValueError, match=r"foreign.pt: expected a network of `hyspark export`"):
        load_network(tmp_path / "foreign.pt")


def test_other_sources_and_flags_are_refused_by_name(exported, tmp_path, capsys):
    def refusal(source, out="net.pt", *flags):
        with pytest.raises(SystemExit) as exit_:
            main(["export", "--torchscript", str(source), str(tmp_path / out), *flags])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "exported already; give the run folder" in refusal(exported / "net.pt")
    assert "expected a path that ends in .pt" in refusal(exported / "run", "net.onnx")
    assert "--precision: not read with --torchscript" in refusal(exported / "run", "net.pt", "--precision", "fp32")
    assert "gone.nii.gz: no such file" in refusal(exported / "run", "net.pt", "--check", "gone.nii.gz")
    assert "holds no best.pth" in refusal(tmp_path)
    checkpoint.save({"model": {}, "config": {}, "classes": ["a", "b"], "weights": ""}, tmp_path / "run" / "best.pth")
    assert "got a classifier, which has no such export" in refusal(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
