"""Classification: it learns, continues as if nothing had happened, freezes and averages as promised, scores once."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hyspark.cli import main
from hyspark.evaluation.classification.inference import load_classifier
from hyspark.models.classifier import build_classifier, get_head, layer_indices
from hyspark.tasks.classification import initialise_classifier, make_optimizer, run_classification
from hyspark.training.labelled_images import read_images
from hyspark.training.optim import LR_RATIO, set_lr_and_decay


@pytest.fixture
def config(classifying):
    """A run that takes seconds: 2 steps an epoch, 2 epochs."""
    return classifying


def metrics(config):
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(config):
    return [m["loss"] for m in metrics(config) if "loss" in m]


def state_of(config, name="last.pth"):
    return torch.load(config.run_folder / name, weights_only=True)


def summary_of(config, name="scores"):
    return json.loads((config.run_folder / name / "summary.json").read_text())


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.curves
def test_it_learns_and_leaves_a_run(classifying_drawn):
    config = replace(classifying_drawn, epochs=20, lr=1e-2, val_every=5)
    folder = run_classification(config)
    for name in ("config.yaml", "best.pth", "last.pth", "report.html", "scores/cases.csv", "scores_test/cases.csv"):
        assert (folder / name).is_file(), name
    assert np.mean(losses(config)[-4:]) < 0.5 * np.mean(losses(config)[:4])
    assert summary_of(config)["metrics"]["auc"] > 0.9
    assert summary_of(config, "scores_test")["metrics"]["accuracy"] > 0.8
    assert [m["epoch"] for m in metrics(config) if "accuracy" in m] == [4, 9, 14, 19]
    protocol = summary_of(config)["protocol"]
    assert protocol["selection"] == "weights chosen by the accuracy on these same images, which is optimistic"
    assert "validation images" in summary_of(config, "scores_test")["protocol"]["selection"]
    best = max(m["accuracy"] for m in metrics(config) if "accuracy" in m)
    first = next(m["step"] for m in metrics(config) if m.get("accuracy") == best)
    assert protocol["weights"] == f"best.pth after {first + 1} steps"
    assert summary_of(config)["metrics"]["accuracy"] == best
    page = (folder / "report.html").read_text()
    assert "predicted light" in page
    assert ("Most confident mistakes" in page) == any(
        (folder / n / "mistakes.png").exists() for n in ("scores", "scores_test")
    )
    assert "Test images, best weights" in page


@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "ema_decay": 0.9,
            "mixup": 0.2,
            "cutmix": 1.0,
            "label_smoothing": 0.1,
            "drop_path": 0.3,
            "optimizer": "adamw",
            "layer_decay": 0.7,
            "lrschedule": "warmup_cosine",
            "freeze_epochs": 1,
        },
    ],
    ids=["plain", "everything"],
)
def test_an_interrupted_run_continues_as_if_nothing_had_happened(config, tmp_path, more):
    config = replace(config, **more)
    whole, parts = (replace(config, out=str(tmp_path / name)) for name in ("whole", "parts"))
    run_classification(whole)
    run_classification(replace(parts, max_steps=1))
    torch.manual_seed(5)  # what a process has drawn before is not to matter
    run_classification(replace(parts, max_steps=3, dataloader_workers=1))
    run_classification(parts)
    assert losses(whole) == losses(parts)
    for key in ("model", "average") if more else ("model",):
        assert same(*(state_of(c)[key] for c in (whole, parts)))
    if more:
        state = state_of(whole)
        assert not same(state["average"], state["model"])


def test_the_average_is_what_is_kept(config):
    config = replace(config, ema_decay=0.9, epochs=1)
    run_classification(config)
    assert same(state_of(config, "best.pth")["model"], state_of(config)["average"])
    assert "moving average" in summary_of(config)["protocol"]["weights"]


def test_the_average_follows_every_step(config):
    """timm's warm-up of the decay after steps 1 and 2 is 0 and 1 - 2 ** (-2 / 3)."""
    config = replace(config, ema_decay=0.9, epochs=1)
    run_classification(replace(config, max_steps=1))
    first = state_of(config)
    assert same(first["average"], first["model"])
    run_classification(config)
    second = state_of(config)
    decay = 1 - 2 ** (-2 / 3)
    expected = decay * first["model"]["fc.weight"] + (1 - decay) * second["model"]["fc.weight"]
    torch.testing.assert_close(second["average"]["fc.weight"], expected)


def test_a_frozen_backbone_stays_but_for_its_batch_norms(config):
    start = {k: v.clone() for k, v in initialise_classifier(config, 2).state_dict().items()}
    config = replace(config, freeze_epochs=1)
    run_classification(replace(config, max_steps=2))
    frozen = state_of(config)["model"]
    norms = {key for key in start if ".bn" in key or key.startswith("bn") or key.endswith("running_mean")}
    moved = {key for key in start if not torch.equal(start[key], frozen[key])}
    assert {"fc.weight", "fc.bias", "layer1.0.bn1.weight", "layer1.0.bn1.running_mean"} <= moved
    assert not {key for key in moved if "conv" in key and start[key].ndim == 4}
    assert norms & moved
    run_classification(config)
    thawed = state_of(config)["model"]
    assert not torch.equal(frozen["layer1.0.conv1.weight"], thawed["layer1.0.conv1.weight"])


