"""Published 2D checkpoints and others into networks of others: each key has a reason, the backbone is whole."""

import argparse

import pytest
import timm
import torch
import torchvision
from monai.networks.nets import DynUNet, FlexibleUNet, SegResNet
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from hyspark import build_spark, load_pretrained
from hyspark.models.backbones import build_backbone
from hyspark.models.contrastive import build_siamese

HEAD = {"fc.weight", "fc.bias"}


def small_resnet():
    """A ResNet-10 of torchvision."""
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])


def noise(model):
    """A state dict of the model's keys with other values."""
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value + 7
        for key, value in model.state_dict().items()
    }


def body(weights, prefix=""):
    """Without the classifier, and under a prefix."""
    return {prefix + key: value for key, value in weights.items() if key not in HEAD}


def assert_loaded(model, weights, prefix=""):
    after = model.state_dict()
    assert weights
    assert all(torch.equal(after[prefix + key], value) for key, value in weights.items())


def refused(model, source):
    """The message with which a source is refused, the model left as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"\w") as error:
        load_pretrained(model, source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(error.value)


@pytest.fixture(scope="module")
def weights():
    """Of a small ResNet, classifier included."""
    return noise(small_resnet())


@pytest.fixture
def model():
    return small_resnet()


# --- the four kinds of the Ulm study


def spark(weights):
    return {"arch": "resnet", "module": body(weights), "is_pretrain": False}


def moco(weights):
    own = body(weights, "encoder_q.") | {
        "encoder_q.fc.weight": torch.rand(128, 512),
        "encoder_q.fc.bias": torch.rand(128),
    }
    key_encoder = {key.replace("encoder_q.", "encoder_k."): value + 1 for key, value in own.items()}
    queues = {"queue": torch.rand(128, 8), "queue_ptr": torch.zeros(1), "val_queue": torch.rand(128, 8)}
    return lightning(own | key_encoder | queues | {"val_queue_ptr": torch.zeros(1)})


def byol(weights):
    online = body(weights, "online_network.encoder.")
    for part in ("projector", "predictor"):
        online[f"online_network.{part}.model.0.weight"] = torch.rand(4, 512)
    target = {key.replace("online_", "target_"): value + 1 for key, value in online.items() if "predictor" not in key}
    return lightning(online | target)


def swav(weights):
    heads = {
        "model.projection_head.0.weight": torch.rand(4, 512),
        "model.projection_head.1.running_mean": torch.rand(4),
    }
    return lightning(body(weights, "model.") | heads | {"model.prototypes.weight": torch.rand(9, 4)})


def lightning(state):
    """A checkpoint of pytorch-lightning."""
    callbacks = {"ModelCheckpoint{'monitor': 'train_loss'}": {"best_model_score": torch.tensor(1.0)}}
    about = {"epoch": 3, "global_step": 5, "callbacks": callbacks, "hyper_parameters": {"lr": 0.1}}
    return about | {"state_dict": state, "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}]}


KINDS = {
    spark: {},
    moco: {
        "head with 128 outputs, the model's has 1000": {"encoder_q.fc.weight", "encoder_q.fc.bias"},
        "queue of MoCo": {"queue", "queue_ptr", "val_queue", "val_queue_ptr"},
        "momentum encoder of MoCo, encoder_q is used": 74,
    },
    byol: {
        "projection head of BYOL": {"online_network.projector.model.0.weight"},
        "predictor of BYOL": {"online_network.predictor.model.0.weight"},
        "momentum encoder of BYOL, online_network is used": 73,
    },
    swav: {
        "projection head of pre-training": {
            "model.projection_head.0.weight",
            "model.projection_head.1.running_mean",
        },
        "prototypes of SwAV": {"model.prototypes.weight"},
    },
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("as_file", [False, True])
def test_the_four_kinds_of_the_ulm_study(kind, as_file, weights, model, tmp_path):
    source = kind(weights)
    if as_file:
        torch.save(source, tmp_path / "model.ckpt")
        source = tmp_path / "model.ckpt"
    report = load_pretrained(model, source)
    assert_loaded(model, body(weights))
    assert set(report.matched) == set(body(weights))
    assert set(report.missing) == HEAD
    assert report.adapted == {}
    by_reason = {}
    for key, why in report.unexpected.items():
        by_reason.setdefault(why, set()).add(key)
    assert {
        why: len(keys) if isinstance(KINDS[kind].get(why), int) else keys for why, keys in by_reason.items()
    } == KINDS[kind]
    assert 0.9 < report.coverage < 1


def test_a_projection_of_two_layers_is_set_aside(weights, model):
    source = moco(weights)["state_dict"]
    mlp = {key.replace("fc.", "fc.2."): value for key, value in source.items()}
    mlp["encoder_q.fc.0.weight"] = torch.rand(512, 512)
    report = load_pretrained(model, mlp)
    assert_loaded(model, body(weights))
    assert report.unexpected["encoder_q.fc.0.weight"] == "head of the file's network, not part of this model"
    assert set(report.missing) == HEAD


def test_spark_into_the_resnet50_of_the_study():
    weights = noise(torchvision.models.resnet50())
    model = torchvision.models.resnet50()
    report = load_pretrained(model, spark(weights))
    assert_loaded(model, body(weights))
    assert report.missing == ("fc.weight", "fc.bias")
    assert report.unexpected == {}
    assert "missing       2 (randomly initialised: fc.* 2)" in str(report)


def test_sparks_own_training_file(weights, model):
    more = {
        "dense_decoder.dec.0.weight": 4,
        "densify_norms.0.weight": 4,
        "densify_projs.0.weight": 4,
        "mask_tokens.0": 4,
    }
    state = body(weights, "sparse_encoder.sp_cnn.") | {key: torch.rand(n) for key, n in more.items()}
    state |= {"imn_m": torch.rand(3), "config": {"mask_ratio": 0.6}}
    report = load_pretrained(model, {"module": state, "epoch": 3})
    assert_loaded(model, body(weights))
    assert set(report.unexpected) == {*more, "imn_m"}


# --- other files


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.encoder_q.", "backbone.", "net."])
def test_prefixes_are_taken_off(prefix, weights, model):
    report = load_pretrained(model, {prefix + key: value for key, value in weights.items()})
    assert_loaded(model, weights)
    assert (report.missing, report.unexpected, report.coverage) == ((), {}, 1)


def test_timm_and_torchvision_exchange_resnets(tmp_path):
    weights = noise(torchvision.models.resnet18())
    save_file(weights, tmp_path / "model.safetensors")
    model = timm.create_model("resnet18")
    assert load_pretrained(model, tmp_path / "model.safetensors").coverage == 1
    assert_loaded(model, weights)
    other = timm.create_model("resnet18", num_classes=5, in_chans=1)
    report = load_pretrained(other, weights)
    assert report.adapted == {"conv1.weight": "3 -> 1 input channels"}
    assert report.unexpected == dict.fromkeys(HEAD, "head with 1000 outputs, the model's has 5")
    assert set(report.missing) == HEAD
    without = timm.create_model("resnet18", num_classes=0)
    report = load_pretrained(without, weights)
    assert report.missing == ()
    assert report.unexpected == dict.fromkeys(HEAD, "head of the file's network, not part of this model")


def test_the_head_is_what_timm_says():
    """ConvNeXt's norm lies in the module `head` but is not the classifier."""
    weights = noise(timm.create_model("convnext_atto"))
    model = timm.create_model("convnext_atto", num_classes=3)
    assert set(load_pretrained(model, weights).missing) == {"head.fc.weight", "head.fc.bias"}
    del weights["head.norm.bias"]
    assert "no values for 1 key of the network, its head aside (head.norm.bias" in refused(model, weights)


