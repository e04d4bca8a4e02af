"""SparK around networks whose stages halve some axes only, and with mask units of any size."""

import math

import pytest
import torch
from monai.networks.nets import DynUNet
from torch import nn

from hyspark.models.backbones import Backbone, build_backbone, run_dynunet
from hyspark.models.contrastive import build_siamese
from hyspark.models.feature_maps import stride_of
from hyspark.models.masked_autoencoder import reconstruct
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import draw_visible, visible_at
from hyspark.models.spark import PyramidEncoder, build_spark


def dynunet(*strides):
    kernels = [[1 if s == 1 else 3 for s in stride] for stride in strides]
    options = {"filters": [4, 6, 8, 10][: len(strides)], "norm_name": ("instance", {"affine": True})}
    return Backbone(DynUNet(len(strides[0]), 1, 2, kernels, strides, strides[1:], **options), run_dynunet)


class Thick(nn.Module):
    """Stages of BatchNorm, a maximum, an average and squeeze-and-excite; the first two halve the last two axes alone.

    Its linear layer has an output of (1, 16, 16, 16, 8) in crops of (16, 32, 32), channels last: no map of stride
    (1, 2, 4), although the shape says so.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU())
        self.last = nn.Linear(8, 8)
        pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.pool = nn.Sequential(pool, nn.Conv3d(8, 8, 3, padding=1), nn.Sigmoid())  # not zero at hidden positions
        self.deep = nn.Sequential(nn.AvgPool3d(2, 2), nn.Conv3d(8, 12, 3, padding=1), nn.BatchNorm3d(12), nn.SiLU())
        self.excite = nn.Conv3d(12, 12, 1)
        self.end = nn.Identity()
        self.head = nn.Linear(12, 5)

    def forward_features(self, x):
        x = self.stem(x)
        x = x + self.last(x.movedim(1, -1)).movedim(-1, 1)
        x = self.deep(self.pool(x))
        return self.end(x * self.excite(x.mean((2, 3, 4), keepdim=True)).sigmoid())


class Gap(nn.Module):
    """Shortcuts that read every other position alone, as in ResNets, and pools of such windows."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 4, 2, 2)
        self.two = nn.Conv2d(4, 6, 1, 2)
        self.three = nn.MaxPool2d(1, 2)
        self.four = nn.Sequential(nn.AvgPool2d(1, 2), nn.GroupNorm(2, 6))

    def forward(self, x):
        return self.four(self.three(self.two(self.one(x))))


