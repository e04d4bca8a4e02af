"""Norms under a mask: values against means over the visible values taken one by one, gradients against differences."""

import pytest
import torch
from torch import nn

from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.masked_functions import identity
from hyspark.models.masking.masked_norms import MaskedNorm

EPS = 1e-5


def normalised(values):
    return (values - values.mean()) / (values.var(unbiased=False) + EPS).sqrt()


def by_hand(layer, x, visible):
    """Normalise each group of visible values on its own; convolutions take and give zeros at hidden positions."""
    mask = visible_at(visible, x.shape[2:]).expand_as(x)
    if not isinstance(layer, nn.BatchNorm3d | nn.InstanceNorm3d | nn.GroupNorm):
        out = layer(x)
        return out * visible_at(visible, out.shape[2:])
    out = torch.zeros_like(x)
    samples = [slice(None)] if isinstance(layer, nn.BatchNorm3d) else [slice(b, b + 1) for b in range(len(x))]
    width = x.shape[1] // layer.num_groups if isinstance(layer, nn.GroupNorm) else 1
    for sample in samples:
        for channel in range(0, x.shape[1], width):
            group = sample, slice(channel, channel + width)
            out[group][mask[group]] = normalised(x[group][mask[group]])
    return out


def test_a_network_with_three_norms_computes_what_its_definition_says(make_visible):
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.GELU()),
        *(nn.Conv3d(4, 6, 3, 2, 1), nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU(0.1)),
        *(nn.Conv3d(6, 6, 5, 2, 2, groups=3), nn.GroupNorm(2, 6)),
    ).double()
    visible, x = make_visible(2, (3, 2, 2)), torch.randn(2, 1, 12, 8, 8, dtype=torch.double)
    expected = x * visible_at(visible, x.shape[2:])
    for layer in layers:
        expected = by_hand(layer, expected, visible)
    with hidden(visible):
        assert torch.allclose(layers(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("over", [(0, 2, 3), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("num_weights", [0, 1, 2])
def test_gradients_of_a_norm_equal_finite_differences(over, num_weights, make_visible):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    mask = visible_at(make_visible(2, (2, 2)), (4, 4))
    weights = [torch.randn(1, 3, 1, 1, dtype=torch.double, requires_grad=True) for _ in range(num_weights)]
    num = mask.expand_as(x).sum(over, keepdim=True)

    def norm(x, *weights):
        weight, bias = (*weights, None, None)[:2]
        return MaskedNorm.apply(x, weight, bias, mask, num, over, EPS, identity)[0]

    assert torch.autograd.gradcheck(norm, (x, *weights))
