import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from monai.networks.nets import SegResNet

import hyspark
from hyspark.config.shared import EncoderSettings
from hyspark.data.datasets import datalist_json
from hyspark.data.datasets.data_folder import read_data_folder
from hyspark.evaluation.linear_probe import ProbeCases, find_probe_cases, make_probe, probe_encoder
from hyspark.figures.panels import reconstruction_panel
from hyspark.tasks import masked_task
from hyspark.tasks.launch import load_state
from hyspark.tasks.masked_task import MaskedTask
from hyspark.tasks.pretrain import (
    PretrainingExperiment,
    find_pretraining_cases,
    initialise_pretraining,
    run_pretraining,
)
from hyspark.training import loop
from hyspark.training.distributed import Processes
from hyspark.training.metrics_log import is_valid_line
from hyspark.training.run_folder import checkpoint_file, encoder_file


def metrics(config):
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(config):
    return [m["loss"] for m in metrics(config) if "loss" in m]


def weights(config):
    return torch.load(checkpoint_file(config), weights_only=True)["model"]


@pytest.mark.curves
def test_a_run_folder_holds_what_is_promised(pretraining):
    folder = run_pretraining(pretraining)
    for name in ("config.yaml", "metrics.jsonl", "report.html", "tensorboard", "pictures"):
        assert (folder / name).exists(), name
    steps = [m for m in metrics(pretraining) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(6))
    assert [m["epoch"] for m in steps] == [0, 0, 0, 1, 1, 1]
    expected = {"step", "epoch", "loss", "lr", "wd", "grad_norm", "samples_per_second", "data_wait"}
    assert all(set(m) == expected and 0 <= m["data_wait"] <= 1 for m in steps)
    validations = [m for m in metrics(pretraining) if "val_loss" in m]
    assert [m["step"] for m in validations] == [2, 5]
    assert list((folder / "pictures").glob("epoch_0001_*.png"))
    assert "HySparK pre-training" in (folder / "report.html").read_text()
    assert encoder_file(pretraining).name == "hyspark_1kpretrained_timm_style.pth"
    assert checkpoint_file(pretraining).name == "hyspark_withdecoder_1kpretrained_hyspark_style.pth"


def test_the_encoder_file_loads_into_segmentation(pretraining):
    run_pretraining(replace(pretraining, epochs=1))
    shape = {"widths": pretraining.encoder_widths, "depths": (1,) * 5, "expansions": (2,) * 5, "vit_depth": 1}
    model = hyspark.build_hybird(1, 4, 32, **shape)
    report = hyspark.load_pretrained(model, encoder_file(pretraining))
    assert all(key.startswith("decoder.") for key in report.missing)
    assert not report.unexpected
    full = hyspark.load_pretrained(hyspark.build_hybird(1, 4, 32, **shape), checkpoint_file(pretraining))
    assert full.matched == report.matched


def test_the_loss_falls(pretraining):
    config = replace(pretraining, epochs=24, lr=3e-3, warmup_epochs=1)
    run_pretraining(config)
    values = losses(config)
    assert sum(values[-6:]) / 6 < 0.95 * sum(values[:3]) / 3


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_an_interrupted_run_continues_as_if_nothing_had_happened(pretraining, tmp_path, fraction):
    whole = replace(pretraining, out=str(tmp_path / "whole"), reconstruct_fraction=fraction)
    parts = replace(whole, out=str(tmp_path / "parts"))
    run_pretraining(whole)
    run_pretraining(replace(parts, max_steps=2))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # what a killed run may leave behind
        file.write('{"step": 2, "epoch": 0, "loss": 99.0}\n{"step": 3, "ep')
    run_pretraining(replace(parts, dataloader_workers=2))
    assert losses(whole) == losses(parts)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_run_is_left_alone(pretraining):
    config = replace(pretraining, epochs=1)
    run_pretraining(config)
    before = checkpoint_file(config).stat().st_mtime_ns
    run_pretraining(config)
    assert checkpoint_file(config).stat().st_mtime_ns == before


def test_another_run_is_not_continued_by_mistake(pretraining):
    run_pretraining(replace(pretraining, max_steps=1))
    with pytest.raises(ValueError, match=r"mask_ratio: was 0\.75, is 0\.5"):
        run_pretraining(replace(pretraining, mask_ratio=0.5))


