"""Packed compute equals masked compute: geometry by loops, then values and all gradients of the networks."""

import itertools
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hyspark import build_hyspark
from hyspark.models.encoder import HybridEncoder
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import draw_visible, visible_at
from hyspark.models.masking.packed import packed
from hyspark.models.masking.patches import Patches

WIDTHS = (6, 12, 12, 24, 48)
PATCH_EDGES = (16, 8, 4, 2, 1)
"""Voxels per axis of a patch at the five resolutions of the encoder."""


def dense_map(visible, edges, channels=2):
    """A map with a value of its own at every voxel."""
    edges = [edges] * (visible.ndim - 2) if isinstance(edges, int) else edges
    shape = (len(visible), channels, *(g * edge for g, edge in zip(visible.shape[2:], edges, strict=True)))
    return torch.arange(1.0, 1 + np.prod(shape)).view(shape)


def cut_with_border(x, visible, edges, before, after, value=0.0):
    """What `with_border` should give, patch by patch from the dense map with hidden voxels set to a value."""
    padded = F.pad(torch.where(visible_at(visible, x.shape[2:]), x, value), reverse_pairs(before, after), value=value)
    patches = []
    for sample, _, *position in visible.nonzero().tolist():
        corner = [slice(p * e, (p + 1) * e + b + a) for p, e, b, a in zip(position, edges, before, after, strict=True)]
        patches.append(padded[(sample, slice(None), *corner)])
    return torch.stack(patches)


def reverse_pairs(before, after):
    """Widths in the order of `F.pad`: last axis first."""
    return [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]


def every_neighbourhood_in_2d():
    """All 256 ways to hide the neighbours of a visible patch: bool (256, 1, 3, 3)."""
    visible = torch.tensor(list(itertools.product((False, True), repeat=9))).view(-1, 1, 3, 3)
    return visible[visible[:, 0, 1, 1]]


def neighbourhoods_in_3d():
    """Each of the 26 neighbours alone, each alone missing, and 200 random ones: bool (252, 1, 3, 3, 3). A halo voxel
    depends on the one neighbour it lies in, so these stand for all 2^26.
    """
    alone = torch.eye(27, dtype=torch.bool)
    random = torch.rand(200, 27, generator=torch.Generator().manual_seed(0)) < 0.5
    visible = torch.cat([alone, ~alone, random])
    visible[:, 13] = True
    return visible.view(-1, 1, 3, 3, 3)


@st.composite
def masks(draw):
    """Any mask on two or three axes in which every sample keeps at least one patch, also different numbers."""
    grid = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    num_samples = draw(st.integers(1, 3))
    n = int(np.prod(grid))
    rows = [draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)) for _ in range(num_samples)]
    return torch.tensor(rows).view(num_samples, 1, *grid)


@pytest.mark.parametrize("edge", PATCH_EDGES)
@settings(max_examples=20, deadline=None)
@given(visible=masks())
def test_packing_and_back(visible, edge):
    x, patches = dense_map(visible, edge), Patches(visible)
    mask = visible_at(visible, x.shape[2:])
    packed = patches.pack(x)
    assert packed.shape == (int(visible.sum()), 2, *(edge,) * (visible.ndim - 2))
    assert torch.equal(patches.unpack(packed), torch.where(mask, x, 0))
    fill = torch.tensor([-1.0, -2.0]).view(1, 2, *(1,) * (visible.ndim - 2))
    assert torch.equal(patches.unpack(packed, fill), torch.where(mask, x, fill))


@st.composite
def borders(draw):
    """Any mask with patches of any edges, and a border of any widths up to them."""
    visible = draw(masks())
    edges = draw(st.tuples(*[st.integers(1, 5)] * (visible.ndim - 2)))
    widths = [draw(st.tuples(*[st.integers(0, edge) for edge in edges])) for _ in range(2)]
    return visible, edges, *widths


