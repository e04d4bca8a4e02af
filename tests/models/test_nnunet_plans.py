"""nnU-Net's plans.json: axes against nnU-Net's own order of operations, earlier forms, and what a plan may name."""

import json
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from hyspark.models.backbones import build_backbone
from hyspark.models.feature_maps import uses_only_itself
from hyspark.models.network_faults import UnsupportedNetworkError
from hyspark.models.nnunet_network import find_layer_class, turn_kernels, turned_architecture
from hyspark.models.nnunet_plans import read_plan, split_plan_name, to_network_axes, to_volume_axes, without_plan_folder
from hyspark.models.spark import build_spark
from tests.nnunet_stand_in import ARCHITECTURE, PLANS, stand_in, write_plans

__all__ = ["stand_in"]


@pytest.mark.parametrize("transpose", [[0, 1, 2], [1, 0, 2], [2, 0, 1], [1, 2, 0]])
def test_axes_are_those_of_an_array_that_nnunet_reads(tmp_path, transpose):
    """nnU-Net reads an array z, y, x and transposes it; its spacing and patch size are those of the result."""
    size, spacing = (3, 4, 5), (1.0, 2.0, 3.0)  # x, y, z
    volume = np.arange(60).reshape(size)
    theirs = volume.T.transpose(transpose)
    changes = {
        "transpose_forward": transpose,
        "spacing": [spacing[::-1][axis] for axis in transpose],
        "patch_size": list(theirs.shape),
    }
    plan = read_plan(write_plans(tmp_path, **changes))
    assert (plan.patch_size, plan.spacing) == (size, spacing)
    assert np.array_equal(volume.transpose(plan.axis_order), theirs)
    assert to_network_axes(size, plan.axis_order) == theirs.shape
    assert to_volume_axes(theirs.shape, plan.axis_order) == size


def test_strides_are_multiplied_along_each_axis(tmp_path):
    plan = read_plan(write_plans(tmp_path))
    assert plan.stride == (4, 2, 4)  # the plan's axes are y, z, x
    assert (plan.name, plan.dataset, plan.configuration) == ("smallPlans", "Dataset042_Small", "3d_fullres")
    assert plan.intensities(0)["percentile_99_5"] == 380
    assert plan.intensities(1) == {}


def test_what_is_kept_reads_back(tmp_path):
    plan = read_plan(write_plans(tmp_path), "3d_lowres")
    assert plan.spacing == (14.0, 16.0, 18.0)
    (tmp_path / "copy.json").write_text(plan.text())
    assert read_plan(tmp_path / "copy.json", "3d_lowres") == plan


