"""Encoders of every kind of file: pre-trained, fine-tuned, third-party; what they say of their preparation."""

from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from monai.networks.nets import SegResNet

import hyspark
from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import as_plain
from hyspark.config.segmentation import SegmentationConfig
from hyspark.evaluation.embedding.networks import NetworkChoice, load_embedding_network
from hyspark.evaluation.segmentation.inference import hybird_from_config
from hyspark.models.hub_networks import Encoder, Segmenter
from hyspark.models.nnunet_network import build_from_plan
from hyspark.models.nnunet_plans import read_plan
from tests.conftest import SMALL
from tests.evaluation.embedding.small import SHAPES, small_encoder, write_weights
from tests.nnunet_stand_in import stand_in, write_plans  # noqa: F401

CROP = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))


def maps_of(choice):
    network = load_embedding_network(choice)
    with torch.no_grad():
        return network, network.encoder(CROP)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_exported_weights_name_all(tmp_path):
    network, maps = maps_of(NetworkChoice(write_weights(tmp_path / "a.safetensors")))
    with torch.no_grad():
        assert_same(maps, small_encoder()(CROP))
    assert network.settings.spacing == (4, 4, 4)
    assert network.window == (32, 32, 32)
    strides = [1, 2, 4, 8, 16]
    assert network.stages == [(c, (s,) * 3) for c, s in zip((6, 12, 12, 24, 24), strides, strict=True)]


def test_the_released_format_is_read_by_its_shapes(tmp_path, caplog):
    torch.save(small_encoder().state_dict(), tmp_path / "released.pth")
    _, maps = maps_of(NetworkChoice(tmp_path / "released.pth", window=(32,)))
    with torch.no_grad():
        assert_same(maps, small_encoder()(CROP))
    assert "does not say how its volumes were prepared; taken: spacing 1.5 1.5 1.5; intensity ct" in caplog.text


@pytest.mark.slow
def test_a_run_folder_of_pretraining_is_read(pretraining):
    run = hyspark.pretrain(**asdict(pretraining) | {"max_steps": 1})
    network = load_embedding_network(NetworkChoice(run.folder))
    assert network.settings.spacing == (8, 8, 8)
    expected = torch.load(run.weights, weights_only=True)
    expected = expected.get("model", expected)
    for key, value in network.encoder.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_the_encoder_of_a_fine_tuned_network_is_that_network_s(tmp_path):
    config = SegmentationConfig(data="x", out="y", crop_size=(32,), hu_min=-100.0, **SMALL)
    torch.manual_seed(1)
    trained = hybird_from_config(config, 3).eval()
    contents = {"model": trained.state_dict(), "config": as_plain(config), "classes": ["background", "a", "b"]}
    torch.save(contents, tmp_path / "best.pth")
    network, maps = maps_of(NetworkChoice(tmp_path))
    with torch.no_grad():
        *skips, deepest = trained.embeddings(CROP)
        assert_same(maps, [*skips, trained.mae(deepest)])
    assert (network.settings.hu_min, network.settings.spacing) == (-100, (8, 8, 8))
    other = load_embedding_network(NetworkChoice(tmp_path, window=(48,)))  # positions of another window
    assert other.encoder.state_dict()["mae.pos_embed"].shape[1] == 27


def test_a_third_party_network_is_named_by_the_flag_or_its_run(tmp_path):
    torch.manual_seed(2)
    trained = SegResNet(3, 16, 1).eval()
    path = tmp_path / "spark_monai_segresnet_1kpretrained_timm_style.pth"
    torch.save(trained.state_dict(), path)
    with pytest.raises(ValueError, match="does not name its network; name it, as in --model monai/resnet18"):
        load_embedding_network(NetworkChoice(path))
    network, maps = maps_of(NetworkChoice(path, model="monai/segresnet", window=(32,)))
    with torch.no_grad():
        down = trained.encode(CROP)[1]
    for features in maps:
        assert any(other.shape == features.shape and torch.equal(other, features) for other in down)
    (tmp_path / "config.yaml").write_text("model: spark/monai/segresnet\nspacing: [3.0, 3.0, 5.0]\ncrop_size: [32]\n")
    same = load_embedding_network(NetworkChoice(tmp_path))
    assert (same.name, same.settings.spacing) == ("monai/segresnet", (3, 3, 5))
    assert same.stages == network.stages
    with pytest.raises(ValueError, match=r"--window: crop size \(36, 36, 36\): .* the nearest are \(32, 32, 32\)"):
        load_embedding_network(NetworkChoice(path, window=(36,)))