@settings(max_examples=100, deadline=None)
@given(case=borders(), value=st.sampled_from([0.0, -np.inf]))
def test_the_border_is_cut_from_the_map_without_hidden_voxels(case, value):
    visible, edges, before, after = case
    x, patches = dense_map(visible, edges), Patches(visible)
    expected = cut_with_border(x, visible, edges, before, after, value)
    assert torch.equal(patches.with_border(patches.pack(x), before, after, value), expected)


@pytest.mark.parametrize("edge", [1, 2, 4])
@pytest.mark.parametrize("visible", [every_neighbourhood_in_2d(), neighbourhoods_in_3d()], ids=["2d", "3d"])
def test_the_border_in_every_neighbourhood(visible, edge):
    axes, x, patches = visible.ndim - 2, dense_map(visible, edge, channels=1), Patches(visible)
    ones = (1,) * axes
    expected = cut_with_border(x, visible, (edge,) * axes, ones, ones)
    assert torch.equal(patches.with_border(patches.pack(x), ones, ones), expected)


@settings(max_examples=50, deadline=None)
@given(case=borders())
def test_the_gradient_of_the_border(case):
    visible, edges, before, after = case
    x, patches = dense_map(visible, edges).double().requires_grad_(), Patches(visible)
    expected = cut_with_border(x, visible, edges, before, after)
    weight = torch.randn_like(expected)
    (of_dense,) = torch.autograd.grad((expected * weight).sum(), x)
    (of_packed,) = torch.autograd.grad((patches.with_border(patches.pack(x), before, after) * weight).sum(), x)
    torch.testing.assert_close(of_packed, of_dense)


def test_the_gradient_of_the_border_numerically():
    patches = Patches(torch.tensor([[True, True, False], [False, True, True]]).view(2, 1, 1, 3))
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patches.with_border(x, (1, 1), (1, 1)), x)


def test_a_sample_without_a_patch_is_refused():
    visible = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    visible[1] = False
    with pytest.raises(ValueError, match=r"at least one visible patch in every sample, got \[4, 0, 4\]"):
        Patches(visible)


def loss_and_gradients(net, volumes, weights, visible, compute):
    """The five maps, and the gradients of a random weighting of them with respect to volumes and all parameters."""
    net.compute = compute
    maps = net(volumes, visible)
    loss = sum((x.double() * w.view_as(x)).sum() for x, w in zip(maps, weights, strict=True))
    return maps, torch.autograd.grad(loss, (volumes, *net.parameters()))


def worst(one, other):
    """Largest difference relative to the largest value, over a list of tensors."""
    scales = [max(a.abs().max().item(), 1e-3) for a in one]
    return max((a - b).abs().max().item() / s for a, b, s in zip(one, other, scales, strict=True))


