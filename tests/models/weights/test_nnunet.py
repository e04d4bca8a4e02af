"""Checkpoints of nnU-Net v1 and v2 and of nnssl: names, aliases, heads, and what they say of their training."""

import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from hyspark import build_hybird, load_pretrained
from hyspark.data.settings import PrepareSettings
from hyspark.models.weights.export import export_weights
from hyspark.training.initial_weights import describe_differences, describe_inputs


class Block(nn.Module):
    """A convolution and its norm, each under two names, as in dynamic_network_architectures."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(inputs, outputs, 3), nn.InstanceNorm3d(outputs, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm)


class Blocks(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.convs = nn.Sequential(Block(inputs, outputs), Block(outputs, outputs))


class Encoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(Blocks(channels, 4)), nn.Sequential(Blocks(4, 6)))


class Decoder(nn.Module):
    """It refers to the encoder, whose tensors so have four names."""

    def __init__(self, encoder, classes, width):
        super().__init__()
        self.encoder = encoder
        self.stages = nn.ModuleList([Blocks(width, 4)])
        self.transpconvs = nn.ModuleList([nn.ConvTranspose3d(6, 4, 2)])
        self.seg_layers = nn.ModuleList([nn.Conv3d(4, classes, 1)])


class UNet(nn.Module):
    def __init__(self, classes=3, channels=1, width=8):
        super().__init__()
        self.encoder = Encoder(channels)
        self.decoder = Decoder(self.encoder, classes, width)


NUM_TENSORS = len(list(UNet().parameters()))
CT = {"mean": 80.0, "std": 60.0, "percentile_00_5": -150.0, "percentile_99_5": 300.0}


def plans(**options):
    """Plans whose arrays z, y, x are turned to z, x, y."""
    full = {
        "patch_size": [16, 48, 32],
        "spacing": [2.5, 0.9, 0.8],
        "normalization_schemes": ["CTNormalization"],
    }
    return {
        "transpose_forward": [0, 2, 1],
        "configurations": {"3d_fullres": full, "3d_large": {"inherits_from": "3d_fullres", "patch_size": [32, 64, 48]}},
        "foreground_intensity_properties_per_channel": {"0": CT},
        **options,
    }


def checkpoint(network, configuration="3d_fullres", **options):
    """What nnUNetTrainer.save_checkpoint writes, with numpy scalars and a set."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(1)], "lrs": [0.01]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 3,
        "init_args": {"plans": plans(**options), "configuration": configuration, "fold": 0, "device": "cpu"},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": {0, 1, 2},
    }


def noise(network):
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.rand_like(value))
    return network


def has_loaded(network, source, prefix):
    own, given = network.state_dict(), source.state_dict()
    return all(torch.equal(own[key], given[key]) for key in own if key.startswith(prefix))


@pytest.fixture
def source():
    torch.manual_seed(0)
    return noise(UNet())


def test_a_checkpoint_is_read_and_a_tensor_of_several_names_counts_once(source, tmp_path):
    torch.save(checkpoint(source), tmp_path / "checkpoint_final.pth")
    model = UNet()
    report = load_pretrained(model, tmp_path / "checkpoint_final.pth")
    assert has_loaded(model, source, "")
    assert f"(100% of its {NUM_TENSORS} tensors)" in str(report)
    assert dict(report.made_with) == {
        "spacing": (0.9, 0.8, 2.5),
        "crop_size": (48, 32, 16),
        "axis_order": (2, 0, 1),
        "intensity": ("ct-zscore",),
        "image_channels": (0,),
        "hu_min": -150.0,
        "hu_max": 300.0,
        "input_mean": (80.0,),
        "input_std": (60.0,),
    }


def test_heads_of_other_classes_stay_randomly_initialised(source):
    model = UNet(classes=5)
    report = load_pretrained(model, checkpoint(source))
    assert has_loaded(model, source, ("encoder.", "decoder.stages.", "decoder.transpconvs."))
    assert report.missing == ("decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias")
    assert set(report.unexpected.values()) == {"head with 3 outputs, the model's has 5"}
    assert f"of its {NUM_TENSORS} tensors)" in str(report)


def test_the_stem_is_adapted_under_all_its_names(source):
    model = UNet(channels=2)
    report = load_pretrained(model, checkpoint(source))
    assert report.missing == ()
    assert set(report.adapted.values()) == {"1 -> 2 input channels"}
    stem = source.encoder.stages[0][0].convs[0].conv.weight
    torch.testing.assert_close(model.encoder.stages[0][0].convs[0].conv.weight, (stem / 2).expand(-1, 2, -1, -1, -1))


@pytest.mark.parametrize("is_shared", [True, False])
def test_an_encoder_alone(source, is_shared):
    """In some files the names have copies of their own."""
    contents = checkpoint(source)
    if not is_shared:
        contents["network_weights"] = {key: value.clone() for key, value in contents["network_weights"].items()}
    model = UNet().encoder
    report = load_pretrained(model, contents)
    assert all(torch.equal(value, source.encoder.state_dict()[key]) for key, value in model.state_dict().items())
    aliases = {key for key, why in report.unexpected.items() if why == "another name of a tensor that is loaded"}
    assert aliases == ({f"decoder.encoder.{key}" for key in model.state_dict()} if is_shared else set())


