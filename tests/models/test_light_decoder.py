"""The light decoder for any strides: its steps, its widths, and its composed up-convolution."""

import pytest
import torch
from torch import nn

from hyspark.models import light_decoder
from hyspark.models.light_decoder import LightDecoder, Projection, build_projections, up_convolution, up_steps

THICK = [(20, (4, 8, 8)), (12, (4, 4, 4)), (8, (1, 2, 2))]
"""A last stage of (1, 2, 2), then ratios of (4, 2, 2), and (1, 2, 2) to the input."""


@pytest.mark.parametrize(
    ("strides", "steps", "levels"),
    [
        ([(8,), (4,), (2,)], [(2,), (2,), (2,)], [0, 1, 2]),
        ([(32, 32), (4, 4)], [(2, 2)] * 5, [0, 3]),
        ([(2, 4)], [(2, 2), (1, 2)], [0]),
        ([(4, 8, 8), (4, 4, 4), (1, 2, 2)], [(1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 2, 2)], [0, 1, 3]),
    ],
)
def test_axes_that_differ_double_in_each_step(strides, steps, levels):
    assert up_steps([(1, stride) for stride in strides]) == (steps, levels)


@pytest.mark.parametrize("strides", [[(6, 2)], [(4, 2), (2, 4)], [(4, 4), (4, 4)], [(1, 1)], [(2, 0)]])
def test_strides_that_no_step_leads_from_are_refused(strides):
    with pytest.raises(ValueError, match="powers of two that decrease to the input, got"):
        up_steps([(1, stride) for stride in strides])


def test_a_decoder_of_unequal_strides_reaches_the_input():
    width, size = 32, (8, 16, 24)
    project = build_projections(Projection, THICK, width, 3)
    decoder = LightDecoder(THICK, width, 3, out_channels=2)
    assert [p.project.out_channels for p in project] == [32, 16, 4]
    assert [p.project.kernel_size[0] for p in project] == [1, 3, 3]
    assert [level.fuse is not None for level in decoder.levels] == [False, True, False, True]
    assert [tuple(level.up.weight.shape[2:]) for level in decoder.levels] == up_steps(THICK)[0]
    maps = [torch.randn(2, c, *(s // r for s, r in zip(size, stride, strict=True))) for c, stride in THICK]
    out = decoder([layer(x) for layer, x in zip(project, maps, strict=True)])
    assert out.shape == (2, 2, *size)
    out.square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_the_width_halves_at_each_step():
    with pytest.raises(
        ValueError,
        match=r"decoder_width: expected a multiple of 16, because it halves 4 times, at each step from "
        r"stride \(4, 8, 8\) to the input, got 24",
    ):
        build_projections(Projection, THICK, 24, 3)
    with pytest.raises(ValueError, match=r"multiple of 16, .* got 0"):
        build_projections(Projection, THICK, 0, 3)


@pytest.mark.parametrize("ratio", [(2, 2), (1, 2), (2, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("size", [(2, 3, 4), (1, 1, 2)])
def test_the_composed_up_convolution_equals_its_two_steps(monkeypatch, size, ratio):
    axes, size = len(ratio), size[-len(ratio) :]
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    up = torch.randn(8, 8, *ratio, dtype=torch.float64, requires_grad=True)
    conv = torch.randn(4, 8, *(3,) * axes, dtype=torch.float64, requires_grad=True)
    results = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(light_decoder, "COMPOSE_FROM", threshold)
        out = up_convolution(x, up, conv)
        weights = torch.linspace(0, 1, out[0].numel(), dtype=torch.float64).view_as(out[0])
        results.append((out, *torch.autograd.grad((out * weights).sum(), (x, up, conv))))
    assert results[0][0].shape == (2, 4, *(r * s for r, s in zip(ratio, size, strict=True)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    layers = (nn.ConvTranspose2d, nn.Conv2d) if axes == 2 else (nn.ConvTranspose3d, nn.Conv3d)
    first = layers[0](8, 8, ratio, stride=ratio, bias=False, dtype=torch.float64)
    second = layers[1](8, 4, 3, padding=1, bias=False, dtype=torch.float64)
    first.weight.data, second.weight.data = up.detach(), conv.detach()
    torch.testing.assert_close(results[0][0], second(first(x)))