def encoder_for(axes, dtype=torch.float32, **options):
    torch.manual_seed(0)
    widths = WIDTHS if axes == 3 else (4, 8, 8, 16, 48)
    net = HybridEncoder(img_size=32, widths=widths, axes=axes, **options).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def inputs(visible, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    size = [16 * g for g in visible.shape[2:]]
    widths = (12, 12, 24, 48, 48) if len(size) == 3 else (8, 8, 16, 48, 48)
    volumes = torch.rand(len(visible), 1, *size, generator=generator).to(dtype).requires_grad_()
    edges = (16, 8, 4, 2, 1)
    shapes = [(len(visible), c, *(g * e for g in visible.shape[2:])) for c, e in zip(widths, edges, strict=True)]
    return volumes, [torch.randn(*shape, generator=generator).double() for shape in shapes]


@settings(max_examples=10, deadline=None)
@given(visible=masks())
def test_packed_equals_masked_exactly_but_for_rounding(visible):
    """In double precision, where nothing but a mistake can hide: values and all gradients."""
    net = encoder_for(visible.ndim - 2, torch.float64, depths=(1, 1, 2, 1, 1), vit_depth=2)
    volumes, weights = inputs(visible, torch.float64)
    masked, masked_gradients = loss_and_gradients(net, volumes, weights, visible, "masked")
    packed, packed_gradients = loss_and_gradients(net, volumes, weights, visible, "packed")
    assert worst(masked, packed) < 1e-12
    assert worst(masked_gradients, packed_gradients) < 1e-10


COUNTS = {"one": 1, "few": 3, "most": 11, "all": 12}


PRECISIONS = {"fp32": (nullcontext, 1e-5), "bf16": (lambda: torch.autocast("cpu", torch.bfloat16), 0.02)}


@cache
def exact_result(grid, count):
    """A mask that leaves a number of the 12 patches of two samples, and what double precision gives with it."""
    visible = draw_visible(grid, 1 - count / 12, [torch.Generator().manual_seed(i) for i in range(2)])
    assert visible.flatten(1).sum(1).tolist() == [count] * 2
    net = encoder_for(len(grid)).double()
    return visible, loss_and_gradients(net, *inputs(visible, torch.float64), visible, "masked")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("grid", [(2, 3, 2), (4, 3)])
def test_packed_is_as_near_to_the_exact_result_as_masked_is(grid, count, precision):
    """Exact is what double precision gives. Values and all gradients stay within the precision's rounding, or within
    twice the error that the masked reference itself makes there.
    """
    visible, exact = exact_result(grid, COUNTS[count])
    context, rounding = PRECISIONS[precision]
    errors = {}
    for compute in ("masked", "packed"):
        with context():
            results = loss_and_gradients(encoder_for(len(grid)), *inputs(visible), visible, compute)
        errors[compute] = [worst(one, other) for one, other in zip(exact, results, strict=True)]
    for of_masked, of_packed in zip(errors["masked"], errors["packed"], strict=True):
        assert 0 < of_packed < max(2 * of_masked, rounding)


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_the_whole_network_trains_the_same_way(precision):
    """Loss and gradients of every parameter through densify, decoder and loss; samples that keep different numbers."""
    visible = torch.ones(3, 1, 2, 1, 3, dtype=torch.bool)
    visible[0, 0, 0] = visible[1, 0, 1, 0, 1:] = visible[2, 0, :, :, 1] = False
    volumes = torch.rand(3, 1, 32, 16, 48)
    results = []
    for compute in ("masked", "packed"):
        torch.manual_seed(0)
        net = build_hyspark((32, 16, 48), compute=compute, widths=WIDTHS, decoder_width=16)
        if precision == torch.float64:  # in fp32, a value near the bend of an activation may lie on either side of it
            net, volumes = net.double(), volumes.double()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = net(volumes, visible).loss
        results.append([loss, *torch.autograd.grad(loss, tuple(net.parameters()))])
    assert worst(*results) < (1e-9 if precision == torch.float64 else 0.1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_work_is_proportional_to_the_visible_patches(count):
    """Multiplications of the convolutional part, by torch's own count: visible / all of the masked ones, but for the
    depthwise convolution of one voxel a patch, which is dense.
    """
    visible = torch.zeros(1, 1, 12, dtype=torch.bool)
    visible[..., :count] = True
    visible = visible.view(1, 1, 2, 3, 2)
    net, volumes = encoder_for(3).embeddings.requires_grad_(False), torch.rand(1, 1, 32, 48, 32)
    of_patches = packed(visible, 16)
    flops = []
    for context, x in ((hidden(visible), volumes), (of_patches, of_patches.pack(volumes))):
        with FlopCounterMode(display=False) as counter, context:
            net(x)
        flops.append(counter.get_total_flops())
    dense = 2 * 27 * 48 * 12
    assert flops[1] - dense == (flops[0] - dense) * count / 12


@pytest.mark.parametrize("training", [True, False])
def test_the_convolutional_part_compiles_without_a_graph_break(training):
    visible = draw_visible((2, 2, 2), 0.5, [torch.Generator().manual_seed(0)])
    encoder, volumes = encoder_for(3).requires_grad_(training), torch.rand(1, 1, 32, 32, 32)
    net, patches = encoder.embeddings, encoder.patches(volumes, visible)
    x = patches.pack(volumes)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with packed(patches, 16):
        for one, other in zip(compiled(x), net(x), strict=True):
            torch.testing.assert_close(one, other)
