"""Networks that know nothing of masks, under `hidden`: timm's in 2D, MONAI's in 3D, module by module and whole.

Everything is computed in double precision, where "the same" means to 1e-10 and not to what a layer forgives.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet, ResNet, SegResNet
from torch import nn

from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at

TIMM = [
    "resnet18",  # BatchNorm, max pool
    "resnet26d",  # average pools
    "seresnet50",  # squeeze and excite
    "ecaresnet26t",  # convolution over channels
    "resnet50_gn",  # GroupNorm
    "resnetv2_50",  # pre-activation
    "test_nfnet",  # standardised weights
    "convnext_atto",  # LayerNorm
    "convnextv2_atto",  # GRN
    "efficientnet_b0",
    "tf_efficientnet_b0",  # padding on one side
    "mobilenetv3_small_050",
    "regnety_002",
    "densenet121",
    "skresnet18",
    "resnest14d",
]


def dynunet_encoder(net, x):
    maps = [net.input_block(x)]
    for layer in net.downsamples:
        maps.append(layer(maps[-1]))
    return [*maps, net.bottleneck(maps[-1])]


def resnet_layers(net, x):
    x = net.maxpool(net.act(net.bn1(net.conv1(x))))
    maps = []
    for layer in (net.layer1, net.layer2, net.layer3):
        x = layer(x)
        maps.append(x)
    return maps


MONAI = {
    "resnet10": (
        lambda: ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 10], spatial_dims=3, n_input_channels=1),
        resnet_layers,
    ),
    "segresnet": (lambda: SegResNet(3, 8, 1, 2), lambda net, x: net.encode(x)[1]),
    "dynunet": (lambda: DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 12, 16]), dynunet_encoder),
}


class Network:
    """A network as a function of images, mask and mode, that keeps nothing from call to call."""

    def __init__(self, net, run):
        self.net, self.run = net.double(), run
        self.state = {key: value.clone() for key, value in net.state_dict().items()}

    def __call__(self, x, visible=None, training=True):
        self.net.load_state_dict(self.state)
        self.net.train(training)
        torch.manual_seed(0)  # stochastic depth and dropout
        with torch.no_grad():
            if visible is None:
                return self.run(self.net, x)
            with hidden(visible):
                return self.run(self.net, x)


@pytest.fixture(scope="module", params=[*TIMM, *MONAI])
def case(request):
    """A network with its images and mask."""
    torch.manual_seed(0)
    if request.param in MONAI:
        make, run = MONAI[request.param]
        net = Network(make(), run)
        shape, grid = (
            ((3, 1, 32, 32, 32), (2, 2, 2)) if request.param == "resnet10" else ((3, 1, 32, 16, 32), (2, 1, 2))
        )
    else:
        net = Network(timm.create_model(request.param, features_only=True), lambda net, x: net(x))
        shape, grid = (3, 3, 96, 64), (3, 2)
    visible = torch.rand(3, 1, *grid, generator=torch.Generator().manual_seed(1)) > 0.5
    visible[(slice(None), slice(None), *(0,) * len(grid))] = True
    visible[(slice(None), slice(None), *(-1,) * len(grid))] = False
    return net, torch.randn(shape, dtype=torch.float64), visible


def worst(ones, others):
    """Largest difference between lists of maps, in units of each map's own size."""
    assert len(ones) == len(others)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ones, others, strict=True))


def test_hidden_pixels_never_change_a_feature(case):
    net, images, visible = case
    changed = images.where(visible_at(visible, images.shape[2:]), torch.full_like(images, 1e3))
    ones, others = net(images, visible), net(changed, visible)
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
    assert all(a.abs().max() > 1e-6 for a in ones)


def test_features_are_zero_at_hidden_positions(case):
    net, images, visible = case
    for training in (True, False):
        for x in net(images, visible, training):
            assert (x[~visible_at(visible, x.shape[2:]).expand_as(x)] == 0).all()


def test_with_everything_visible_it_is_the_plain_network(case):
    net, images, visible = case
    for training in (True, False):
        assert worst(net(images, torch.ones_like(visible), training), net(images, None, training)) < 1e-10


def test_a_batch_equals_its_samples(case):
    net, images, visible = case
    alone = [net(images[i : i + 1], visible[i : i + 1], False) for i in range(3)]
    assert worst(net(images, visible, False), [torch.cat(maps) for maps in zip(*alone, strict=True)]) < 1e-10


def test_hidden_positions_are_as_if_the_image_ended_there(case):
    """The last column of patches hidden: the others see what they would see in the image without it."""
    net, images, visible = case
    grid = visible.shape[-1]
    only = torch.ones_like(visible)
    only[..., grid - 1] = False
    kept = images.shape[-1] // grid * (grid - 1)
    for training in (True, False):
        ones = net(images, only, training)
        others = net(images[..., :kept], None, training)
        assert worst([x[..., : y.shape[-1]] for x, y in zip(ones, others, strict=True)], others) < 1e-10


# --- functions one by one


@pytest.fixture
def visible():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    return torch.stack([mask, ~mask])[:, None]