@pytest.mark.parametrize(("name", "layer"), [("mobilenet_v3_small", 3), ("mnasnet0_5", 1)])
def test_the_last_layer_of_a_classifier(name, layer):
    """mnasnet reads a version from its state dict."""
    weights = noise(torchvision.models.get_model(name))
    report = load_pretrained(torchvision.models.get_model(name, num_classes=4), weights)
    assert set(report.missing) == {f"classifier.{layer}.weight", f"classifier.{layer}.bias"}


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1), (3, 2)])
def test_the_stem_is_adapted_to_other_input_channels(old, new):
    """An image repeated over the channels gives the same response."""
    source, model = (timm.create_model("resnet10t", in_chans=n, num_classes=0).eval() for n in (old, new))
    report = load_pretrained(model, dict(reversed(source.state_dict().items())))  # some files are sorted by name
    assert report.adapted == {"conv1.0.weight": f"{old} -> {new} input channels"}
    assert report.coverage == 1
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected, found = source(image.expand(-1, old, -1, -1)), model(image.expand(-1, new, -1, -1))
    torch.testing.assert_close(found, expected)


def test_counters_may_be_absent_on_either_side(weights, model):
    without = {key: value for key, value in weights.items() if "num_batches" not in key}
    report = load_pretrained(model, without)
    assert_loaded(model, without)
    assert len(report.missing) == 12
    frozen = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    report = load_pretrained(frozen, weights)
    assert_loaded(frozen, without)
    assert report.unexpected["bn1.num_batches_tracked"] == "number of batches, which the model's norms do not count"


