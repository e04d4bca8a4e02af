"""SparK around networks of others: what it finds in them, what it trains, and that their weights stay theirs."""

import pytest
import timm
import torch
import torchvision
from monai.networks.nets import DynUNet, FlexibleUNet, SegResNet
from torch import nn

from hyspark.models.backbones import build_backbone
from hyspark.models.masked_autoencoder import reconstruct, reconstruction_loss
from hyspark.models.masking.mask import visible_at
from hyspark.models.spark import PyramidEncoder, build_spark

PYRAMIDS = {
    "timm/resnet18": [(512, 32), (256, 16), (128, 8), (64, 4), (64, 2)],
    "timm/convnext_atto": [(320, 32), (160, 16), (80, 8), (40, 4)],
    "timm/convnextv2_atto": [(320, 32), (160, 16), (80, 8), (40, 4)],
    "timm/efficientnet_b0": [(320, 32), (112, 16), (40, 8), (24, 4), (16, 2)],
    "timm/densenet121": [(1024, 32), (1024, 16), (512, 8), (256, 4), (64, 2)],
    "timm/regnety_002": [(368, 32), (152, 16), (56, 8), (24, 4), (32, 2)],
    "timm/mobilenetv3_small_050": [(288, 32), (24, 16), (16, 8), (8, 4), (16, 2)],
    "torchvision/convnext_tiny": [(768, 32), (384, 16), (192, 8), (96, 4)],
    "torchvision/resnet18": [(512, 32), (256, 16), (128, 8), (64, 4), (64, 2)],
    "monai/resnet10": [(512, 32), (256, 16), (128, 8), (64, 4), (64, 2)],
    "monai/segresnet": [(128, 8), (64, 4), (32, 2)],
    "monai/dynunet": [(320, 16), (256, 8), (128, 4), (64, 2)],
}


def spark_of(name, **options):
    """A small pre-training network: images of 64 x 64 and three channels, or volumes of 32 or 64 and one."""
    torch.manual_seed(0)
    is_volumetric = name.startswith("monai/")
    channels, axes = (1, 3) if is_volumetric else (3, 2)
    size = 32 if name in ("monai/segresnet", "monai/dynunet") else 64
    backbone = build_backbone(name, channels, axes)
    options = {"in_channels": channels, "axes": axes, "decoder_width": 32, "run": backbone.run, **options}
    return build_spark(backbone.network, size, 0.5, **options)


@pytest.fixture(scope="module", params=PYRAMIDS)
def named(request):
    """A name, its network, images and a mask."""
    net = spark_of(request.param)
    images = torch.rand(2, net.encoder.in_channels, *net.encoder.img_size)
    return request.param, net, images, net.draw_visible(2, images.shape[2:])