def test_a_plan_before_2_3_describes_the_same_network(tmp_path):
    content = deepcopy(PLANS)
    content["configurations"]["3d_fullres"] |= {
        "UNet_class_name": "ResidualEncoderUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 6,
        "conv_kernel_sizes": ARCHITECTURE["arch_kwargs"]["kernel_sizes"],
        "pool_op_kernel_sizes": ARCHITECTURE["arch_kwargs"]["strides"],
        "n_conv_per_stage_encoder": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    }
    del content["configurations"]["3d_fullres"]["architecture"]
    (tmp_path / "plans.json").write_text(json.dumps(content))
    found = read_plan(tmp_path / "plans.json").architecture
    assert found["arch_kwargs"] == ARCHITECTURE["arch_kwargs"] | {"features_per_stage": [4, 6, 6]}
    assert found["network_class_name"] == ARCHITECTURE["network_class_name"]
    content["configurations"]["3d_fullres"]["UNet_class_name"] = "Generic_UNet"
    (tmp_path / "plans.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"3d_fullres: expected architecture, or .* got 'Generic_UNet'; run nnUNetv2_"):
        read_plan(tmp_path / "plans.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected nnU-Net's plans.json, got no JSON"),
        ('{"labels": {}}', "got another JSON"),
        ('{"plans_per_stage": {}}', "got plans of nnU-Net v1; plan with v2"),
        ('{"configurations": {}}', "expected plans_name, dataset_name, transpose_forward"),
        (json.dumps(PLANS | {"transpose_forward": [0, 1]}), "transpose_forward: expected the axes 0, 1, 2"),
        (json.dumps(PLANS | {"configurations": {"3d": {}}}), "no configuration '3d_fullres'; it has 3d"),
    ],
)
def test_another_file_is_refused(tmp_path, text, message):
    (tmp_path / "plans.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plans.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transpose_forward": "zyx"}, "got a value of another form"),
        ({"transpose_forward": None}, "got a value of another form"),
        ({"configurations": {"3d_fullres": 3}}, "got a value of another form"),
        ({"spacing": [8.0, 9.0]}, "spacing: expected 3 numbers above 0, got"),
        ({"spacing": [8.0, 9.0, 0]}, "spacing: expected 3 numbers above 0, got"),
        ({"spacing": [8.0, float("nan"), 7.0]}, "spacing: expected 3 numbers above 0, got"),
        ({"patch_size": [16, -24, 20]}, "patch_size: expected 3 numbers above 0, got"),
        ({"normalization_schemes": ["CTNormalization"] * 2}, "expected a use_mask_for_norm for each of normalization"),
        ({"architecture": 3}, "got a value of another form"),
        ({"architecture": ARCHITECTURE | {"arch_kwargs": {"strides": [[2]]}}}, "got a value of another form"),
    ],
)
def test_damaged_plans_are_named(tmp_path, changes, message):
    path = write_plans(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}.*{message}"):
        read_plan(path)


def test_configurations_without_a_counterpart_are_refused(tmp_path):
    path = write_plans(tmp_path)
    with pytest.raises(ValueError, match=r"2d: expected .*architecture"):
        read_plan(path, "2d")
    with pytest.raises(ValueError, match="labels of an earlier stage; name 3d_fullres or 3d_lowres"):
        read_plan(path, "3d_cascade_fullres")
    with pytest.raises(ValueError, match=r"no configuration '3d_fulres'.*did you mean 3d_fullres"):
        read_plan(path, "3d_fulres")
    with pytest.raises(FileNotFoundError, match="got a folder"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "configuration"),
    [
        ("nnunet/pre/Dataset001_A/plans.json", "pre/Dataset001_A/plans.json", "3d_fullres"),
        ("nnunet//data/a:b/plans.json", "/data/a:b/plans.json", "3d_fullres"),
        ("nnunet/plans.json:3d_lowres", "plans.json", "3d_lowres"),
        ("/data/a:b/plans.json:3d_lowres", "/data/a:b/plans.json", "3d_lowres"),
    ],
)
def test_names(name, file, configuration):
    found = split_plan_name(name)
    assert (str(found[0]), found[1]) == (file, configuration)


def test_the_folder_of_a_plan_is_no_part_of_the_model():
    assert without_plan_folder("spark/nnunet/a/plans.json") == without_plan_folder("spark/nnunet//b.json:3d_fullres")
    assert without_plan_folder("spark/nnunet/a.json:3d_lowres") != without_plan_folder("spark/nnunet/a.json")
    assert without_plan_folder("spark/timm/resnet18") == "spark/timm/resnet18"


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.hub.load",
        "torch.nn.functional.relu",
        "torch.nn.init.zeros_",
        "torch.nn.Parameter",
        3,
        "Conv3d",
    ],
)
def test_a_plan_names_layers_alone(name):
    with pytest.raises(UnsupportedNetworkError, match=r"nonlin: expected a layer of torch\.nn, got"):
        find_layer_class("nonlin", name)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    "name", ["subprocess.Popen", "dynamic_network_architectures.building_blocks.helper.x", f"{ARCHITECTURE} x"]
)
def test_a_plan_names_networks_alone(tmp_path, name):
    path = write_plans(tmp_path, architecture=ARCHITECTURE | {"network_class_name": name})
    with pytest.raises(UnsupportedNetworkError, match="network_class_name: expected a class of dynamic_network_arch"):
        build_backbone(f"nnunet/{path}", 1, 3)