def test_another_data_list_is_not_continued_by_mistake(pretraining, phantoms, tmp_path):
    listed = datalist_json.read_datalist(phantoms / "dataset.json")
    path = tmp_path / "list.json"
    datalist_json.write_datalist(listed, path)
    config = replace(pretraining, data=str(path), store_dir=str(phantoms / "prepared"), max_steps=1)
    run_pretraining(config)
    datalist_json.write_datalist(replace(listed, training=listed.training[1:]), path)
    with pytest.raises(ValueError, match=r"data: was 6 training and 1 validation cases .*, is 5 training and 1"):
        run_pretraining(config)


def test_weights_that_are_not_there_are_noticed_before_preparation(pretraining, tmp_path):
    config = replace(pretraining, weights="nowhere.pth", store_dir=str(tmp_path / "store"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        run_pretraining(config)
    assert not (tmp_path / "store").exists()


def test_validation_does_not_depend_on_the_seed(pretraining, tmp_path):
    def held_out(seed):
        config = replace(pretraining, seed=seed, out=str(tmp_path / str(seed)))
        return [c.name for c in find_pretraining_cases(config)[1]]

    assert held_out(0) == held_out(1)


def test_resume_from_takes_another_runs_state_and_init_weight_only_its_weights(pretraining, tmp_path):
    first = replace(pretraining, out=str(tmp_path / "first"), max_steps=3)
    run_pretraining(first)
    source = str(checkpoint_file(first))
    resumed = replace(pretraining, out=str(tmp_path / "resumed"), resume_from=source, max_steps=4)
    run_pretraining(resumed)
    assert [m["step"] for m in metrics(resumed) if "loss" in m] == [3]
    started = replace(pretraining, out=str(tmp_path / "started"), weights=source, max_steps=1)
    run_pretraining(started)
    assert [m["step"] for m in metrics(started) if "loss" in m] == [0]
    fresh = replace(pretraining, out=str(tmp_path / "fresh"), max_steps=1)
    run_pretraining(fresh)
    assert losses(started) != losses(fresh)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_cases(pretraining, monkeypatch):
    original = MaskedTask.loss
    calls = []

    def broken(self, run, batch):
        calls.append(batch["cases"])
        return original(self, run, batch) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(MaskedTask, "loss", broken)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4 \(cases .*(trunk|phantom)_\d+"):
        run_pretraining(pretraining)
    state = torch.load(checkpoint_file(pretraining), weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    with pytest.raises(FloatingPointError, match="gradient norm is inf at step 7"):
        loop.check_finite("gradient norm", math.inf, 7, {"cases": ["a", "a", "b"]}, Processes(torch.device("cpu")))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train_on_the_cpu(pretraining, precision):
    config = replace(pretraining, precision=precision, max_steps=2)
    run_pretraining(config)
    assert all(math.isfinite(v) for v in losses(config))


def test_non_cubic_crops_train(pretraining):
    config = replace(pretraining, crop_size=(32, 16, 48), max_steps=1)
    run_pretraining(config)
    assert len(losses(config)) == 1


def test_a_third_party_network_is_trained_on_slices_and_continues(pretraining, tmp_path, monkeypatch):
    """The files bear its name, the exported one its own keys; an interrupted run is the same run."""
    monkeypatch.setattr(masked_task, "reconstruction_panel", reconstruction_panel)  # pictures of slices are drawn
    slices = {"model": "spark/timm/test_resnet", "slices": "coronal", "slice_stride": 2, "slice_scaling": "minmax"}
    config = replace(
        pretraining,
        **asdict(EncoderSettings()),
        **slices,
        in_channels=3,
        crop_size=(64,),
        mask_ratio=0.6,
        decoder_width=32,
    )
    whole, parts = (replace(config, epochs=1, out=str(tmp_path / name)) for name in ("whole", "parts"))
    folder = run_pretraining(whole)
    run_pretraining(replace(parts, max_steps=1))
    run_pretraining(parts)
    assert losses(whole) == losses(parts)
    report = timm.create_model("test_resnet").load_state_dict(
        torch.load(folder / "spark_timm_test_resnet_1kpretrained_timm_style.pth", weights_only=True), strict=False
    )
    assert set(report.missing_keys) == {"fc.weight", "fc.bias"}
    assert report.unexpected_keys == []
    assert list((folder / "pictures").glob("*.png"))


def test_a_third_party_network_starts_from_weights(pretraining, tmp_path, caplog):
    """From its backbone alone, whatever its head, or with the decoder too."""
    slices = {"model": "spark/timm/resnet10t", "slices": "axial", "in_channels": 3, "crop_size": (64,)}
    config = replace(pretraining, **asdict(EncoderSettings()), **slices, decoder_width=32)
    other = initialise_pretraining(replace(config, seed=1))
    head = {"fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}
    torch.save({"state_dict": other.encoder.weights() | head}, tmp_path / "backbone.pth")
    torch.save({"model": other.state_dict(), "step": 7}, tmp_path / "all.pth")
    for name, keys in (("backbone.pth", other.encoder.state_dict()), ("all.pth", other.state_dict())):
        experiment = PretrainingExperiment(
            replace(config, weights=str(tmp_path / name)), Processes(torch.device("cpu"))
        )
        with caplog.at_level("INFO"):
            assert load_state(experiment.config, experiment) is None
        model = experiment.model
        own = model.encoder.state_dict() if name == "backbone.pth" else model.state_dict()
        assert own.keys() == keys.keys()
        assert all(torch.equal(own[key], keys[key]) for key in keys)
    assert "fc.weight, fc.bias: head of the file's network, not part of this model" in caplog.text
    torch.save({"conv1.0.weight": torch.zeros(24, 3, 3, 3)}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"cut\.pth: no values for \d+ keys of the network, its head aside"):
        run_pretraining(replace(config, weights=str(tmp_path / "cut.pth")))


def test_volumes_may_train_a_network_of_monai(pretraining):
    shape = asdict(EncoderSettings())  # of hyspark's own encoder
    folder = run_pretraining(
        replace(pretraining, **shape, model="spark/monai/segresnet", decoder_width=16, epochs=1, crops_per_volume=1)
    )
    SegResNet(3, 16, 1).load_state_dict(
        torch.load(folder / "spark_monai_segresnet_best_timm_style.pth", weights_only=True), strict=True
    )


THICK_NETWORK = """
import hyspark
from monai.networks.nets import DynUNet


def run(net, x):
    x = net.input_block(x)
    for layer in net.downsamples:
        x = layer(x)
    return net.bottleneck(x)


def make(in_channels, axes):
    strides = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1)]
    net = DynUNet(axes, in_channels, 2, [3] * 4, strides, strides[1:], filters=[4, 6, 8, 10])
    return hyspark.Backbone(net, run)
"""


def test_a_network_of_unequal_strides_is_trained_and_continues(pretraining, tmp_path, monkeypatch):
    """That of a factory: an interrupted run is the same run, and the file loads into the network."""
    monkeypatch.setattr(masked_task, "reconstruction_panel", reconstruction_panel)
    (tmp_path / "thick_factory.py").write_text(THICK_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"model": "spark/thick_factory:make", "mask_unit": (4, 4, 2), "crop_size": (16, 32, 8)}
    config = replace(pretraining, **asdict(EncoderSettings()), **options, epochs=1)
    whole, parts = (replace(config, out=str(tmp_path / name)) for name in ("whole", "parts"))
    folder = run_pretraining(whole)
    run_pretraining(replace(parts, max_steps=1))
    run_pretraining(parts)
    assert losses(whole) == losses(parts)
    network = sys.modules["thick_factory"].make(1, 3).network
    network.load_state_dict(torch.load(encoder_file(whole), weights_only=True), strict=True)
    assert list((folder / "pictures").glob("*.png"))


def test_no_data_list_says_how_to_make_one(pretraining, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"list\.json; make it by: hyspark datalist --data"):
        run_pretraining(replace(pretraining, data=str(tmp_path / "list.json")))
    with pytest.raises(FileNotFoundError, match=r"expected DatasetXXX_Name/imagesTr.* found no image"):
        run_pretraining(replace(pretraining, data=str(tmp_path)))


def test_torn_metrics_lines_are_dropped():
    assert is_valid_line('{"step": 1}', 2, True)
    assert not is_valid_line('{"step": 2}', 2, True)
    assert is_valid_line('{"step": -1}', 2, True)
    assert not is_valid_line('{"step": -1}', 0, True)
    assert not is_valid_line('{"step": 1, "lo', 2, True)


def test_metrics_of_a_validation_that_is_repeated_are_dropped():
    assert is_valid_line('{"step": 1, "loss": 1}', 2, False)
    assert not is_valid_line('{"step": 1, "val_loss": 1}', 2, False)
    assert is_valid_line('{"step": 0, "val_loss": 1}', 2, False)
    assert is_valid_line('{"step": -1, "probe_dice": 1}', 1, False)


@pytest.fixture
def probing(pretraining, phantoms):
    """The pre-training of these tests with a probe on two labelled phantoms."""
    labelled = str(phantoms / "Dataset900_PhantomLabelled")
    return replace(pretraining, probe_data=labelled, probe_cases=2, store_dir=str(phantoms / "prepared"))


def probes(config):
    return [m for m in metrics(config) if "probe_dice" in m]


def test_a_probe_is_taken_before_the_first_step_and_with_the_epochs(probing):
    config = replace(probing, epochs=4, probe_every=2)
    folder = run_pretraining(config)
    taken = probes(config)
    assert [(m["step"], m["epoch"]) for m in taken] == [(-1, 0), (2, 0), (8, 2), (11, 3)]
    for line in taken:
        assert line["probe_dice"] == pytest.approx(sum(line["probe"].values()) / len(line["probe"]))
        assert "background" not in line["probe"]
        assert "liver" in line["probe"]
    assert len({m["probe_dice"] for m in taken}) == 4
    # As in a run: with another memory format other kernels round otherwise.
    fresh, trained = (initialise_pretraining(config).to(memory_format=torch.channels_last_3d).encoder for _ in range(2))
    assert taken[0]["probe"] == probe_encoder(fresh, probe_of(config))
    trained.load_state_dict(torch.load(folder / "hyspark_1kpretrained_timm_style.pth", weights_only=True))
    assert taken[-1]["probe"] == probe_encoder(trained, probe_of(config))


def probe_of(config):
    cases = find_probe_cases(Path(config.probe_data), config.probe_cases)
    return make_probe(config, Processes(torch.device("cpu")), cases)


def test_an_unreadable_case_of_the_probe_stops_the_run_or_is_excluded(probing, tmp_path, caplog):
    data = shutil.copytree(probing.probe_data, tmp_path / "Dataset901_Probe")
    one, two, three = read_data_folder(data).cases
    two.image.write_bytes(b"no volume")
    config = replace(probing, probe_data=str(data), store_dir=str(tmp_path / "store"))
    cases = ProbeCases([one, two], [three], {})
    processes = Processes(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"1 of 3 volumes are unusable; .* --on_bad_case skip"):
        make_probe(config, processes, cases)
    probe = make_probe(replace(config, on_bad_case="skip"), processes, cases)
    assert len(probe.fit) == len(probe.score) == 2
    assert f"1 of 3 cases were not used by the linear probe:\n  {two.name}: {two.image}" in caplog.text
    with pytest.raises(ValueError, match="1 of 2 volumes are unusable"):
        make_probe(replace(config, on_bad_case="skip"), processes, ProbeCases([two], [three], {}))


def test_a_run_with_a_probe_and_one_without_are_the_same(pretraining, probing, tmp_path):
    without = replace(pretraining, out=str(tmp_path / "without"))
    run_pretraining(without)
    assert not probes(without)
    run_pretraining(probing)
    assert len(probes(probing)) == 3
    assert losses(probing) == losses(without)
    a, b = weights(probing), weights(without)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_run_probes_as_an_uninterrupted_one(probing, tmp_path):
    whole = replace(probing, out=str(tmp_path / "whole"))
    parts = replace(probing, out=str(tmp_path / "parts"))
    run_pretraining(whole)
    parts.run_folder.mkdir()
    # What a run killed before its first checkpoint leaves behind; and a probe may come and go between the parts.
    (parts.run_folder / "metrics.jsonl").write_text('{"step": -1, "epoch": 0, "probe_dice": 9.0, "probe": {}}\n')
    run_pretraining(replace(parts, max_steps=3))
    run_pretraining(replace(parts, max_steps=4, probe_data=""))
    run_pretraining(replace(parts, probe_every=2))
    assert probes(whole) == probes(parts)
    assert losses(whole) == losses(parts)


def test_probe_data_that_does_not_fit_is_noticed_before_preparation(probing, tmp_path):
    config = replace(probing, store_dir=str(tmp_path / "store"), probe_cases=9)
    with pytest.raises(ValueError, match=r"probe_cases is 9, but .* has \d labelled training cases"):
        run_pretraining(config)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        run_pretraining(replace(config, probe_data=str(tmp_path / "nowhere")))
    assert not (tmp_path / "store").exists()