def test_channels_and_strides_are_found(named):
    name, net, images, _ = named
    axes = len(net.encoder.img_size)
    assert net.encoder.maps == [(c, (stride,) * axes) for c, stride in PYRAMIDS[name]]
    assert net.encoder.patch == (PYRAMIDS[name][0][1],) * axes
    found = net.encoder.eval()(images)
    expected = [(2, c, *(s // stride for s in images.shape[2:])) for c, stride in reversed(PYRAMIDS[name])]
    assert [tuple(x.shape) for x in found] == expected


def test_everything_below_the_head_is_trained(named):
    name, net, images, visible = named
    net.train().zero_grad()
    out = net(images, visible)
    assert out.prediction.shape == images.shape
    assert 0.5 < out.loss.item() < 2
    out.loss.backward()
    still = [key for key, p in net.named_parameters() if p.grad is None]
    heads = ("head", "classifier", "fc.", "conv_head", "bn2")
    heads += ("up", "out", "conv_final", "output_block", "skip_layers")  # of segmentation
    assert all(key.removeprefix("encoder.backbone.").startswith(heads) for key in still), still
    # Several processes wait for the gradients of all others.
    assert still == [key for key, p in net.named_parameters() if not p.requires_grad]
    if name.startswith("monai/"):
        return
    assert len(still) <= 5


def test_hidden_pixels_change_no_feature_and_no_prediction(named):
    _, net, images, visible = named
    net.eval()
    changed = images.where(visible_at(visible, images.shape[2:]), torch.full_like(images, 9.0))
    with torch.no_grad():
        for one, other in zip(net.encoder(images, visible), net.encoder(changed, visible), strict=True):
            assert torch.equal(one, other)
            assert (one[~visible_at(visible, one.shape[2:]).expand_as(one)] == 0).all()
        assert torch.equal(net(images, visible).prediction, net(changed, visible).prediction)


def test_a_batch_equals_its_samples(named):
    _, net, images, visible = named
    net.eval()
    with torch.no_grad():
        together = net(images, visible).prediction
        alone = torch.cat([net(images[i : i + 1], visible[i : i + 1]).prediction for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4 * together.abs().max().item())


ORIGINALS = {
    "timm/resnet18": (lambda: timm.create_model("resnet18"), {"fc.weight", "fc.bias"}),
    "timm/convnext_atto": (lambda: timm.create_model("convnext_atto"), {"head.fc.weight", "head.fc.bias"}),
    "timm/convnextv2_atto": (lambda: timm.create_model("convnextv2_atto"), {"head.fc.weight", "head.fc.bias"}),
    "timm/efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), {"classifier.weight", "classifier.bias"}),
    "timm/densenet121": (lambda: timm.create_model("densenet121"), {"classifier.weight", "classifier.bias"}),
    "timm/regnety_002": (lambda: timm.create_model("regnety_002"), {"head.fc.weight", "head.fc.bias"}),
    "timm/mobilenetv3_small_050": (
        lambda: timm.create_model("mobilenetv3_small_050"),
        {"classifier.weight", "classifier.bias"},
    ),
    "torchvision/convnext_tiny": (torchvision.models.convnext_tiny, set()),
    "torchvision/resnet18": (torchvision.models.resnet18, set()),
    "monai/resnet10": (lambda: FlexibleUNet(1, 2, "resnet10", spatial_dims=3).encoder, set()),
    "monai/segresnet": (lambda: SegResNet(3, 16, 1, 2), set()),
    "monai/dynunet": (lambda: DynUNet(3, 1, 2, [3] * 5, [1, 2, 2, 2, 2], [2, 2, 2, 2]), set()),
}


def test_weights_load_into_the_original_network(named):
    """Strictly, head aside; for MONAI's into segmentation networks that use them."""
    name, net, _, _ = named
    make, head = ORIGINALS[name]
    original = make()
    report = original.load_state_dict(net.encoder.weights(), strict=False)
    assert set(report.missing_keys) == head
    assert report.unexpected_keys == []


def test_the_network_is_the_users_own_object():
    backbone = timm.create_model("resnet18", num_classes=0)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    net = build_spark(backbone, 64, decoder_width=32)
    assert net.encoder.backbone is backbone
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())
    net(torch.rand(2, 3, 64, 64)).loss.backward()
    assert not any(module._forward_hooks for module in backbone.modules())
    assert not torch.equal(backbone.bn1.running_mean, before["bn1.running_mean"])


def test_the_loss_is_of_normalised_patches_of_all_channels():
    images, prediction = torch.rand(2, 3, 64, 32), torch.rand(2, 3, 64, 32)
    visible = torch.tensor([[True, False], [False, False]]).view(2, 1, 2, 1)
    errors = []
    for sample, row in ((0, 1), (1, 0), (1, 1)):
        where = (sample, slice(None), slice(32 * row, 32 * row + 32), slice(None))
        target = (images[where] - images[where].mean()) / (images[where].var() + 1e-6).sqrt()
        errors.append((prediction[where] - target).square().mean())
    torch.testing.assert_close(reconstruction_loss(images, prediction, visible), sum(errors) / 3)


def test_a_perfect_prediction_reconstructs_the_image():
    net = spark_of("timm/resnet18")
    images = torch.rand(2, 3, 64, 64)
    out = net(images)
    patches = images.unfold(2, 32, 32).unfold(3, 32, 32)  # (b, c, 2, 2, 32, 32)
    mean, deviation = (f.movedim(0, 0) for f in (patches.mean((1, 4, 5)), (patches.var((1, 4, 5)) + 1e-6).sqrt()))
    mean, deviation = (x.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None] for x in (mean, deviation))
    out.prediction = (images - mean) / deviation
    torch.testing.assert_close(reconstruct(images, out), images, rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    """A network of one's own: strides 2 and 4 at modules that may be named."""

    def __init__(self, in_channels, axes):
        super().__init__()
        self.one = nn.Conv2d(in_channels, 6, 3, 2, 1)
        self.two = nn.Conv2d(6, 8, 3, 2, 1)
        self.last = nn.Conv2d(8, 10, 1)

    def forward(self, x):
        return self.last(self.two(self.one(x).relu()).relu())


def test_a_network_of_ones_own():
    net = build_spark(Plain(1, 2), 32, in_channels=1, decoder_width=16)
    assert net.encoder.maps == [(10, (4, 4)), (6, (2, 2))]
    chosen = build_spark(Plain(1, 2), 32, in_channels=1, decoder_width=16, taps=["one", "two"])
    assert chosen.encoder.maps == [(8, (4, 4)), (6, (2, 2))]


def test_a_factory_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\ndef make(in_channels, axes):\n    return nn.Conv2d(in_channels, axes, 2, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build_backbone("my_networks:make", 5, 2).network.weight.shape == (2, 5, 2, 2)
    with pytest.raises(ValueError, match="backbone 'my_networks:other'"):
        build_backbone("my_networks:other", 5, 2)


def test_what_makes_no_pyramid_is_refused():
    with pytest.raises(ValueError, match="expected feature maps at strides 2, 4, 8"):
        PyramidEncoder(nn.Conv2d(1, 1, 3, padding=1), (32, 32), 1)
    with pytest.raises(
        ValueError,
        match=r"crop size \(80, 80\): this network .* a map of \(3, 3\).*multiples of its total stride",
    ):
        build_spark(timm.create_model("resnet18"), 80)
    with pytest.raises(ValueError, match="decoder_width: expected a multiple of 32"):
        build_spark(timm.create_model("resnet18"), 64, decoder_width=48)
    with pytest.raises(ValueError, match="visible: expected bool"):
        spark_of("timm/resnet18")(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "channels", "axes", "message"),
    [
        ("timm/resnet5O", 1, 2, "timm/resnet5O: timm has no such network; did you mean timm/resnet50"),
        ("timm/resnet18", 1, 3, "expected images with 2 axes"),
        ("torchvision/resnet18", 1, 2, "expected data with 3 channels"),
        ("monai/unet", 1, 3, "monai/unet: expected one of resnet10, .*, dynunet; for another network give a function"),
        ("resnet50", 1, 2, "expected timm/NAME"),
        ("nowhere.at.all:make", 1, 2, "backbone 'nowhere.at.all:make': No module named 'nowhere'"),
        ("builtins:dict", 1, 2, "expected a torch module from it, or .* got dict"),
    ],
)
def test_backbones_that_there_are_not(name, channels, axes, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, channels, axes)
