"""Pre-training the network of an nnU-Net plan: axes on the way into the network and back, the run folder, its files."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import hyspark
from hyspark.config.nnunet import plan_defaults
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import as_plain
from hyspark.data.batches.volumes import ValidationCrops
from hyspark.models.weights.files import made_with
from hyspark.tasks import masked_task
from hyspark.tasks.pretrain import (
    PretrainingExperiment,
    find_pretraining_cases,
    run_pretraining,
    warnings_of_axes,
)
from hyspark.tasks.pretrain_common import to_network_input, to_volume
from hyspark.training.distributed import Processes
from hyspark.training.metrics_log import read_metrics
from hyspark.training.run_folder import checkpoint_file, encoder_file
from tests.nnunet_stand_in import ARCHITECTURE, stand_in, with_strides, write_plans

__all__ = ["stand_in"]
OWN = ("encoder_widths", "encoder_depths", "expansions", "vit_depth")


@pytest.fixture
def planned(pretraining, tmp_path, stand_in):
    """Settings of a pre-training of a plan, 2 steps an epoch; its axes are y, z, x."""
    model = f"spark/nnunet/{write_plans(tmp_path / 'plan')}"
    kept = {name: value for name, value in as_plain(pretraining).items() if name not in OWN}
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in kept.items()}
    given |= {"model": model, "batch_size": 3, "crops_per_volume": 1}
    explicit = set(given) - {"spacing", "crop_size", "axis_order", "image_channels", "intensity", "hu_min", "hu_max"}
    return type(pretraining)(**given | plan_defaults(given, explicit - {"input_mean", "input_std"}))


def losses(config):
    return [line["loss"] for line in read_metrics(config.run_folder / "metrics.jsonl") if "loss" in line]


def test_axes_into_the_network_and_back(planned):
    x, y, z = np.meshgrid(*(np.arange(n) for n in (2, 3, 4)), indexing="ij")
    volumes = torch.from_numpy((100 * x + 10 * y + z).astype(np.float32))[None, None]
    found = to_network_input(volumes, planned, torch.device("cpu"))
    assert found.shape == (1, 1, 3, 4, 2)
    assert found[0, 0, 2, 3, 1] == 123  # y, z, x
    assert torch.equal(to_volume(found, planned), volumes)
    assert torch.equal(to_volume(found[0, 0], planned), volumes[0, 0])
    assert to_network_input(volumes, replace(planned, in_channels=3), torch.device("cpu")).shape == (1, 3, 3, 4, 2)


def test_a_run_is_in_the_axes_of_the_plan_and_its_pictures_in_those_of_the_volume(planned, monkeypatch):
    drawn = []

    def panel(image, mask, result, **options):
        drawn.append((image, mask, result))
        return Figure(figsize=(0.1, 0.1))

    monkeypatch.setattr(masked_task, "reconstruction_panel", panel)
    experiment = PretrainingExperiment(planned, Processes(device=torch.device("cpu")))
    assert experiment.model.encoder.img_size == (16, 24, 20)
    assert experiment.model.encoder.patch == (2, 4, 4)
    shown = experiment.describe()
    assert (
        "crops of 20 x 16 x 24, mask units of 4 x 2 x 4; not trained by this method, left unchanged: decoder"
        in (shown["model"])
    )
    assert shown["plan"].startswith("smallPlans, 3d_fullres of Dataset042_Small; from it: spacing 7 8 9")
    _, task = experiment.set_up(None)
    folder = run_pretraining(planned)
    image, mask, result = drawn[0]
    assert image.shape == mask.shape == result.shape == (20, 16, 24)
    crops = ValidationCrops(task.validation, planned.crop_shape, planned.crops_per_volume, 0)
    expected = (crops[0]["volumes"][0, 0].numpy() * 90 + 60 + 120) / 500  # z-scores to fractions of the window
    np.testing.assert_allclose(image, expected, atol=1e-5)
    hidden_unit = mask.reshape(5, 4, 8, 2, 6, 4)
    assert (hidden_unit.all((1, 3, 5)) | ~hidden_unit.any((1, 3, 5))).all()
    assert (folder / "plans.json").is_file()


def test_a_run_continues_when_its_plan_is_gone_or_another(planned, tmp_path, caplog):
    whole = replace(planned, out=str(tmp_path / "whole"))
    run_pretraining(whole)
    run_pretraining(replace(planned, max_steps=2))
    write_plans(tmp_path / "plan", architecture=with_strides([[1, 1, 1], [2, 2, 2], [2, 2, 2]]))
    run_pretraining(replace(planned, max_steps=3))
    assert "changed since the run began, which continues with its own copy" in caplog.text
    (tmp_path / "plan" / "plans.json").unlink()
    run_pretraining(planned)
    assert "got no file; the run continues with its own copy" in caplog.text
    assert losses(planned) == losses(whole)
    assert len(losses(planned)) == 4


def test_views_are_in_the_axes_of_the_plan_and_the_momentum_encoder_is_its_own(planned):
    pytest.importorskip("lightly")
    default = PretrainConfig.decoder_width
    model = planned.model.replace("spark", "byol")
    views = replace(planned, model=model, decoder_width=default, head_width=16, max_steps=1)
    experiment = PretrainingExperiment(views, Processes(device=torch.device("cpu")))
    siamese = experiment.model
    crop = torch.randn(2, 1, 16, 24, 20)
    before = siamese.teacher.eval()(crop)
    with torch.no_grad():
        for parameter in siamese.encoder.parameters():
            parameter.mul_(3)
    assert torch.equal(siamese.teacher(crop), before)
    run_pretraining(views)
    assert encoder_file(views).name == "byol_nnunet_3d_fullres_1kpretrained_timm_style.pth"
    assert len(losses(views)) == 1


def test_files_in_another_order_of_axes_are_named(phantoms, tmp_path):
    case = find_pretraining_cases(PretrainConfig(data=str(phantoms)))[0][0]
    image = nib.load(case.image)
    found = []
    for name, turned in (("a", image), ("b", image.as_reoriented([[1, 1], [0, -1], [2, 1]]))):
        nib.save(turned, tmp_path / f"{name}.nii.gz")
        found.append(replace(case, name=name, image=tmp_path / f"{name}.nii.gz"))
    plain = [np.argmax(np.abs(nib.load(one.image).affine[:3, :3]), axis=0).tolist() == [0, 1, 2] for one in found]
    assert plain.count(True) == 1
    (line,) = warnings_of_axes(found)
    assert line.startswith(f"1 of 2 files store their axes in another order than x, y, z ({'ab'[plain.index(False)]});")
    assert warnings_of_axes([found[plain.index(True)]]) == []


def test_files_say_what_they_were_made_with(planned):
    run_pretraining(planned)
    for file in (encoder_file(planned), checkpoint_file(planned)):
        content = torch.load(file, weights_only=True)
        known = made_with(content)
        assert (known["axis_order"], known["spacing"], known["input_mean"]) == ([1, 2, 0], [7.0, 8.0, 9.0], [60.0])
        assert content["nnunet_plans"]["configurations"]["3d_fullres"]["architecture"] == ARCHITECTURE
    assert encoder_file(planned).name == "spark_nnunet_3d_fullres_1kpretrained_timm_style.pth"
    assert "out" not in made_with(torch.load(encoder_file(planned), weights_only=True))


def test_weights_of_a_run_begin_another(planned, tmp_path, caplog):
    run_pretraining(replace(planned, epochs=1))
    following = replace(planned, out=str(tmp_path / "next"), weights=str(encoder_file(planned)))
    model = PretrainingExperiment(following, Processes(device=torch.device("cpu")))
    report = model.load_weights()
    assert report.matched
    assert "was made with" not in caplog.text
    wanted = torch.load(encoder_file(planned), weights_only=True)["model"]
    assert all(torch.equal(x, wanted[name]) for name, x in model.model.encoder.backbone.state_dict().items())
    other = replace(following, axis_order=(), crop_size=(16,), out=str(tmp_path / "other"))
    PretrainingExperiment(other, Processes(device=torch.device("cpu"))).load_weights()
    assert "was made with arrays of axes y z x, this run has x y z" in caplog.text


def test_from_python(planned, phantoms, tmp_path):
    run = hyspark.pretrain(
        data=phantoms,
        out=tmp_path / "python",
        model=planned.model,
        batch_size=2,
        crops_per_volume=1,
        decoder_width=16,
        epochs=1,
        max_steps=1,
        warmup_epochs=0,
        device="cpu",
        dataloader_workers=0,
        prepare_workers=1,
        picture_every=0,
    )
    known = made_with(torch.load(run.weights, weights_only=True))
    assert (known["crop_size"], known["intensity"]) == ([20, 16, 24], ["ct-zscore"])