# --- segmentation networks around an encoder


def test_an_encoder_into_the_segmentation_network_that_uses_it(weights):
    model = FlexibleUNet(3, 2, "resnet10", spatial_dims=2)
    fresh = {key: value.clone() for key, value in model.state_dict().items() if key.split(".")[0] != "encoder"}
    report = load_pretrained(model, weights)
    assert_loaded(model, body(weights), prefix="encoder.")
    assert_loaded(model, fresh)
    assert set(report.missing) == set(fresh)
    assert set(report.unexpected) == HEAD
    other = small_resnet()  # and back
    report = load_pretrained(other, model.state_dict())
    assert_loaded(other, body(weights))
    assert set(report.unexpected) == set(fresh)


def test_volumes_of_the_zoo_into_flexible_unet():
    source = build_backbone("monai/resnet10", 1, 3).network
    model = FlexibleUNet(1, 2, "resnet10", spatial_dims=3)
    report = load_pretrained(model, noise(source))
    assert {key.split(".")[0] for key in report.missing} == {"decoder", "segmentation_head"}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["segresnet", "dynunet"])
def test_segresnet_and_dynunet(name, whole):
    """From all of the network or from its encoder alone; with more classes than in pre-training."""
    levels = [3] * 5, [1, 2, 2, 2, 2], [2, 2, 2, 2]
    model = SegResNet(3, 16, 2, 4) if name == "segresnet" else DynUNet(3, 2, 4, *levels, deep_supervision=True)
    encoder = ("convInit", "down_layers", "input_block", "downsamples", "bottleneck")
    source = build_backbone(f"monai/{name}", 1, 3).network.state_dict()  # DynUNet's skip_layers are the same tensors
    if not whole:
        source = {key: value for key, value in source.items() if key.startswith(encoder)}
    report = load_pretrained(model, source)
    stem = {"convInit.conv.weight", "input_block.conv1.conv.weight", "skip_layers.downsample.conv1.conv.weight"}
    assert set(report.adapted) == {key for key in stem if key in source}
    assert_loaded(model, {key: value for key, value in source.items() if key.startswith(encoder) and key not in stem})
    scores = ("conv_final.2", "output_block", "deep_supervision_heads", "skip_layers.next_layer.super_head")
    tops = ("up_layers", "up_samples", "conv_final", "upsamples", "skip_layers")
    assert all(key.startswith(scores if whole else (*scores, *tops)) for key in report.missing)
    assert any(key.startswith(("conv_final.2", "output_block")) for key in report.missing)
    cut = {key: value for key, value in source.items() if "down_layers.1" not in key and "downsample" not in key}
    assert "of the network, its head aside" in refused(model, cut)


# --- this project's files


@pytest.fixture(scope="module")
def pretraining():
    torch.manual_seed(1)
    return build_spark(timm.create_model("resnet10t", num_classes=0), 64, decoder_width=32)


def test_its_pre_training_continues(pretraining):
    model = build_spark(timm.create_model("resnet10t", num_classes=0), 64, decoder_width=32)
    report = load_pretrained(model, {"model": pretraining.state_dict(), "step": 3})
    assert_loaded(model, pretraining.state_dict())
    assert (report.missing, report.unexpected, report.coverage) == ((), {}, 1)


def test_its_backbone_alone_into_pre_training_and_back(pretraining):
    model = build_spark(timm.create_model("resnet10t"), 64, decoder_width=64)
    report = load_pretrained(model, pretraining.encoder.weights())
    assert_loaded(model.encoder.backbone, pretraining.encoder.weights())
    assert {key.split(".")[0] for key in report.missing} == {"encoder", "densify", "decoder"}
    assert {key for key in report.missing if key.startswith("encoder")} == {f"encoder.backbone.{key}" for key in HEAD}
    plain = timm.create_model("resnet10t")
    report = load_pretrained(plain, pretraining.state_dict())
    assert_loaded(plain, pretraining.encoder.weights())
    assert {key.split(".")[0] for key in report.unexpected} == {"densify", "decoder"}