def test_random_weights_are_those_of_the_seed_and_change_nothing_else(tmp_path):
    network = load_embedding_network(NetworkChoice(write_weights(tmp_path / "a.safetensors")))
    state = torch.get_rng_state()
    one, same, other = (network.random(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    key = "embeddings.stem.weight"
    assert torch.equal(one[key], same[key])
    assert not torch.equal(one[key], other[key])
    assert not torch.equal(one[key], network.encoder.state_dict()[key])
    np.testing.assert_array_equal(one["mae.pos_embed"], network.encoder.state_dict()["mae.pos_embed"])


def test_a_classifier_of_images_is_refused(tmp_path):
    contents = {"model": {}, "config": as_plain(ClassificationConfig()), "classes": ["a", "b"], "weights": "best"}
    torch.save(contents, tmp_path / "best.pth")
    with pytest.raises(ValueError, match="expected weights of a network of volumes, got a classifier of images"):
        load_embedding_network(NetworkChoice(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected a run folder with best\.pth"):
        load_embedding_network(NetworkChoice(tmp_path / "none"))


@pytest.mark.parametrize("scaling", ["window", "minmax"])
def test_a_network_of_slices_sees_every_slice_by_itself(scaling, tmp_path):
    torch.manual_seed(2)
    trained = timm.create_model("test_resnet", in_chans=3, num_classes=0).eval()
    path = tmp_path / "spark_timm_test_resnet_1kpretrained_timm_style.pth"
    torch.save(trained.state_dict(), path)
    (tmp_path / "config.yaml").write_text(
        f"model: spark/timm/test_resnet\nslices: coronal\nin_channels: 3\ncrop_size: [64]\nslice_scaling: {scaling}\n"
        "spacing: [4.0, 4.0, 4.0]\n"
    )
    network = load_embedding_network(NetworkChoice(tmp_path))
    assert network.window == (64, 8, 64)
    assert network.unit[1] == 1
    volumes = torch.rand(2, 1, 64, 3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network.encoder(volumes)
        for number in range(2):
            for at in range(3):
                image = volumes[number : number + 1, :, :, at]
                if scaling == "minmax":
                    image = (image - image.min()) / (image.max() - image.min())
                expected = trained.forward_features(image.repeat(1, 3, 1, 1))
                torch.testing.assert_close(found[-1][number : number + 1, :, :, at], expected)
    assert [stride[1] for _, stride in network.stages] == [1] * len(network.stages)


@pytest.mark.usefixtures("stand_in")
def test_a_network_of_other_axes_sees_volumes_in_its_own(tmp_path):
    """The plan's axes are y, z, x: volumes are turned on the way in, and maps back."""
    plans = write_plans(tmp_path / "nnunet")
    torch.manual_seed(4)
    trained = build_from_plan(read_plan(plans, "3d_fullres"), 1).network.eval()
    torch.save({"network_weights": trained.state_dict()}, tmp_path / "checkpoint.pth")
    network = load_embedding_network(NetworkChoice(tmp_path / "checkpoint.pth", model=f"nnunet/{plans}"))
    assert (network.window, network.settings.spacing) == ((20, 16, 24), (7, 8, 9))
    assert network.settings.intensity == ("ct-zscore",)
    assert (network.settings.hu_min, network.settings.input_mean) == (-120, (60,))
    x, y, z = network.window
    volume = torch.rand(1, 1, x, y, z, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = network.encoder(volume)
        expected = trained.encoder(volume.permute(0, 1, 3, 4, 2))
    for one in found:
        assert any(
            torch.equal(one.permute(0, 1, 3, 4, 2), other) for other in expected if other.shape[1] == one.shape[1]
        )
    run = tmp_path / "run"
    run.mkdir()
    torch.save(trained.state_dict(), run / "spark_nnunet_1kpretrained_timm_style.pth")
    (run / "config.yaml").write_text(f"model: spark/nnunet/{plans}\naxis_order: [1, 2, 0]\ncrop_size: [20, 16, 24]\n")
    with torch.no_grad():
        for one, other in zip(load_embedding_network(NetworkChoice(run)).encoder(volume), found, strict=True):
            torch.testing.assert_close(one, other)


def test_folders_of_the_hub_are_read(tmp_path, monkeypatch):
    shape = SHAPES | {"preprocessing": {"spacing": [3.0, 3.0, 5.0], "intensity": ["mr"]}}
    Encoder(1, 32, **shape).save_pretrained(tmp_path / "encoder")
    trained = Segmenter(["background", "a"], 1, 32, **shape, decoder_width=48).eval()
    trained.preprocessing |= {"image_channels": [0]}
    trained._hub_mixin_config["preprocessing"] = trained.preprocessing
    trained.save_pretrained(tmp_path / "segmenter")
    for name in ("encoder", "segmenter"):
        network, maps = maps_of(NetworkChoice(tmp_path / name))
        assert (network.settings.spacing, network.settings.intensity) == ((3, 3, 5), ("mr",))
        assert network.window == (32, 32, 32)
    with torch.no_grad():
        *skips, deepest = trained.embeddings(CROP)
        assert_same(maps, [*skips, trained.mae(deepest)])
    asked = []

    def download(repo, **options):
        asked.append(repo)
        return str(tmp_path / "segmenter")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_embedding_network(NetworkChoice("hf://owner/name")).digest == network.digest
    assert set(asked) == {"owner/name"}


def test_the_digest_is_of_the_weights_that_are_read(tmp_path):
    """One file may hold several networks, and the index of several files does not change with them."""
    other = {key: value + 1 for key, value in small_encoder().state_dict().items()}
    torch.save({"student": small_encoder().state_dict(), "teacher": other}, tmp_path / "two.pth")
    digests = [
        load_embedding_network(NetworkChoice(tmp_path / "two.pth", weights_key=key, window=(32,))).digest
        for key in ("student", "teacher", "student")
    ]
    assert digests[0] == digests[2] != digests[1]
