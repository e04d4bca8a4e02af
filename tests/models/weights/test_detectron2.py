"""Pre-trained ResNets in detectors: torchvision's by loading, detectron2's by a file in its names."""

import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from monai.networks.nets import resnet10
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hyspark import load_pretrained
from hyspark.models.weights.detectron2 import detectron2_weights, write_detectron2


@pytest.fixture(scope="module")
def backbone():
    """What a pre-training hands on."""
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0)


@pytest.mark.parametrize(("kind", "norm"), [(FasterRCNN, None), (MaskRCNN, nn.BatchNorm2d)])
def test_torchvisions_detectors_take_the_weights(backbone, kind, norm):
    options = {} if norm is None else {"norm_layer": norm}  # by default frozen
    pyramid = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **options)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((1.0,),) * 5)
    model = kind(pyramid, 2, min_size=64, max_size=64, rpn_anchor_generator=anchors, box_detections_per_img=2).eval()
    report = load_pretrained(model, backbone.state_dict())
    body = pyramid.body.state_dict()
    assert set(body) <= set(backbone.state_dict())
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in body.items())
    assert set(report.matched) == {f"backbone.body.{key}" for key in body}
    assert {key.split(".")[1] for key in report.missing if key.startswith("backbone.")} == {"fpn"}
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        deepest = backbone.eval().forward_features(images)
        torch.testing.assert_close(pyramid.body(images)["3"], deepest, rtol=1e-3, atol=1e-4)
        (found,) = model([images[0]])
    assert found["boxes"].shape[1:] == (4,)
    del body["layer4.0.conv1.weight"]
    with pytest.raises(ValueError, match="no values for 1 key of the network, its head aside"):
        load_pretrained(model, body)


def resnet(block=Bottleneck, **options):
    """A ResNet with a block in each stage, two in the second, with the deviations of its norms above 0."""
    torch.manual_seed(0)
    net = ResNet(block, [1, 2, 1, 1], num_classes=3, **options)
    return {key: value + 1 if "running" in key else value for key, value in net.state_dict().items()}


@pytest.mark.parametrize(("block", "layers"), [(BasicBlock, 2), (Bottleneck, 3)])
@pytest.mark.parametrize("prefix", ["", "module.encoder.backbone."])
def test_detectron2_reads_what_is_written(block, layers, prefix, tmp_path):
    weights = resnet(block)
    more = {"encoder.densify.0.mask_token": torch.zeros(1), "decoder.out.weight": torch.zeros(1)} if prefix else {}
    more = {key.removeprefix("encoder."): value for key, value in more.items()}
    torch.save({"model": {prefix + key: value for key, value in weights.items()} | more}, tmp_path / "resnet.pth")
    written = write_detectron2(tmp_path / "resnet.pth", tmp_path / "deep" / "resnet.pkl", torch.float32)
    raw = (tmp_path / "deep" / "resnet.pkl").read_bytes()
    assert b"numpy._core" not in raw
    assert b"numpy.core" not in raw
    contents = pickle.loads(raw, encoding="latin1")
    assert contents["matching_heuristics"] is True  # the names have no backbone.bottom_up. before them
    assert contents["__author__"]
    model = contents["model"]
    assert model.keys() == written.keys()
    assert all(isinstance(value, np.ndarray) and value.flags.writeable for value in model.values())
    same = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res3.1.conv2.norm.bias": "layer2.1.bn2.bias",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res5.0.shortcut.norm.running_mean": "layer4.0.downsample.1.running_mean",
        f"res5.0.conv{layers}.norm.weight": f"layer4.0.bn{layers}.weight",
    }
    for own, key in same.items():
        assert np.array_equal(model[own], weights[key].numpy())
    assert len(model) == sum("num_batches" not in key and "fc." not in key for key in weights)
    half = write_detectron2(tmp_path / "resnet.pth", tmp_path / "half.pkl")
    assert {value.dtype for value in half.values()} == {torch.float16}


def without(weights, part):
    return {key: value for key, value in weights.items() if not key.startswith(part)}


def test_only_whole_resnets_have_detectron2_names(tmp_path):
    weights = resnet()
    for part, first in (
        ("layer4.", r"res5\.0\.conv1\.weight"),
        ("layer2.0.", r"res3\.0\.conv1\.weight"),
        ("layer3.0.bn3.running_var", r"res4\.0\.conv3\.norm\.running_var"),
        ("layer2.0.downsample.", r"res3\.0\.shortcut\.weight"),
    ):
        with pytest.raises(ValueError, match=rf"the file: .* are missing \({first}"):
            detectron2_weights(without(weights, part), "the file")
    with pytest.raises(ValueError, match=r"layer1\.0\.se\.fc1\.weight belongs to no ResNet"):
        detectron2_weights(weights | {"layer1.0.se.fc1.weight": torch.zeros(1)}, "the file")
    for other in (timm.create_model("resnet10t"), torchvision.models.mobilenet_v3_small()):
        with pytest.raises(ValueError, match="expected a ResNet of basic or bottleneck blocks"):
            detectron2_weights(other.state_dict(), "the file")
    with pytest.raises(ValueError, match="expected 2 spatial axes for detectron2, got 3"):
        detectron2_weights(resnet10(spatial_dims=3, n_input_channels=1, bias_downsample=False).state_dict(), "the file")
    torch.save(weights | {"bn1.weight": torch.full((64,), 1e6)}, tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"stem\.conv1\.norm\.weight: values exceed"):
        write_detectron2(tmp_path / "large.pth", tmp_path / "large.pkl")
    with pytest.raises(ValueError, match=r"ends in \.pkl"):
        write_detectron2(tmp_path / "large.pth", tmp_path / "large.pth")
    assert not (tmp_path / "large.pkl").exists()
