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
from hyspark.models.masking.mask import draw_visible, visible_at
from hyspark.models.masking.patches import PATCH_EDGES, Patches

WIDTHS = (6, 12, 12, 24, 48)


def dense_map(visible, edge, channels=2):
    """A map with a value of its own at every voxel."""
    shape = (len(visible), channels, *(g * edge for g in visible.shape[2:]))
    return torch.arange(1.0, 1 + np.prod(shape)).view(shape)


def cut_with_halo(x, visible, edge):
    """What `with_halo` should give, patch by patch from the dense map with hidden voxels zeroed."""
    axes = visible.ndim - 2
    padded = F.pad(torch.where(visible_at(visible, x.shape[2:]), x, 0), (1, 1) * axes)
    patches = []
    for sample, _, *place in visible.nonzero().tolist():
        corner = tuple(slice(p * edge, (p + 1) * edge + 2) for p in place)
        patches.append(padded[(sample, slice(None), *corner)])
    return torch.stack(patches)


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


@pytest.mark.parametrize("edge", PATCH_EDGES)
@settings(max_examples=20, deadline=None)
@given(visible=masks())
def test_the_halo_is_cut_from_the_zeroed_map(visible, edge):
    x, patches = dense_map(visible, edge), Patches(visible)
    assert torch.equal(patches.with_halo(patches.pack(x)), cut_with_halo(x, visible, edge))


@pytest.mark.parametrize("edge", [1, 2, 4])
@pytest.mark.parametrize("visible", [every_neighbourhood_in_2d(), neighbourhoods_in_3d()], ids=["2d", "3d"])
def test_the_halo_in_every_neighbourhood(visible, edge):
    x, patches = dense_map(visible, edge, channels=1), Patches(visible)
    assert torch.equal(patches.with_halo(patches.pack(x)), cut_with_halo(x, visible, edge))


@pytest.mark.parametrize("edge", [1, 2, 4])
@pytest.mark.parametrize("visible", [every_neighbourhood_in_2d(), neighbourhoods_in_3d()[::5]], ids=["2d", "3d"])
def test_the_gradient_of_the_halo_in_every_neighbourhood(visible, edge):
    x, patches = dense_map(visible, edge, channels=1).double().requires_grad_(), Patches(visible)
    expected = cut_with_halo(x, visible, edge)
    weight = torch.randn_like(expected)
    (of_dense,) = torch.autograd.grad((expected * weight).sum(), x)
    (of_packed,) = torch.autograd.grad((patches.with_halo(patches.pack(x)) * weight).sum(), x)
    torch.testing.assert_close(of_packed, of_dense)


def test_the_gradient_of_the_halo_numerically():
    patches = Patches(torch.tensor([[True, True, False], [False, True, True]]).view(2, 1, 1, 3))
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(patches.with_halo, x)


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
    for masked, packed in zip(errors["masked"], errors["packed"], strict=True):
        assert 0 < packed < max(2 * masked, rounding)


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


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_work_is_proportional_to_the_visible_patches(count):
    """Multiplications of the convolutional part, by torch's own count: visible / all of the masked ones, but for the
    depthwise convolution of one voxel a patch, which is dense.
    """
    visible = torch.zeros(1, 1, 12, dtype=torch.bool)
    visible[..., :count] = True
    visible = visible.view(1, 1, 2, 3, 2)
    net, volumes = encoder_for(3).requires_grad_(False), torch.rand(1, 1, 32, 48, 32)
    flops = {}
    for compute in ("masked", "packed"):
        net.compute = compute
        with FlopCounterMode(display=False) as counter:
            net(volumes, visible)
        flops[compute] = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "conv" in str(name))
    dense = 2 * 27 * 48 * 12
    assert flops["packed"] - dense == (flops["masked"] - dense) * count / 12


@pytest.mark.parametrize("training", [True, False])
def test_the_convolutional_part_compiles_without_a_graph_break(training):
    visible = draw_visible((2, 2, 2), 0.5, [torch.Generator().manual_seed(0)])
    net, patches = encoder_for(3).embeddings.requires_grad_(training), Patches(visible)
    x = patches.pack(torch.rand(1, 1, 32, 32, 32))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(x, patches), net(x, patches), strict=True):
        torch.testing.assert_close(one, other)
