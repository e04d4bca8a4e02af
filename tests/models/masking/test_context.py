"""Inside `hidden`, a network that knows nothing of masks computes without the hidden positions; outside, nothing
stays.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at


def cnn():
    """A plain network: (b, 2, h, w) -> (b, 3, h / 4, w / 4)."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 3, 1),
    )


@pytest.fixture
def visible(make_visible):
    return make_visible(2, (2, 3))


@pytest.fixture
def images():
    return torch.randn(2, 2, 32, 48)


def masked(images, visible):
    return images.where(visible_at(visible, images.shape[2:]), 0)


def test_an_unmodified_cnn_does_not_see_hidden_positions(images, visible):
    net = cnn()
    changed = images.where(visible_at(visible, images.shape[2:]), 1e6)
    with hidden(visible):
        one, other = (net(masked(x, visible)) for x in (images, changed))
    out_mask = visible_at(visible, one.shape[2:]).expand_as(one)
    assert torch.equal(one, other)
    assert (one[~out_mask] == 0).all()
    assert (one[out_mask] != 0).all()


def test_every_layer_is_masked_not_only_the_first_and_the_last(images, visible):
    net = cnn()
    expected = masked(images, visible)
    for layer in net:
        expected = masked(layer(expected), visible)
    with hidden(visible):
        assert torch.equal(net(masked(images, visible)), expected)


def test_channel_norm_is_zero_at_hidden_positions_and_unchanged_at_visible_ones(visible):
    norm = nn.LayerNorm(4)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 12, 4)  # channels last
    with hidden(visible):
        out = norm(x)
    mask = visible_at(visible, (8, 12)).movedim(1, -1).expand_as(out)
    assert torch.equal(out[mask], norm(x)[mask])
    assert (out[~mask] == 0).all()


def test_not_a_number_at_hidden_positions_of_a_map_does_not_pass_a_convolution_of_one_voxel(visible):
    x = torch.randn(2, 3, 4, 6).where(visible_at(visible, (4, 6)), float("nan"))
    with hidden(visible):
        assert F.conv2d(x, torch.randn(3, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolution_and_pool_in_any_number_of_axes(make_visible, axes):
    visible = make_visible(1, (3,) * axes)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](1, 2, 3, padding=1)
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1](2)
    x = torch.randn(1, 1, *(6,) * axes)
    with hidden(visible):
        convolved, pooled = conv(x), pool(x)
    assert torch.equal(convolved, masked(conv(masked(x, visible)), visible))
    assert torch.equal(pooled, masked(pool(x), visible))


def test_nothing_stays_behind(images, visible):
    net = cnn()
    before = net(images)
    with hidden(visible):
        inside = net(images)
    assert not torch.equal(inside, before)
    assert torch.equal(net(images), before)


def test_nothing_stays_behind_after_an_exception(images, visible):
    net = cnn()
    before = net(images)
    with pytest.raises(NotImplementedError), hidden(visible):
        F.interpolate(images, scale_factor=2)
    with pytest.raises(KeyError), hidden(visible):
        raise KeyError
    assert torch.equal(net(images), before)


def test_an_inner_block_does_not_disturb_the_outer_one(images, visible):
    net = cnn()
    other = ~visible
    with hidden(visible):
        expected = net(images)
    with hidden(visible):
        with hidden(other):
            inner = net(images)
        assert torch.equal(net(images), expected)
    assert not torch.equal(inner, expected)


REFUSED = {
    "instance_norm": lambda x: nn.InstanceNorm2d(2, track_running_stats=True)(x),
    "interpolate": lambda x: nn.Upsample(scale_factor=2)(x),
    "grid_sample": lambda x: F.grid_sample(x, torch.zeros(2, 4, 4, 2), align_corners=False),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "multi_head_attention_forward": lambda x: nn.MultiheadAttention(48, 2)(x[:, 0], x[:, 0], x[:, 0]),
    "matmul": lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "softmax": lambda x: x.flatten(2).softmax(-1),
    "linear": lambda x: nn.Linear(32 * 48, 8)(x.flatten(2)),
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(2, -1),
    "conv1d": lambda x: nn.Conv1d(2, 2, 3, padding=1)(x.flatten(2)),
    "adaptive_avg_pool2d": lambda x: nn.AdaptiveAvgPool2d(2)(x),
    "adaptive_max_pool2d": lambda x: nn.AdaptiveMaxPool2d(2)(x),
    "max_pool2d_with_indices": lambda x: nn.MaxPool2d(2, return_indices=True)(x),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
    "roll": lambda x: torch.roll(x, 1, dims=2),
    "Tensor.roll": lambda x: x.roll(1, dims=2),
    "flip": lambda x: torch.flip(x, (2,)),
    "Tensor.cumsum": lambda x: x.cumsum(3),
    "cat": lambda x: torch.cat([x, x], dim=2),
    "mean": lambda x: x.mean(2),
    "var": lambda x: x.var((2, 3)),
    "layer_norm": lambda x: F.layer_norm(x, (32, 48)),
}
"""What mixes positions with no known form; the map was met by a convolution before."""


@pytest.mark.parametrize("name", REFUSED)
def test_functions_with_no_known_masked_form_are_refused_by_name(images, visible, name):
    with hidden(visible):
        F.conv2d(images, torch.ones(1, 2, 1, 1))  # so that the map is known
        with pytest.raises(NotImplementedError, match=rf"\b{name}\b.* mixes positions"):
            REFUSED[name](images)
    REFUSED[name](images)  # outside it is welcome


def test_a_map_that_the_grid_does_not_divide_is_refused(visible):
    with pytest.raises(ValueError, match="does not divide"), hidden(visible):
        nn.Conv2d(1, 1, 3)(torch.randn(2, 1, 32, 48))


def test_gradients_under_activation_checkpointing_are_the_same(images, visible):
    net = cnn()

    def run(x):
        with hidden(visible):
            return net(masked(x, visible))

    gradients = []
    for forward in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        x = images.clone().requires_grad_()
        forward(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in net.parameters())])
        net.zero_grad()
    assert all(g.abs().sum() > 0 for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