def test_a_configuration_has_what_it_inherits(source):
    made = load_pretrained(UNet(), checkpoint(source, "3d_large")).made_with
    assert (made["crop_size"], made["spacing"]) == ((64, 48, 32), (0.9, 0.8, 2.5))


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [
        (["ZScoreNormalization"], {"intensity": ("zscore",)}),
        (["RescaleTo01Normalization"], {"intensity": ("RescaleTo01Normalization",)}),
        (["NoNormalization"], {"intensity": ("none",)}),
        (
            ["CTNormalization", "ZScoreNormalization"],
            {"intensity": ("ct-zscore", "zscore"), "image_channels": (0, 1), "input_mean": (80.0, 0.0)},
        ),
        (
            ["CTNormalization", "ZScoreNormalization", "CTNormalization"],
            {"input_mean": (80.0, 0.0, 10.0), "input_std": (60.0, 1.0, 60.0), "hu_min": -150.0, "hu_max": 400.0}
            | {"hu_windows": ((-150.0, 300.0), None, (-150.0, 400.0))},
        ),
    ],
)
def test_the_normalisation_is_the_intensity(source, schemes, expected):
    one = {"3d_fullres": plans()["configurations"]["3d_fullres"] | {"normalization_schemes": schemes}}
    values = {"0": CT, "2": CT | {"mean": 10.0, "percentile_99_5": 400.0}}
    contents = checkpoint(source, configurations=one, foreground_intensity_properties_per_channel=values)
    made = load_pretrained(UNet(), contents).made_with
    assert {name: made[name] for name in expected} == expected


def test_windows_are_compared_by_channel(source, tmp_path):
    """A run has one window for all channels, nnU-Net one for each: the widest is no equal of both."""
    one = {"3d_fullres": plans()["configurations"]["3d_fullres"] | {"normalization_schemes": ["CTNormalization"] * 2}}
    values = {"0": CT, "1": CT | {"percentile_99_5": 80.0}}
    torch.save(
        checkpoint(source, configurations=one, foreground_intensity_properties_per_channel=values), tmp_path / "f"
    )
    report = load_pretrained(UNet(), tmp_path / "f")
    config = PrepareSettings(
        spacing=report.made_with["spacing"],
        intensity=("ct-zscore",),
        image_channels=(0, 1),
        hu_min=-150,
        hu_max=300,
        input_mean=(80.0,),
        input_std=(60.0,),
    )
    lines = [line for line in describe_differences(UNet(), "f", report, config) if "axes" not in line]
    assert lines == ["f was made with hu_max 300.0 80.0, this run has 300"]
    assert describe_inputs(report.made_with)[0].endswith("windows of HU by channel -150 to 300, -150 to 80")


@pytest.mark.parametrize(
    "broken",
    [
        {"configurations": {}},
        {"transpose_forward": "?"},
        {"configurations": 3},
        {"configurations": {"3d_fullres": "?"}},
        {"configurations": {"3d_fullres": {"inherits_from": "3d_fullres"}}},
    ],
)
def test_plans_of_another_form_say_nothing(source, broken):
    assert load_pretrained(UNet(), checkpoint(source, **broken)).made_with == {}


def test_the_decoder_of_nnssl_is_never_loaded(source, tmp_path):
    """Its networks have no skips, so the shapes of decoders differ; of equal shapes, it is not transferred either."""
    adaptation = {
        "pretrain_plan": {
            "transpose_forward": [0, 1, 2],
            "configurations": {
                "onemmiso": {"spacing": [1, 2, 3], "patch_size": (160, 96, 64), "normalization_schemes": ["ZScore"]}
            },
        },
        "key_to_encoder": "encoder.stages.1",
        "key_to_stem": "encoder.stages.0",
        "key_to_lpe": None,
    }
    for width in (4, 8):
        given = noise(UNet(classes=1, width=width))
        contents = checkpoint(given) | {"nnssl_adaptation_plan": adaptation, "citations": [{"type": "Architecture"}]}
        contents["init_args"] = {"configuration_name": "onemmiso", "plan": {}}
        torch.save(contents, tmp_path / "checkpoint_final.pth")
        model = UNet()
        before = {key: value.clone() for key, value in model.decoder.stages.state_dict().items()}
        report = load_pretrained(model, tmp_path / "checkpoint_final.pth")
        assert has_loaded(model, given, "encoder.")
        assert all(torch.equal(value, before[key]) for key, value in model.decoder.stages.state_dict().items())
        assert report.unexpected["decoder.stages.0.convs.0.conv.weight"] == "decoder of pre-training"
        assert not any(key.startswith(("encoder.", "decoder.encoder.")) for key in report.missing)
        assert (report.made_with["spacing"], report.made_with["axis_order"]) == ((3.0, 2.0, 1.0), (2, 1, 0))


class ConvBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.instnorm = nn.Conv3d(inputs, outputs, 3), nn.InstanceNorm3d(outputs, affine=True)


class EarlierUNet(nn.Module):
    """The names of nnU-Net v1."""

    def __init__(self, classes):
        super().__init__()
        blocks = [nn.ModuleDict({"blocks": nn.Sequential(ConvBlock(*widths))}) for widths in ((1, 4), (4, 6), (8, 4))]
        self.conv_blocks_context = nn.ModuleList(blocks[:2])
        self.conv_blocks_localization = nn.ModuleList([nn.ModuleList(blocks[2:])])
        self.tu = nn.ModuleList([nn.ConvTranspose3d(6, 4, 2, bias=False)])
        self.seg_outputs = nn.ModuleList([nn.Conv3d(4, classes, 1, bias=False)])


@pytest.fixture
def earlier(tmp_path):
    """The two files of nnU-Net v1; arrays z, y, x are turned to x, z, y."""
    network = noise(EarlierUNet(5))
    state = {
        "epoch": 1000,
        "state_dict": network.state_dict(),
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    state |= {
        "plot_stuff": ([np.float32(1)], [np.float64(2)]),
        "best_stuff": (np.float64(1), None),
        "amp_grad_scaler": {},
    }
    torch.save(state, tmp_path / "model_final_checkpoint.model")
    values = OrderedDict(mean=np.float32(90), sd=np.float32(50), percentile_99_5=300.0, percentile_00_5=-100.0)
    values["local_props"] = OrderedDict(case=OrderedDict(mean=np.float32(80)))
    stages = {
        0: {"current_spacing": np.array([3.0, 3.0, 3.0])},
        1: {"current_spacing": np.array([1.0, 2.0, 3.0]), "patch_size": np.array([32, 48, 64])},
    }
    found = {
        "normalization_schemes": OrderedDict({0: "CT"}),
        "transpose_forward": [2, 0, 1],
        "dataset_properties": {"intensityproperties": OrderedDict({0: values})},
        "plans_per_stage": stages,
    }
    info = OrderedDict(init=("plans.pkl", 0, "out", "data", True, 1, True), name="nnUNetTrainerV2", plans=found)
    (tmp_path / "model_final_checkpoint.model.pkl").write_bytes(pickle.dumps(info))
    return network, tmp_path / "model_final_checkpoint.model"


def test_files_of_version_1(earlier):
    source, file = earlier
    model = EarlierUNet(3)
    report = load_pretrained(model, file)
    assert has_loaded(model, source, ("conv_blocks", "tu."))
    assert report.missing == ("seg_outputs.0.weight",)
    expected = {"spacing": (1.0, 3.0, 2.0), "crop_size": (32, 64, 48), "axis_order": (0, 2, 1), "hu_min": -100.0}
    assert {name: report.made_with[name] for name in expected} == expected
    assert (report.made_with["input_mean"], report.made_with["input_std"]) == ((90.0,), (50.0,))
    file.with_name(f"{file.name}.pkl").write_bytes(b"\x80\x04damaged")
    assert load_pretrained(EarlierUNet(3), file).made_with == {}


def test_the_plans_of_version_1_are_no_weights(earlier):
    _, file = earlier
    with pytest.raises(ValueError, match=rf"plans of nnU-Net v1; .*{re.escape(str(file))}$"):
        load_pretrained(EarlierUNet(3), f"{file}.pkl")


def test_hysparks_network_as_nnunet_trained_it(tmp_path):
    """Its trainer keeps the settings in the plans, and the network below `network.`."""
    options = {"widths": (6, 6, 12, 12, 24), "depths": (1,) * 5, "expansions": (2,) * 5, "vit_depth": 1, "num_heads": 4}
    source = build_hybird(1, 3, 32, **options)
    settings = {"spacing": [2.5, 0.9, 0.8], "intensity": ["ct-zscore"], "num_heads": 4}
    contents = checkpoint(source, hyspark=settings)
    contents["network_weights"] = {f"network.{key}": value for key, value in source.state_dict().items()}
    torch.save(contents, tmp_path / "checkpoint_final.pth")
    model = build_hybird(1, 5, 32, **options)
    report = load_pretrained(model, tmp_path / "checkpoint_final.pth")
    assert report.made_with == settings
    assert report.missing == ("decoder.out.conv.weight", "decoder.out.conv.bias")
    with pytest.raises(ValueError, match="expected 6 attention heads"):
        load_pretrained(build_hybird(1, 3, 32, **(options | {"num_heads": 6})), tmp_path / "checkpoint_final.pth")
    written = export_weights(tmp_path / "checkpoint_final.pth", tmp_path / "encoder.safetensors", torch.float32)
    assert torch.equal(written["embeddings.stem.weight"], source.embeddings.stem.weight)
    assert load_pretrained(model, tmp_path / "encoder.safetensors").made_with["spacing"] == settings["spacing"]
