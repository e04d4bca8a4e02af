"""Networks without knowledge of masks compute the same under `packed` as under `hidden`, gradients included."""

import itertools
import math
from functools import partial

import monai
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hyspark.models.blocks import ChannelNorm
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.packed import packed
from tests.models.masking.test_context_networks import MONAI, TIMM


def some_visible(num_samples, grid):
    """Masks with different numbers of patches, the first of which is visible and the last hidden."""
    visible = torch.rand(num_samples, 1, *grid, generator=torch.Generator().manual_seed(1)) > 0.5
    visible.view(num_samples, -1)[:, 0], visible.view(num_samples, -1)[:, -1] = True, False
    assert len(set(visible.flatten(1).sum(1).tolist())) > 1
    return visible


@pytest.fixture(params=[*TIMM, *MONAI])
def case(request):
    """A network, a function that runs it, images, mask and patch."""
    torch.manual_seed(0)
    if request.param in MONAI:
        make, run = MONAI[request.param]
        return make().double(), run, torch.randn(3, 1, 32, 32, 32, dtype=torch.float64), some_visible(3, (2, 2, 2)), 16
    net = timm.create_model(request.param, features_only=True).double()
    return net, lambda net, x: net(x), torch.randn(3, 3, 96, 64, dtype=torch.float64), some_visible(3, (3, 2)), 32