@pytest.fixture
def maps():
    return torch.randn(2, 4, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def seen(x, visible, sample):
    """Values of a sample at its visible positions: (c, n)."""
    return x[sample][:, visible_at(visible, x.shape[2:])[sample, 0]]


def test_batch_norm_takes_its_statistics_from_visible_positions(maps, visible):
    norm = nn.BatchNorm2d(4, momentum=0.3).double()
    with hidden(visible):
        out = norm(maps)
    values = torch.cat([seen(maps, visible, i) for i in range(2)], dim=1)
    torch.testing.assert_close(norm.running_mean, 0.3 * values.mean(1))
    torch.testing.assert_close(norm.running_var, 0.7 + 0.3 * values.var(1))
    expected = (values - values.mean(1, keepdim=True)) / (values.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(torch.cat([seen(out, visible, i) for i in range(2)], dim=1), expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_and_instance_norm_take_theirs_sample_by_sample(maps, visible, groups):
    norm = nn.InstanceNorm2d(4) if groups == 4 else nn.GroupNorm(groups, 4).double()
    with hidden(visible):
        out = norm(maps)
    for i in range(2):
        values = seen(maps, visible, i)[None]
        torch.testing.assert_close(seen(out, visible, i)[None], F.group_norm(values, groups))


def test_batch_norm_shares_statistics_between_processes(maps, visible):
    """Two processes, one after the other: the sums of both are known to each, as all-reduce makes them."""
    parts = [(maps[:1], visible[:1]), (maps[1:], visible[1:])]
    norm = nn.BatchNorm2d(4).double()
    with hidden(visible):
        expected = norm(maps)
    sums: list[list[torch.Tensor]] = [[], []]
    for number, (x, mask) in enumerate(parts):  # the sums that each would contribute first
        with hidden(mask, all_reduce=lambda value, number=number: sums[number].append(value) or value):
            nn.BatchNorm2d(4).double()(x)
    first = sums[0][0] + sums[1][0]
    mean = first[:-1] / first[-1]
    squares = sum((seen(x, mask, 0) - mean[:, None]).square().sum(1) for x, mask in parts)
    for number, (x, mask) in enumerate(parts):
        given = iter([first, squares])
        shared = nn.BatchNorm2d(4).double()
        with hidden(mask, all_reduce=lambda value, given=given: next(given)):
            torch.testing.assert_close(shared(x), expected[number : number + 1])
        torch.testing.assert_close(shared.running_var, norm.running_var)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        (lambda x: x.mean((2, 3)), lambda v: v.mean(1)),
        (lambda x: torch.mean(x, dim=(-2, -1), keepdim=True), lambda v: v.mean(1)),
        (lambda x: nn.AdaptiveAvgPool2d(1)(x), lambda v: v.mean(1)),
        (lambda x: nn.AdaptiveMaxPool2d((1, 1))(x), lambda v: v.amax(1)),
        (lambda x: x.amax((2, 3)), lambda v: v.amax(1)),
        (lambda x: x.amin((2, 3)), lambda v: v.amin(1)),
        (lambda x: x.sum((2, 3)), lambda v: v.sum(1)),
        (lambda x: x.norm(p=2, dim=(2, 3)), lambda v: v.norm(dim=1)),
        (lambda x: x.movedim(1, -1).mean((1, 2)), lambda v: v.mean(1)),
        (lambda x: x.movedim(1, -1).norm(p=2, dim=(1, 2), keepdim=True), lambda v: v.norm(dim=1)),
    ],
)
def test_global_reductions_are_over_visible_positions(maps, visible, reduce, expected):
    with hidden(visible) as context:
        context.mask((8, 12))
        out = reduce(maps)
    for i in range(2):
        torch.testing.assert_close(out[i].flatten(), expected(seen(maps, visible, i)))


def test_reductions_over_channels_are_left_alone(maps, visible):
    with hidden(visible) as context:
        context.mask((8, 12))
        for dims in (1, (1,), -3):
            assert torch.equal(maps.mean(dims), torch.mean(maps, 1))
            assert torch.equal(maps.amax(dims), torch.amax(maps, 1))


@pytest.mark.parametrize("counts", [True, False])
def test_averages_in_windows_leave_hidden_positions_out(visible, counts):
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    with hidden(visible):
        out = F.avg_pool2d(x, 3, 1, 1, count_include_pad=counts)
    mask = visible_at(visible, (8, 12))
    for b, i, j in [(0, 3, 3), (0, 3, 8), (1, 4, 3), (1, 0, 4)]:
        if not mask[b, 0, i, j]:
            assert out[b, 0, i, j] == 0
            continue
        window = (b, 0, slice(max(0, i - 1), i + 2), slice(max(0, j - 1), j + 2))
        share = mask[window].double().mean()  # of the positions that plain pooling would have counted
        plain = F.avg_pool2d(x * mask, 3, 1, 1, count_include_pad=counts)[b, 0, i, j]
        torch.testing.assert_close(out[b, 0, i, j], plain / share)


def test_a_maximum_does_not_see_hidden_positions(visible):
    x = -torch.rand(2, 1, 8, 12) - 1  # all below zero, so that a zero would win
    with hidden(visible):
        out = F.max_pool2d(x, 3, 2, 1)
    mask = visible_at(visible, out.shape[2:])
    assert (out[mask] < -1).all()
    assert (out[~mask] == 0).all()


def test_functions_declared_safe_are_left_as_they_are(maps, visible):
    with hidden(visible, safe=[F.interpolate]):
        assert torch.equal(F.interpolate(maps, scale_factor=2), F.interpolate(maps, scale_factor=2))


def test_maps_whose_patches_begin_elsewhere_are_refused():
    """32 positions and 30 are both multiples of the grid's 2, but not of each other."""
    everything = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"does not divide a feature map of \(30, 30\)"), hidden(everything):
        nn.Conv2d(1, 1, 3)(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_under_autocast_hidden_pixels_change_nothing(name):
    net = timm.create_model(name, features_only=True)
    visible = torch.tensor([[[[True, False], [False, True]]]])
    images = torch.randn(1, 3, 64, 64)
    changed = images.where(visible_at(visible, (64, 64)), 100.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), hidden(visible):
        ones, others = net.eval()(images), net(changed)
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
