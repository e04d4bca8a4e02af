"""Reconstructed patches: their draw, and patches with a border by loops."""

import pytest
import torch
from torch.nn import functional as F

from hyspark.models.masking.borders import pack_with_border
from hyspark.models.masking.patches import Patches
from hyspark.models.masking.reconstructed import draw_reconstructed


def generators(num, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(num)]


@pytest.mark.parametrize(("fraction", "num"), [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_hidden_patches_are_drawn_the_same_number_of_each_sample(make_visible, fraction, num):
    visible = make_visible(5, (2, 2, 3), mask_ratio=2 / 3)
    drawn = draw_reconstructed(visible, fraction, generators(5))
    assert drawn.shape == visible.shape
    assert drawn.flatten(1).sum(1).tolist() == [num] * 5
    assert not (drawn & visible).any()


def test_a_draw_is_of_the_sample_alone_and_reaches_every_hidden_patch(make_visible):
    visible = make_visible(40, (3, 3), mask_ratio=0.5)
    drawn = draw_reconstructed(visible, 0.5, generators(40))
    assert torch.equal(draw_reconstructed(visible[7:8], 0.5, generators(1, 7)), drawn[7:8])
    same = draw_reconstructed(visible[:1].expand(40, -1, -1, -1), 0.5, generators(40))
    assert torch.equal(same.any(0, keepdim=True), ~visible[:1])


def test_a_sample_without_a_hidden_patch_is_refused():
    with pytest.raises(ValueError, match="visible: expected at least one hidden patch in every sample"):
        draw_reconstructed(torch.ones(1, 1, 2, 2, dtype=torch.bool), 0.5, generators(1))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("grid", "edges"), [((2, 3), (4, 1)), ((2, 1, 3), (2, 3, 1))])
def test_a_border_is_of_the_dense_map(make_visible, grid, edges, width):
    chosen = make_visible(3, grid)
    size = [g * edge for g, edge in zip(grid, edges, strict=True)]
    x = torch.randn(3, 2, *size, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, (width, width) * len(grid))
    expected = []
    for sample, _, *place in chosen.nonzero().tolist():
        box = tuple(slice(p * e, (p + 1) * e + 2 * width) for p, e in zip(place, edges, strict=True))
        expected.append(padded[(sample, slice(None), *box)])
    patches = Patches(chosen)
    out = pack_with_border(x, patches, width)
    assert torch.equal(out, torch.stack(expected))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    found, wanted = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, torch.stack(expected)))
    torch.testing.assert_close(found, wanted)