def test_scores_are_made_once_and_again_where_they_are_missing(config):
    run_classification(config)
    paths = [config.run_folder / name / "summary.json" for name in ("scores", "scores_test")]
    before = [path.stat().st_mtime_ns for path in paths]
    run_classification(config)
    assert [path.stat().st_mtime_ns for path in paths] == before
    first = summary_of(config, "scores_test")
    paths[1].unlink()
    run_classification(config)
    assert summary_of(config, "scores_test") == first
    assert first["protocol"]["num_images"] == 6


def test_images_of_another_folder_are_scored_in_place_of_the_test_part(config, write_images, tmp_path):
    write_images(tmp_path / "more", {"dark": 2, "light": 1}, 3)
    config = replace(config, epochs=1, test_dir=str(tmp_path / "more"))
    run_classification(config)
    protocol = summary_of(config, "scores_test")["protocol"]
    assert (protocol["images"], protocol["num_images"]) == (str(tmp_path / "more"), 3)
    (tmp_path / "more" / "dark" / "00.png").rename(tmp_path / "more" / "light" / "99.png")
    run_classification(config)
    with (config.run_folder / "scores_test" / "cases.csv").open() as file:
        found = {row["file"]: row["truth"] for row in csv.DictReader(file)}
    assert found == {"dark/01.png": "dark", "light/00.png": "light", "light/99.png": "light"}
    with pytest.raises(FileNotFoundError, match="nothing: expected a folder that holds"):
        run_classification(replace(config, test_dir="nothing"))


