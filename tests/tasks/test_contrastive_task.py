"""Pre-training by comparing views: the same run folder, continuation and processes as for masking."""

import json
import pickle
from dataclasses import asdict, replace

import pytest
import timm
import torch

from hyspark.config.shared import EncoderSettings
from hyspark.figures.slices import views_panel
from hyspark.planning import trial_steps
from hyspark.tasks import contrastive_task
from hyspark.tasks.pretrain import PretrainingExperiment, initialise_pretraining, run_pretraining, untrained_modules
from hyspark.training.distributed import find_processes
from hyspark.training.run_folder import checkpoint_file

METHODS = {
    "moco": {"queue_size": 8, "momentum": 0.9},
    "byol": {"momentum": 0.9},
    "swav": {"prototypes": 6, "local_views": 1},
}


@pytest.fixture
def comparing(pretraining):
    """make(method) -> a run of seconds: axial slices, 3 steps an epoch, 2 epochs."""

    def make(method):
        return replace(
            pretraining,
            **asdict(EncoderSettings()),
            **METHODS[method],
            model=f"{method}/timm/test_resnet",
            slices="axial",
            crop_size=(64,),
            decoder_width=768,
            head_width=16,
        )

    return make


def metrics(config):
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_the_networks_own_keys_and_a_report(comparing, method, monkeypatch):
    monkeypatch.setattr(contrastive_task, "views_panel", views_panel)  # its picture is drawn
    folder = run_pretraining(replace(comparing(method), epochs=1))
    network = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    for kind in ("1kpretrained", "best"):
        path = folder / f"{method}_timm_test_resnet_{kind}_timm_style.pth"
        network.load_state_dict(torch.load(path, weights_only=True))
    assert '<img alt="views"' in (folder / "report.html").read_text()


def test_an_interrupted_run_continues_bit_for_bit(comparing, tmp_path):
    """With the momentum encoder and the queue as they were."""
    whole, parts = (replace(comparing("moco"), out=str(tmp_path / name)) for name in ("whole", "parts"))
    run_pretraining(whole)
    run_pretraining(replace(parts, max_steps=2))
    run_pretraining(replace(parts, dataloader_workers=1))
    assert [m["loss"] for m in metrics(whole) if "loss" in m] == [m["loss"] for m in metrics(parts) if "loss" in m]
    a, b = (torch.load(checkpoint_file(config), weights_only=True)["model"] for config in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    validations = [m for m in metrics(whole) if "val_loss" in m]
    assert [m["epoch"] for m in validations] == [0, 1]
    assert all(0 < m["projection_std"] <= 1 for m in validations)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_from_the_network_of_another(comparing, method, tmp_path):
    """The momentum encoder does too; heads are randomly initialised."""
    torch.manual_seed(1)
    given = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    torch.save(given.state_dict(), tmp_path / "network.pth")
    config = comparing(method)
    experiment = PretrainingExperiment(replace(config, weights=str(tmp_path / "network.pth")), find_processes("cpu"))
    assert experiment.load_weights()
    network, fresh = experiment.model, initialise_pretraining(config)
    assert all(torch.equal(value, given.state_dict()[key]) for key, value in network.encoder.weights().items())
    torch.testing.assert_close(network.project.state_dict(), fresh.project.state_dict())
    if method != "swav":
        copied = network.teacher.module.state_dict()
        own = torch.nn.Sequential(network.encoder, network.project).state_dict()
        assert all(torch.equal(value, copied[key]) for key, value in own.items())


def test_a_step_that_is_not_finite_is_repeated(comparing, tmp_path, caplog):
    config = replace(comparing("moco"), lr=1e30, clip=0.0)
    with pytest.raises(FloatingPointError, match="--replay"):
        run_pretraining(config)
    (file,) = config.run_folder.glob("nonfinite_step_*.pth")
    with caplog.at_level("INFO", "hyspark"):
        run_pretraining(replace(config, replay=str(file)))
    assert caplog.text.count(": values 0") == config.batch_size * config.crops_per_volume
    assert "not finite in fp32 either" in caplog.text


@pytest.mark.parametrize(("size", "fixed"), [(32, ["layer4"]), (64, [])])
def test_what_is_not_trained_is_named(comparing, size, fixed):
    """In a crop of one position at its stride the last stage has no map."""
    config = replace(comparing("moco"), crop_size=(size,))
    network = initialise_pretraining(config)
    assert untrained_modules(network.encoder.backbone) == fixed
    text = PretrainingExperiment(config, find_processes("cpu")).describe()["model"]
    assert ("left unchanged: layer4" in text) == bool(fixed)


def test_a_dry_run_tells_time_and_memory(comparing, caplog, monkeypatch):
    """Its smallest step has two images: heads normalise over them. What a process of its own would get is pickled."""
    config = replace(comparing("byol"), dry_run=True)

    def run_here(*args):
        return list(trial_steps.iterate_trials(*pickle.loads(pickle.dumps(args))))

    monkeypatch.setattr(trial_steps, "run_in_subprocess", run_here)
    with caplog.at_level("INFO", "hyspark"):
        run_pretraining(config)
    for word in ("network", "per step of 4 crops", "at the peak of 4 crops", "for the run, 6 steps"):
        assert word in caplog.text
    assert not config.run_folder.exists()