NETWORKS = {
    "first (1, 2, 2)": (
        lambda: dynunet((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        (8, 16, 32),
        [(10, (4, 8, 8)), (8, (2, 4, 4)), (6, (1, 2, 2))],
    ),
    "last (1, 2, 2)": (
        lambda: dynunet((1, 1, 1), (2, 2, 2), (1, 2, 2)),
        (4, 8, 16),
        [(8, (2, 4, 4)), (6, (2, 2, 2))],
    ),
    "2D (1, 2)": (
        lambda: dynunet((1, 1), (2, 2), (2, 1), (2, 2)),
        (16, 16),
        [(10, (8, 4)), (8, (4, 2)), (6, (2, 2))],
    ),
    "thick": (lambda: Backbone(Thick()), (16, 32, 32), [(12, (2, 8, 8)), (8, (1, 4, 4)), (8, (1, 2, 2))]),
    "gap": (lambda: Backbone(Gap()), (32, 64), [(6, (16, 16)), (6, (8, 8)), (6, (4, 4)), (4, (2, 2))]),
}
CASES = [
    *((name, None) for name in NETWORKS),
    ("first (1, 2, 2)", (2, 4, 4)),  # below the total stride on all axes
    ("thick", (2, 2, 4)),  # on two
    ("last (1, 2, 2)", (4, 4, 4)),  # above it
    ("2D (1, 2)", (4, 8)),  # below and above
    ("gap", (2, 4)),
]


def spark_of(name, mask_unit=None):
    make, size, _ = NETWORKS[name]
    torch.manual_seed(0)
    backbone = make()
    options = {"in_channels": 1, "axes": len(size), "decoder_width": 16, "run": backbone.run}
    net = build_spark(backbone.network, size, 0.5, mask_unit=mask_unit, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    """A network, images of values far from zero, and a mask."""
    net = spark_of(*request.param)
    images = torch.randn(2, 1, *net.encoder.img_size, dtype=torch.float64) + 1
    return net, images, net.draw_visible(2, images.shape[2:])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_map_of_each_stride_is_found(name):
    net = spark_of(name)
    assert net.encoder.maps == NETWORKS[name][2]
    assert net.encoder.patch == NETWORKS[name][2][0][1]
    maps = net.encoder(torch.zeros(1, 1, *net.encoder.img_size, dtype=torch.float64))
    found = [tuple(s // n for s, n in zip(net.encoder.img_size, x.shape[2:], strict=True)) for x in maps]
    assert found == [stride for _, stride in reversed(net.encoder.maps)]


def test_every_stage_is_trained_whatever_its_stride(case):
    net, images, visible = case
    out = net.train()(images, visible)
    assert out.prediction.shape == images.shape
    assert out.visible.shape[2:] == tuple(s // u for s, u in zip(images.shape[2:], net.encoder.patch, strict=True))
    assert 0.2 < out.loss.item() < 5
    out.loss.backward()
    still = [name.removeprefix("encoder.backbone.") for name, p in net.named_parameters() if p.grad is None]
    assert all(name.startswith(("upsamples", "output_block", "skip_layers", "head")) for name in still), still
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_hidden_voxels_change_no_feature_and_no_prediction(case):
    net, images, visible = case
    changed = images.where(visible_at(visible, images.shape[2:]), torch.full_like(images, 1e3))
    for mode in (net.train, net.eval):
        mode()
        with torch.no_grad():
            ones, others = net.encoder(images, visible), net.encoder(changed, visible)
            for one, other in zip(ones, others, strict=True):
                assert torch.equal(one, other)
                assert one.isfinite().all()
                assert (one[~visible_at(visible, one.shape[2:]).expand_as(one)] == 0).all()
    with torch.no_grad():
        assert torch.equal(net(images, visible).prediction, net(changed, visible).prediction)


def test_a_visible_network_is_the_plain_network(case):
    net, images, visible = case
    everything = torch.ones_like(visible)
    for mode in (net.train, net.eval):
        mode()
        with torch.no_grad():
            for one, other in zip(net.encoder(images, everything), net.encoder(images), strict=True):
                torch.testing.assert_close(one, other)


def test_a_batch_equals_its_samples(case):
    net, images, visible = case
    net.eval()
    with torch.no_grad():
        together = net(images, visible).prediction
        alone = torch.cat([net(images[i : i + 1], visible[i : i + 1]).prediction for i in range(2)])
    torch.testing.assert_close(together, alone)


def test_the_loss_is_per_unit(case):
    """The error of each hidden unit, computed unit by unit."""
    net, images, visible = case
    out = net.eval()(images, visible)
    errors = []
    for sample, *corner in (~visible[:, 0]).nonzero().tolist():
        where = tuple(slice(c * u, (c + 1) * u) for c, u in zip(corner, net.encoder.patch, strict=True))
        target, found = images[(sample, 0, *where)], out.prediction[(sample, 0, *where)]
        errors.append(((target - target.mean()) / (target.var() + 1e-6).sqrt() - found).square().mean())
    torch.testing.assert_close(out.loss.double(), sum(errors) / len(errors), rtol=1e-5, atol=1e-5)


def test_a_perfect_prediction_reconstructs_the_image(case):
    net, images, visible = case
    out = net(images, visible)
    for sample, *corner in torch.ones_like(visible[:, 0]).nonzero().tolist():
        where = tuple(slice(c * u, (c + 1) * u) for c, u in zip(corner, net.encoder.patch, strict=True))
        target = images[(sample, 0, *where)]
        out.prediction.data[(sample, 0, *where)] = (target - target.mean()) / (target.var() + 1e-6).sqrt()
    torch.testing.assert_close(reconstruct(images, out).double(), images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [(1, 2, 2), (2, 4, 4)])
def test_the_mask_token_lies_at_hidden_units_of_visible_patches(unit):
    net = spark_of("thick", unit)
    images = torch.randn(1, 1, 16, 32, 32, dtype=torch.float64)
    visible = draw_visible([s // u for s, u in zip((16, 32, 32), unit, strict=True)], 0.5, [torch.Generator()])
    patches = net.encoder.patches(images, visible)
    assert patches.grid == [8, 4, 4]
    finest = net.encoder.encode(images, patches)[0]
    fill = net.densify[2]
    token = torch.full_like(fill.mask_token, 7.0)
    fill.project = nn.Identity()
    dense = fill.fill(finest, token, patches, None)
    at = visible_at(visible, dense.shape[2:]).expand_as(dense)
    assert (dense[~at] == 7).all()
    assert (dense[at] != 7).all()


def test_units_that_fit_no_stride_are_refused():
    net = dynunet((1, 1, 1), (1, 2, 2), (2, 2, 2)).network
    for unit, got in (((2, 3, 4), "2, 3, 4"), (0, "0, 0, 0"), (1, "1, 1, 1"), (6, "6, 6, 6")):
        with pytest.raises(
            ValueError,
            match=rf"mask_unit: expected on each axis a multiple or a divisor of .* \(1, 2, 2\), \(2, 4, 4\), and more "
            rf"than one voxel, got \({got}\); its total stride is \(2, 4, 4\)",
        ):
            PyramidEncoder(net, (12, 24, 24), 1, run=run_dynunet, mask_unit=unit)
    with pytest.raises(ValueError, match="mask_unit: expected one number, or 3"):
        PyramidEncoder(net, (12, 24, 24), 1, run=run_dynunet, mask_unit=(4, 4))
    with pytest.raises(ValueError, match=r"mask_unit: .* a divisor of the crop \(12, 24, 24\), got \(2, 8, 16\)"):
        PyramidEncoder(net, (12, 24, 24), 1, run=run_dynunet, mask_unit=(2, 8, 16))


@pytest.mark.parametrize(
    ("own", "size", "stride"),
    [
        ((8, 16, 16), (8, 32, 64), (1, 2, 4)),
        ((1, 2), (16, 64), (16, 32)),
        ((3, 3), (80, 80), (32, 32)),
        ((2, 2), (64, 80), (32, 32)),  # 80 / 32 rounded down, or 80 / 64 rounded up
        ((4, 2), (16, 10), (4, 4)),
        ((8, 2), (8, 5), (1, 4)),
        ((8, 8), (8, 8), None),
        ((1, 1), (8, 8), None),
        ((5, 8), (16, 16), None),
        ((8, 8, 8), (16, 16), None),
    ],
)
def test_the_stride_of_a_shape(own, size, stride):
    assert stride_of(torch.empty(1, 1, *own), size) == stride


def test_a_crop_that_rounds_a_map_is_refused():
    net = dynunet((1, 1, 1), (1, 2, 2), (2, 2, 2)).network
    with pytest.raises(ValueError, match=r"a map of \(3, 3, 4\) .* stride \(2, 4, 4\), the nearest are \(6, 8, 16\)"):
        PyramidEncoder(net, (6, 10, 16), 1, run=run_dynunet)


def test_a_crop_of_one_unit_is_refused_with_advice():
    net = dynunet((1, 1, 1), (1, 2, 2), (2, 2, 2)).network
    with pytest.raises(
        ValueError, match=r"on crops of 2 x 4 x 4 .*; its deepest map has one position, so enlarge the cr"
    ):
        PyramidEncoder(net, (2, 4, 4), 1, run=run_dynunet)
    assert PyramidEncoder(net, (2, 4, 8), 1, run=run_dynunet).patch == (2, 4, 4)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "timm/efficientnet_b0"])
def test_a_deepest_map_of_one_position_cannot_be_masked(name):
    with pytest.raises(ValueError, match=r"a map of one position from it \(.*\), .* twice the edge, \(64, 64\)"):
        build_spark(build_backbone(name, 3, 2).network, (32, 32))
    assert build_spark(build_backbone(name, 3, 2).network, (64, 32)).encoder.patch == (32, 32)


class Branches(nn.Module):
    """Maps of which none is the coarsest on both axes."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(1, 2, 4, (2, 4), (1, 0))
        self.high = nn.Conv2d(1, 2, 4, (4, 2), (0, 1))
        self.both = nn.Conv2d(1, 2, 4, 4)

    def forward(self, x):
        return self.wide(x), self.high(x)


def test_maps_that_form_no_pyramid_are_refused():
    net = Branches()
    with pytest.raises(ValueError, match=r"do not decrease .*got \(4, 2\) \(high\) and \(2, 4\) \(wide\); name maps"):
        PyramidEncoder(net, (16, 16), 1)
    assert PyramidEncoder(net, (16, 16), 1, taps=["wide"]).maps == [(2, (2, 4))]
    net.forward = lambda x: (net.wide(x), net.high(x), net.both(x))
    assert PyramidEncoder(net, (16, 16), 1).maps == [(2, (4, 4)), (2, (4, 2))]
    with pytest.raises(ValueError, match="name maps"):
        PyramidEncoder(net, (16, 16), 1, taps=["wide", "high", "both"])


@pytest.mark.parametrize("method", ["moco", "byol", "swav"])
def test_contrastive_methods_take_unequal_strides(method):
    backbone = dynunet((1, 1, 1), (2, 2, 2), (1, 2, 2))
    net = build_siamese(method, backbone.network, (4, 8, 8), in_channels=1, axes=3, head_width=8, run=backbone.run)
    net([torch.randn(4, 1, 4, 8, 8) for _ in range(2)]).loss.backward()
    encoder = [name for name, _ in backbone.network.named_parameters() if name.startswith(("input", "down", "bott"))]
    assert all(backbone.network.get_parameter(name).grad is not None for name in encoder)


def test_a_network_whose_copies_are_itself_gets_no_momentum_encoder():
    class Holder(nn.Module):
        def __init__(self, in_channels=1):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.Conv2d(4, 4, 2, 2))

    def part(net):
        return lambda x: net.encoder[1](twin.encoder[0](x))

    for method in ("moco", "byol"):
        net = Holder()
        net.forward_features = lambda x, net=net: net.encoder(x)
        with pytest.raises(
            ValueError, match=r"Holder: a copy of it computes with the original's weights.*Backbone\(netw"
        ):
            build_siamese(method, net, 16, in_channels=1, head_width=8)
    build_siamese("swav", net, 16, in_channels=1, head_width=8)  # has no momentum encoder
    build_siamese("moco", Holder(), 16, in_channels=1, head_width=8, run=lambda net, x: net.encoder(x))
    twin = Holder()
    first = twin.encoder[0]
    twin.forward_features = lambda x: None
    with pytest.raises(ValueError, match="a copy of it computes with the original's weights"):  # one layer is shared
        build_siamese("moco", twin, 16, in_channels=1, head_width=8, run=lambda net, x: net.encoder[1](first(x)))


def test_a_factory_may_return_a_backbone(tmp_path, monkeypatch):
    (tmp_path / "thick_networks.py").write_text(
        "import hyspark\nfrom torch import nn\n\n\ndef make(in_channels, axes):\n"
        "    net = nn.ModuleDict({'encoder': nn.Conv3d(in_channels, 4, (1, 2, 2), (1, 2, 2))})\n"
        "    return hyspark.Backbone(net, lambda net, x: net['encoder'](x))\n\n\n"
        "def wrong(in_channels, axes):\n    return hyspark.Backbone(make, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    backbone = build_backbone("thick_networks:make", 1, 3)
    net = build_spark(backbone.network, 8, in_channels=1, axes=3, decoder_width=8, run=backbone.run)
    assert net.encoder.maps == [(4, (1, 2, 2))]
    with pytest.raises(ValueError, match=r"hyspark.Backbone\(module, run\).* got Backbone\(function, int\)"):
        build_backbone("thick_networks:wrong", 1, 3)


@pytest.mark.parametrize("kind", ["ResidualEncoderUNet", "PlainConvUNet"])
def test_networks_of_nnunets_plans(kind):
    """Whose plans for thick slices have strides (1, 2, 2), and kernels (1, 3, 3), at either end."""
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    depth = {"n_blocks_per_stage": [1] * 4} if kind == "ResidualEncoderUNet" else {"n_conv_per_stage": [1] * 4}
    strides = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2)]
    kernels = [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)]
    norm = {"conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
    network = getattr(architectures, kind)(
        1,
        4,
        (4, 6, 8, 10),
        nn.Conv3d,
        kernels,
        strides,
        num_classes=2,
        n_conv_per_stage_decoder=[1] * 3,
        **depth,
        **norm,
    )
    options = {"in_channels": 1, "axes": 3, "decoder_width": 8, "run": lambda net, x: net.encoder(x)}
    net = build_spark(network, (4, 16, 32), 0.5, **options).double()
    assert net.encoder.maps == [(10, (2, 8, 8)), (8, (2, 4, 4)), (6, (1, 2, 2))]
    images = torch.randn(2, 1, 4, 16, 32, dtype=torch.float64)
    visible = net.draw_visible(2, (4, 16, 32))
    changed = images.where(visible_at(visible, images.shape[2:]), torch.full_like(images, 1e3))
    for one, other in zip(net.encoder(images, visible), net.encoder(changed, visible), strict=True):
        assert torch.equal(one, other)
    net(images, visible).loss.backward()
    assert all(p.grad is not None for p in network.encoder.parameters())


def test_a_window_without_a_visible_unit_is_no_number_but_zero():
    """Of a pool that reads one of four positions: a maximum over none, and an average of none."""
    visible = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    visible[..., 1, 1] = visible[..., 2, 2] = True
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    for pool in (nn.MaxPool2d(1, 2), nn.AvgPool2d(1, 2)):
        with hidden(visible):
            out = pool(x)
        assert out[0, :, 0, 0].tolist() == [0, 0]
        assert torch.equal(out[0, :, 1, 1], x[0, :, 2, 2])
        out.sum().backward()
        assert x.grad.isfinite().all()
    assert math.isclose(float(x.grad.sum()), 4)
