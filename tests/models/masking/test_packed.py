"""Networks without knowledge of masks compute the same under `packed` as under `hidden`, gradients included."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hyspark.models.masking.context import hidden
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


@pytest.mark.parametrize("layer", [
    nn.Conv2d(2, 4, 7, padding=3),
    nn.Conv2d(2, 4, 7, 4, padding=3),
    nn.Conv2d(2, 4, 3, padding=6, dilation=6),
    nn.Conv2d(2, 4, 5, padding="same"),
    nn.Conv2d(2, 4, 1, 2),
    nn.Conv2d(2, 4, (1, 3), padding=(0, 1)),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 4, 3, 2)),
    nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveMaxPool2d(1),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
    nn.InstanceNorm2d(2),
], ids=str)  # fmt: skip
def test_layers_with_windows_across_patches(layer):
    visible, images = some_visible(2, (3, 2)), torch.randn(2, 2, 24, 16, dtype=torch.float64)
    layer = layer.double()
    with hidden(visible):
        expected = layer(images)
    with packed(visible, 8) as context:
        out = layer(context.pack(images))
    dense = context.unpack(out)
    if expected.shape[2:] == (1, 1):
        first = [int(i) for i in context.first]
        dense = out[first]
    torch.testing.assert_close(dense, expected)


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
