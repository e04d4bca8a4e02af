"""The convolutional blocks compute what their docstrings say, on two and three axes."""

import pytest
import torch
from torch import nn

from hyspark.models.blocks import ChannelNorm, FusionBlock, MedNeXtBlock, MedNeXtUpBlock

SIZES = [(4, 6), (2, 4, 6)]


def pointwise(conv, x):
    """A 1^n convolution written as a matrix product."""
    weight = conv.weight.flatten(1)
    return torch.einsum("oc,bc...->bo...", weight, x) + conv.bias.view(-1, *(1,) * (x.ndim - 2))


def channel_norm(norm, x):
    mean = x.mean(1, keepdim=True)
    variance = x.var(1, keepdim=True, correction=0)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def instance_norm(x):
    axes = tuple(range(2, x.ndim))
    variance = x.var(axes, keepdim=True, correction=0)
    return (x - x.mean(axes, keepdim=True)) / (variance + 1e-5).sqrt()


def leaky_relu(x):
    return torch.where(x > 0, x, 0.01 * x)


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize("size", SIZES)
def test_channel_norm_acts_on_each_position_with_a_small_epsilon(size):
    norm = randomised(ChannelNorm(5))
    x = 1e-3 * torch.randn(2, 5, *size, dtype=torch.float64)  # small, so that epsilon counts
    torch.testing.assert_close(norm(x), channel_norm(norm, x))


@pytest.mark.parametrize("size", SIZES)
def test_mednext_block(size):
    block = randomised(MedNeXtBlock(4, 3, axes=len(size)))
    assert block.conv1.weight.shape == (4, 1, *(3,) * len(size))
    assert block.conv2.weight.shape[:2] == (12, 4)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = x + pointwise(block.conv3, gelu(pointwise(block.conv2, channel_norm(block.norm, block.conv1(x)))))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("size", SIZES)
def test_the_up_block_doubles_the_size(size):
    block = MedNeXtUpBlock(6, 4, 2, axes=len(size))
    assert block(torch.randn(2, 6, *size)).shape == (2, 4, *(2 * s for s in size))


@pytest.mark.parametrize("size", SIZES)
def test_the_up_block_pads_the_front_of_each_axis_with_zeros(size):
    block = randomised(MedNeXtUpBlock(6, 4, 2, axes=len(size)))
    out = block(torch.randn(2, 6, *size, dtype=torch.float64))
    for axis in range(2, out.ndim):
        assert (out.select(axis, 0) == 0).all()
        assert (out.narrow(axis, 1, out.shape[axis] - 1).flatten(1).abs().sum(1) > 0).all()
    inner = out[(..., *(slice(1, None),) * len(size))]
    assert (inner != 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_residual_of_the_up_block_stands_at_odd_positions(size):
    block = randomised(MedNeXtUpBlock(3, 4, 2, axes=len(size)))
    for layer in (block.conv3, block.res_conv):
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(block.conv3.weight)  # leaves the residual branch alone
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    expected = torch.zeros(1, 4, *(2 * s for s in size), dtype=torch.float64)
    weight = block.res_conv.weight.flatten(1)  # (c_in, c_out)
    expected[(..., *(slice(1, None, 2),) * len(size))] = torch.einsum("co,bc...->bo...", weight, x)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("size", SIZES)
def test_the_branch_of_the_up_block_is_norm_expansion_gelu_projection(size):
    block = randomised(MedNeXtUpBlock(3, 4, 2, axes=len(size)))
    nn.init.zeros_(block.res_conv.weight)
    nn.init.zeros_(block.res_conv.bias)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    up = block.conv1(x)
    assert up.shape[2:] == tuple(2 * s - 1 for s in size)
    branch = pointwise(block.conv3, gelu(pointwise(block.conv2, channel_norm(block.norm, up))))
    torch.testing.assert_close(block(x)[(..., *(slice(1, None),) * len(size))], branch)


@pytest.mark.parametrize("size", SIZES)
def test_fusion_block(size):
    block = randomised(FusionBlock(7, 4, axes=len(size)))
    skip = torch.randn(2, 5, *size, dtype=torch.float64)
    up = torch.randn(2, 2, *size, dtype=torch.float64)
    x = torch.cat([skip, up], dim=1)
    main = instance_norm(block.conv2(leaky_relu(instance_norm(block.conv1(x)))))
    expected = leaky_relu(main + instance_norm(pointwise(block.conv3, x)))
    assert expected.shape == (2, 4, *size)
    torch.testing.assert_close(block(skip, up), expected)


def test_the_norm_of_the_fusion_block_stores_nothing():
    assert {key.rsplit(".", 1)[0] for key in FusionBlock(4, 2).state_dict()} == {"conv1", "conv2", "conv3"}


def test_small_maps_in_bf16_have_repeatable_weight_gradients():
    block = MedNeXtBlock(24, 2).to(memory_format=torch.channels_last_3d)
    x = torch.randn(4, 24, 2, 2, 2).to(memory_format=torch.channels_last_3d)
    (expected,) = torch.autograd.grad(block(x).square().sum(), block.conv1.weight)
    for _ in range(10):
        torch.full((30000,), 1e30)  # leaves something behind in memory that is free again
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), block.conv1.weight)
        assert (gradient - expected).abs().max() < 0.05 * expected.abs().max()