def gradients(net, maps, images):
    """Gradients of a fixed weighting of dense maps, for images and all weights."""
    generator = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in maps)
    wanted = [images, *(p for p in net.parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


def check_close(ones, others):
    for a, b in zip(ones, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("training", [True, False])
def test_maps_gradients_and_statistics_equal_those_under_hidden(case, training):
    net, run, images, visible, patch = case
    net.train(training)
    images.requires_grad_()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with hidden(visible):
        expected = list(run(net, images))
    of_hidden, statistics = gradients(net, expected, images), [x.clone() for x in net.buffers()]
    net.load_state_dict(before)
    with packed(visible, patch) as context:
        maps = [context.unpack(x) for x in run(net, context.pack(images))]
    check_close(maps, expected)
    check_close(gradients(net, maps, images), of_hidden)
    check_close([x.double() for x in net.buffers()], [x.double() for x in statistics])


class ChannelsLast(nn.Sequential):
    """Layers of a map with channels last."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(2, 4, 7, padding=3),
    nn.Conv2d(2, 4, 7, 4, padding=3),
    nn.Conv2d(2, 4, 3, padding=6, dilation=6),
    nn.Conv2d(2, 4, 5, padding="same"),
    nn.Conv2d(2, 4, 1, 2),
    nn.Conv2d(2, 4, (1, 3), padding=(0, 1)),
    nn.Conv2d(2, 4, 9, padding=4),
    nn.Conv2d(2, 4, 19, padding=9),
    nn.Conv2d(2, 2, 3, padding=1, groups=2),
    nn.Conv2d(2, 4, 4, 2, padding=1),
    nn.Sequential(nn.Conv2d(2, 4, 8, 8), nn.Conv2d(4, 4, 3, padding=1)),
    nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(2, 64, 3, padding=1), nn.Conv2d(64, 4, 3, 2, padding=1)),
    nn.ConvTranspose2d(2, 4, 2, 2),
    nn.ConvTranspose2d(2, 4, 4, 2, 1),
    nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, groups=2),
    nn.Sequential(nn.Conv2d(2, 4, (1, 2), (1, 2)), nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 2, 2)),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 4, 3, 2)),
    nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveMaxPool2d(1),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
    nn.InstanceNorm2d(2),
    nn.InstanceNorm2d(2, affine=True),
    nn.GroupNorm(1, 2),
    nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 3, padding=1), nn.InstanceNorm2d(6)),
    ChannelNorm(2),
    GlobalResponseNorm(2, channels_last=False),
    ChannelsLast(nn.LayerNorm(2), GlobalResponseNorm(2), nn.Linear(2, 4)),
    nn.Dropout2d(0.5),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5), nn.Conv2d(2, 2, 1)),
    DropPath(0.5),
    torchvision.ops.StochasticDepth(0.5, "row"),
    monai.networks.layers.DropPath(0.5),
], ids=str)  # fmt: skip
def test_layers_compute_what_they_compute_under_hidden(layer):
    visible, images = some_visible(2, (3, 2)), torch.randn(2, 2, 24, 16, dtype=torch.float64)
    layer = layer.double()
    torch.manual_seed(3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    images.requires_grad_()
    weights = list(layer.parameters())
    context = packed(visible, 8)
    found = []
    for of_images in (
        lambda: hidden(visible),
        lambda: context,
    ):
        torch.manual_seed(4)
        with of_images():
            found.append(layer(context.pack(images) if found else F.max_pool2d(images, 1)))  # its size becomes known
    expected, out = found
    if max(expected.shape[2:]) == 1:
        dense = out[context.first]
    else:  # pointwise layers may leave anything at hidden positions
        dense, expected = context.unpack(out), expected.where(visible_at(visible, expected.shape[2:]), 0)
    torch.testing.assert_close(dense, expected)
    wanted = [images, *weights]
    of_expected, of_dense = (torch.autograd.grad(x.square().sum(), wanted) for x in (expected, dense))
    torch.testing.assert_close(of_dense, of_expected)


def test_pooled_values_with_as_many_channels_as_there_are_patches():
    """Neither weights nor running statistics are taken for patches."""
    visible = some_visible(2, (3, 2))
    num = int(visible.sum())
    images = torch.randn(2, num, 24, 16, dtype=torch.float64)
    conv, norm = nn.Conv2d(num, num, 1).double(), nn.BatchNorm2d(num).double()

    def gates(x):
        weight = conv.weight * 2  # no parameter, as where weights are standardised
        return norm(F.conv2d(F.relu(x).mean((2, 3), keepdim=True), weight))

    with hidden(visible):
        expected = gates(F.max_pool2d(images, 1))
    statistics = norm.running_var.clone()
    norm.reset_running_stats()
    with packed(visible, 8) as context:
        found = gates(F.max_pool2d(context.pack(images), 1))
    torch.testing.assert_close(found, expected[context.sample])
    torch.testing.assert_close(norm.running_var, statistics)


@pytest.mark.parametrize("name", ["mean", "sum", "amax", "amin"])
@pytest.mark.parametrize("keepdim", [True, False])
def test_reductions_are_of_samples(name, keepdim):
    visible, images = some_visible(2, (3, 2)), torch.randn(2, 2, 24, 16, dtype=torch.float64)
    with hidden(visible):
        F.max_pool2d(images, 1)  # makes the size of the maps known
        expected = getattr(images, name)((2, 3), keepdim=keepdim)
        total = getattr(images, name)()
    with packed(visible, 8) as context:
        patches = F.max_pool2d(context.pack(images), 1)
        found = getattr(patches, name)((2, 3), keepdim=keepdim)
        torch.testing.assert_close(getattr(patches, name)(), total)
    torch.testing.assert_close(found, expected[context.sample])


def test_hidden_patches_cost_no_convolution():
    net, visible = timm.create_model("resnet18", features_only=True).eval(), torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    visible[:, :, :2, :2] = True  # a quarter
    images = torch.randn(2, 3, 128, 128)
    flops = []
    for context in (hidden(visible), packed(visible, 32)):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), context:
            net(images if isinstance(context, hidden) and not isinstance(context, packed) else context.pack(images))
        flops.append(counter.get_total_flops())
    assert math.isclose(flops[1], flops[0] / 4)


def test_what_does_not_fit_patches_is_refused():
    visible = some_visible(2, (2, 2))
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="visible: expected bool"):
        packed(visible, 8).pack(images)
    with packed(visible, 16) as context:
        patches = context.pack(images)
        with pytest.raises(ValueError, match="expected a multiple of the network's total stride"):
            F.max_pool2d(F.max_pool2d(patches, 16), 2)
        with pytest.raises(ValueError, match="expected padding that gives size / stride outputs"):
            F.conv2d(patches, torch.ones(1, 3, 3, 3))
        for function in (
            lambda: F.interpolate(patches, scale_factor=2),
            lambda: F.pad(patches, (1, 1, 1, 1), mode="reflect"),
            lambda: F.conv2d(F.pad(patches, (1, 1, 1, 1)), torch.ones(1, 3, 3, 3), padding=1),
            lambda: F.conv2d(F.relu(F.pad(patches, (1, 1, 1, 1))), torch.ones(1, 3, 3, 3), padding=1),
            lambda: patches.softmax(3),
            lambda: patches.mean(3),
            lambda: patches.flatten(1),
        ):
            with pytest.raises(NotImplementedError, match="mixes positions"):
                function()


def test_functions_declared_safe_are_left_alone():
    visible, images = some_visible(2, (2, 2)), torch.randn(2, 3, 32, 32)
    with packed(visible, 16, safe=[F.interpolate]) as context:
        assert F.interpolate(context.pack(images), scale_factor=2).shape[2:] == (32, 32)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 1)])
def test_patches_with_an_edge_per_axis(stride):
    net = nn.Sequential(
        nn.Conv3d(1, 4, (1, 3, 3), stride, padding=(0, 1, 1)),
        nn.InstanceNorm3d(4, affine=True),
        nn.Conv3d(4, 4, 3, 2, padding=1),
        nn.LeakyReLU(inplace=True),
        nn.Conv3d(4, 4, 5, padding=2),
    ).double()
    patch = tuple(2 * s for s in stride)
    visible = some_visible(2, (3, 2, 2))
    images = torch.randn(2, 1, *(g * p for g, p in zip((3, 2, 2), patch, strict=True)), dtype=torch.float64)
    with hidden(visible):
        expected = net(images)
    with packed(visible, patch) as context:
        out = context.unpack(net(context.pack(images)))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_precision_of_dense_convolutions_with_statistics_in_fp32(dtype):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.Conv2d(16, 4, 3, padding=1)]
    net, visible, images = nn.Sequential(*layers), some_visible(2, (3, 2)), 100 * torch.randn(2, 2, 24, 16)
    with hidden(visible):
        exact = net(images)
    context = packed(visible, 8)
    with torch.autocast("cpu", dtype), context:
        out = net(context.pack(images))
    assert out.dtype == dtype
    torch.testing.assert_close(context.unpack(out).float(), exact, rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_batch_norm_has_the_statistics_of_all_processes():
    """Two processes with the same batch have its statistics; the variance for the running one is of twice as many."""
    visible, images = some_visible(2, (3, 2)), torch.randn(2, 2, 24, 16, dtype=torch.float64)
    norm, alone = nn.BatchNorm2d(2).double(), nn.BatchNorm2d(2).double()
    calls = []

    def all_reduce(x):
        calls.append(x)
        return 2 * x

    with packed(visible, 8, all_reduce=all_reduce) as context:
        out = norm(context.pack(images))
    with packed(visible, 8) as context:
        expected = alone(context.pack(images))
    assert len(calls) == 2
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(norm.running_mean, alone.running_mean)


def kept_bytes(call):
    """Memory that remains allocated after a call whose result is kept."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
    del out
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, nn.InstanceNorm3d, partial(nn.GroupNorm, 2)])
def test_what_is_kept_for_the_backward_pass(norm):
    """Masked as much as dense, packed the visible fraction of it: no masked or bordered copy."""
    layers = [(nn.Conv3d(8, 8, 3, padding=1), norm(8), nn.LeakyReLU(inplace=True)) for _ in range(4)]
    net = nn.Sequential(*itertools.chain(*layers), nn.MaxPool3d(3, 2, 1))
    visible = torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
    visible[..., 0] = True
    images = torch.rand(1, 8, 32, 32, 32)

    def under(context, x):
        with context:
            return net(x)

    context = packed(visible, 16)
    patches = context.pack(images)
    dense = kept_bytes(lambda: net(images))
    assert kept_bytes(lambda: under(hidden(visible), images)) < 1.05 * dense
    assert kept_bytes(lambda: under(context, patches)) < 0.55 * dense