def test_a_decoder_of_another_width_is_refused_with_advice(pretraining):
    model = build_spark(timm.create_model("resnet10t", num_classes=0), 64, decoder_width=64)
    assert refused(model, pretraining.state_dict()).endswith(
        "build the model with the shapes of the weights (--decoder_width 32)"
    )


# --- what is refused


def test_keys_beside_a_network_are_named_and_those_within_it_are_refused(weights, model):
    report = load_pretrained(model, weights | {"extra.weight": torch.zeros(1)})
    assert report.unexpected == {"extra.weight": "not part of this model"}
    assert "unexpected    1 (extra.weight: not part of this model)" in str(report)
    for key in ("layer1.0.se.weight", "layer1.1.conv1.weight", "layer5.0.conv1.weight"):
        assert f"got 1 further key in its stages ({key})" in refused(model, weights | {key: torch.zeros(1)})


def test_what_does_not_fit_is_refused(weights, model):
    assert "none of its 2 keys" in refused(model, {"a.weight.x": torch.zeros(1), "b": torch.zeros(1)})
    assert "layer2.0.conv2.weight: the model expects shape (128, 128, 3, 3), got (1,)" in refused(
        model, weights | {"layer2.0.conv2.weight": torch.zeros(1)}
    )
    assert "conv1.weight: the model expects shape" in refused(
        model, weights | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    )
    assert "two keys match bn1.bias" in refused(model, weights | {"module.bn1.bias": weights["bn1.bias"]})
    assert "fc.bias" in refused(model, {key: value for key, value in weights.items() if key != "fc.bias"})
    assert "config is no tensor" not in refused(model, {"config": {}, "a": torch.zeros(1)})
    assert "got others at epoch" in refused(model, weights | {"epoch": 3})


@pytest.mark.parametrize("part", ["layer4.", "bn1.running_var", "layer1.0.conv2.weight"])
def test_part_of_the_backbone_missing_is_refused(part, weights, model):
    left = {key: value for key, value in weights.items() if not key.startswith(part)}
    num = sum(key.startswith(part) and "num_batches" not in key for key in weights)
    keys = "1 key" if num == 1 else f"{num} keys"
    assert f"no values for {keys} of the network, its head aside ({part}" in refused(model, left)


def test_one_layer_is_not_taken_for_a_part_of_its_own(weights, model):
    left = {key: value for key, value in weights.items() if key.startswith("layer3.")}
    assert "of the network, its head aside" in refused(model, left)
    report = load_pretrained(model.layer3, {key.removeprefix("layer3."): value for key, value in left.items()})
    assert report.missing == ()


def test_other_depths_are_refused(weights, model):
    deeper = torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1])
    assert "no values for 10 keys of the network, its head aside" in refused(deeper, weights)
    assert "got 12 further keys in its stages (layer2.1.conv1.weight, " in refused(model, deeper.state_dict())
    assert "the model expects shape" in refused(torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1]), weights)


def test_weights_that_fit_two_parts_are_refused(weights):
    model = nn.ModuleDict({"one": small_resnet(), "two": small_resnet()})
    message = refused(model, weights)
    assert "matches the model in 2 ways" in message
    assert "one.*" in message
    load_pretrained(model["two"], weights)
    assert_loaded(model, weights, prefix="two.")
    same = nn.ModuleDict({"one": model["two"], "two": model["two"]})
    assert load_pretrained(same, noise(model["two"])).missing == ()


def test_settings_of_training_programs_are_no_obstacle(weights, model, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(lightning(body(weights)) | {"hyper_parameters": argparse.Namespace(lr=0.1)}, path)
    load_pretrained(model, path)
    assert_loaded(model, body(weights))


@pytest.mark.parametrize("method", ["moco", "byol", "swav"])
def test_the_state_of_pre_training_by_views_gives_its_network(method):
    sizes = {"head_width": 8, "queue_size": 8, "num_prototypes": 3}
    given = build_siamese(method, small_resnet(), 64, **sizes)
    given.load_state_dict(noise(given))
    network = small_resnet()
    report = load_pretrained(network, given.state_dict())
    assert_loaded(network, given.encoder.weights())
    assert all(
        reason.startswith(("projection", "predictor", "momentum encoder", "queue", "prototypes"))
        for reason in report.unexpected.values()
    )


def test_keys_that_are_no_names_are_an_error(weights):
    assert "expected text as keys, got 3" in refused(small_resnet(), {**weights, 3: torch.ones(1)})