@pytest.mark.usefixtures("stand_in")
def test_a_class_that_moved_is_found_and_another_is_named(tmp_path):
    old = "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"
    path = write_plans(tmp_path, architecture=ARCHITECTURE | {"network_class_name": old})
    assert type(build_backbone(f"nnunet/{path}", 1, 3).network).__name__ == "ResidualEncoderUNet"
    path = write_plans(tmp_path, architecture=ARCHITECTURE | {"network_class_name": f"{old}Next"})
    with pytest.raises(UnsupportedNetworkError, match=r"has no network .*UNetNext; update it"):
        build_backbone(f"nnunet/{path}", 1, 3)
    with pytest.raises(ValueError, match="expected volumes with 3 axes"):
        build_backbone(f"nnunet/{path}", 1, 2)


@pytest.mark.usefixtures("stand_in")
def test_the_network_is_pre_trained_whole_and_copies_compute_by_themselves(tmp_path):
    path = write_plans(tmp_path)
    network, run = build_backbone(f"nnunet/{path}", 1, 3)
    spark = build_spark(network, (8, 16, 16), 0.6, in_channels=1, axes=3, decoder_width=16, run=run)
    assert [stride for _, stride in spark.encoder.maps] == [(2, 4, 4), (1, 2, 2)]
    spark(torch.randn(2, 1, 8, 16, 16)).loss.backward()
    assert all(parameter.grad is not None for parameter in network.encoder.parameters())
    crop = torch.zeros(1, 1, 8, 16, 16)
    assert uses_only_itself(network, run, spark.encoder.taps[-1], crop)


def test_a_turned_network_computes_the_same(tmp_path):
    """Against torch: a convolution of permuted kernels on a permuted crop is the permuted map."""
    conv = nn.Conv3d(2, 3, (1, 3, 5), (1, 2, 1), (0, 1, 2))
    axes = (2, 0, 1)
    found = turned_architecture({"arch_kwargs": {"kernel_sizes": [[1, 3, 5], 3], "strides": [[1, 2, 1], 2]}}, axes)
    assert found["arch_kwargs"] == {"kernel_sizes": [[5, 1, 3], 3], "strides": [[1, 1, 2], 2]}
    turned = nn.Conv3d(2, 3, found["arch_kwargs"]["kernel_sizes"][0], found["arch_kwargs"]["strides"][0], (2, 0, 1))
    turned.load_state_dict({name: turn_kernels(x, axes) for name, x in conv.state_dict().items()})
    crop = torch.randn(1, 2, 4, 6, 8)
    permute = (0, 1, *(2 + axis for axis in axes))
    torch.testing.assert_close(turned(crop.permute(permute)), conv(crop).permute(permute))


def test_the_networks_of_nnunet_itself(tmp_path):
    """Where dynamic_network_architectures is installed: both kinds, hidden voxels and all parameters of the encoder."""
    pytest.importorskip("dynamic_network_architectures")
    options = ARCHITECTURE["arch_kwargs"]
    plain = {name: value for name, value in options.items() if name != "n_blocks_per_stage"} | {"n_conv_per_stage": 2}
    for name, kwargs in (("ResidualEncoderUNet", options), ("PlainConvUNet", plain)):
        named = f"dynamic_network_architectures.architectures.unet.{name}"
        path = write_plans(tmp_path, architecture=ARCHITECTURE | {"network_class_name": named, "arch_kwargs": kwargs})
        network, run = build_backbone(f"nnunet/{path}", 1, 3)
        spark = build_spark(network, (8, 16, 16), 0.6, in_channels=1, axes=3, decoder_width=16, run=run)
        assert spark.encoder.compute == "packed"
        spark(torch.randn(2, 1, 8, 16, 16)).loss.backward()
        assert all(parameter.grad is not None for parameter in network.encoder.parameters())