def test_fewer_labels_and_pretrained_weights(config, tmp_path):
    weights = tmp_path / "own.pth"
    torch.save(initialise_classifier(replace(config, seed=7), 2).state_dict(), weights)
    small = replace(config, label_fraction=0.25, weights=str(weights), lr=1e-9, weight_decay=0.0)
    run_classification(replace(small, epochs=1))
    assert len(losses(small)) == 1  # 4 of 16 images
    given = torch.load(weights, weights_only=True)
    torch.testing.assert_close(state_of(small)["model"]["conv1.0.weight"], given["conv1.0.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_last_layer_starts_fresh_where_the_weights_have_none_that_fits(config, tmp_path, num_classes):
    """A pre-trained backbone, and a classifier of other classes."""
    weights = tmp_path / "other.pth"
    given = build_classifier("timm/test_resnet", 1, num_classes).state_dict()
    torch.save(given, weights)
    config = replace(config, weights=str(weights), lr=1e-9, weight_decay=0.0, epochs=1)
    run_classification(config)
    found, fresh = state_of(config)["model"], initialise_classifier(config, 2).state_dict()
    torch.testing.assert_close(found["conv1.0.weight"], given["conv1.0.weight"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["fc.weight"], fresh["fc.weight"], rtol=0, atol=1e-6)


def test_other_images_or_settings_do_not_continue_a_run(config, image_data):
    run_classification(replace(config, max_steps=1))
    with pytest.raises(ValueError, match="num_labelled: was 0, is 4"):
        run_classification(replace(config, num_labelled=4))
    extra = image_data / "train" / "dark" / "99.png"
    Image.new("L", (40, 36)).save(extra)
    try:
        with pytest.raises(ValueError, match=r"begun on other data(.|\n)*was 16 training .* is 17 training"):
            run_classification(config)
    finally:
        extra.unlink()


def test_unreadable_images_stop_the_run_or_are_excluded(config, image_data):
    broken = image_data / "val" / "dark" / "broken.png"
    broken.write_bytes(b"no image")
    try:
        with pytest.raises(
            ValueError, match=r"1 of 31 images are unreadable; .*on_bad_case skip(.|\n)*broken\.png: no image"
        ):
            run_classification(config)
        assert not config.run_folder.exists()
        run_classification(replace(config, on_bad_case="skip", max_steps=1))
    finally:
        broken.unlink()
    assert state_of(config)["left_out"] == ["val/dark/broken.png"]
    assert "val/dark/broken.png" in (config.run_folder / "report.html").read_text()


def test_an_image_in_two_parts_is_named(config, image_data, caplog):
    read_images(config)
    assert "pixel for pixel" not in caplog.text
    original, *_ = sorted((image_data / "train" / "dark").iterdir())
    twin = image_data / "val" / "dark" / "twin.bmp"
    try:
        Image.open(original).save(twin)
        read_images(config)
    finally:
        twin.unlink()
    assert "1 times an image is in two parts, pixel for pixel" in caplog.text
    assert f"train/dark/{original.name} and val/dark/twin.bmp" in caplog.text


def test_a_dry_run_writes_nothing(config):
    run_classification(replace(config, dry_run=True))
    assert not config.run_folder.exists()


def test_pairs_to_mix_are_needed_in_each_process(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each process has 3 images"):
        run_classification(replace(config, batch_size=6, mixup=0.1))


# The network and its optimizer


def test_layers_are_counted_from_the_input():
    own = layer_indices(build_classifier("timm/test_resnet", 1, 2))
    assert own["conv1.0.weight"] == 0
    assert own["layer4.0.conv1.weight"] == max(v for v in own.values() if v is not None) == 4
    assert own["fc.weight"] is own["fc.bias"] is None
    other = layer_indices(build_classifier("torchvision/resnet18", 3, 5))
    assert [other[f"{name}.weight"] for name in ("conv1", "bn1", "layer1.0.conv1", "layer1.1.bn2")] == [0, 0, 1, 2]
    assert other["layer4.1.conv2.weight"] == 8
    assert other["fc.weight"] is None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_resnet"])
def test_a_transformer_takes_images_of_the_runs_size(name):
    assert build_classifier(f"timm/{name}", 1, 2, img_size=64).eval()(torch.rand(1, 1, 64, 64)).shape == (1, 2)


def test_networks_by_name():
    assert get_head(build_classifier("torchvision/squeezenet1_0", 3, 5)).out_channels == 5
    with torch.device("meta"):
        own = layer_indices(build_classifier("timm/deit_tiny_distilled_patch16_224", 3, 5))
    assert {name for name, layer in own.items() if layer is None} == {
        f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="timm has no such network; did you mean timm/test_resnet"):
        build_classifier("timm/test_resne", 3, 2)
    with pytest.raises(ValueError, match="expected channels=3 and drop_path=0"):
        build_classifier("torchvision/resnet18", 1, 2)
    with pytest.raises(ValueError, match="auxiliary classifiers"):
        build_classifier("torchvision/googlenet", 3, 2)
    with pytest.raises(ValueError, match=r"timm/vgg11 cannot be built with drop_path=0\.1"):
        build_classifier("timm/vgg11", 3, 2, drop_path=0.1)


def test_decay_is_in_the_gradient_of_all_weights_or_apart_from_it(config):
    network = initialise_classifier(config, 2)
    names = {id(p): name for name, p in network.named_parameters()}
    adam = make_optimizer(config, network)
    set_lr_and_decay(adam, lr=1.0, wd=0.5)
    assert type(adam) is torch.optim.Adam
    assert {group["weight_decay"] for group in adam.param_groups} == {0.5}
    adamw = make_optimizer(replace(config, optimizer="adamw", layer_decay=0.5, encoder_lr_ratio=0.1), network)
    set_lr_and_decay(adamw, lr=1.0, wd=0.5)
    assert type(adamw) is torch.optim.AdamW
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in adamw.param_groups for p in g["params"]}
    assert set(found) == set(names.values())
    assert found["fc.weight"] == (1.0, 0.5)
    assert found["fc.bias"] == (1.0, 0.0)
    assert found["layer4.0.conv1.weight"] == pytest.approx((0.1 * 0.5, 0.5))
    assert found["conv1.0.weight"] == pytest.approx((0.1 * 0.5**5, 0.5))
    loaded = replace(config, optimizer="adamw", encoder_lr_ratio=0.1, pretrained_lr_ratio=0.2, weights="a.pth")
    assert sorted({g[LR_RATIO] for g in make_optimizer(loaded, network).param_groups}) == pytest.approx([0.02, 1.0])


# The trained network on other images


def test_images_without_classes_get_probabilities_and_those_with_get_scores(config, image_data, tmp_path, capsys):
    run_classification(config)
    main.main(
        ["classify", str(config.run_folder), str(image_data / "val"), "--out", str(tmp_path / "val"), "--device", "cpu"]
    )
    assert "on 8 images" in capsys.readouterr().out
    scored = json.loads((tmp_path / "val" / "summary.json").read_text())
    assert scored["metrics"] == summary_of(config)["metrics"]
    # No folder of a class there, so that nothing is known of the truth.
    main.main(["classify", str(config.run_folder), str(image_data / "val" / "light"), "--out", str(tmp_path / "new")])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"predictions.csv"}
    with (tmp_path / "new" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (config.run_folder / "scores" / "cases.csv").open() as file:
        known = {row["file"]: row["probability of light"] for row in csv.DictReader(file)}
    assert [row["file"] for row in rows] == ["00.png", "01.png", "02.png", "03.png"]
    for row in rows:
        assert float(row["probability of light"]) == pytest.approx(float(known[f"light/{row['file']}"]), abs=1e-5)
        assert (row["predicted"] == "light") == (float(row["probability of light"]) > 0.5)


def test_files_that_are_no_classifier(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no best\.pth"):
        load_classifier(tmp_path)
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: expected a fine-tuned network for classification"):
        load_classifier(tmp_path / "x.pth")
