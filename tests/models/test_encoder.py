"""The encoder: five maps, and hidden voxels that never change a visible feature.

Contracts of masking are kept by every way of computing (`compute`), against a network written out here by hand.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hyspark import build_hyspark
from hyspark.models.encoder import HybridEncoder, max_pool_2x, max_pool_by_axis
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import visible_at

WIDTHS = (6, 12, 12, 24, 48)
SIZES = [(32, 32, 32), (32, 48, 16), (48, 32)]
NOISE = {
    "random": lambda x: torch.randn_like(x),
    "large": lambda x: torch.full_like(x, 1e6),
    "nan": lambda x: torch.full_like(x, float("nan")),
    "infinite": lambda x: torch.full_like(x, float("-inf")),
}
PRECISIONS = {"fp32": nullcontext, "bf16": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.fixture(params=["masked", "packed"])
def compute(request):
    return request.param


@pytest.fixture
def build(make_encoder, compute):
    """build(size, **options) -> the encoder of a pre-training network, with random weights."""

    def make(size, **options):
        axes = {"axes": len(size)} if isinstance(size, tuple) else {}
        net = build_hyspark(size, compute=compute, **{"widths": WIDTHS, "decoder_width": 16, **axes, **options})
        net.encoder.load_state_dict(make_encoder(size, **axes, **options).state_dict())
        return net.encoder

    return make


def grid(size):
    return tuple(s // 16 for s in size)


def masked_by_hand(encoder, volumes, visible):
    """Section 2 of the paper, step by step: zero hidden positions after every convolution, norm and pool."""

    def mask(x):
        return torch.where(visible_at(visible, x.shape[2:]), x, 0)

    def conv(layer, x, groups=1):
        function = F.conv3d if x.ndim == 5 else F.conv2d
        return mask(function(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2, groups=groups))

    def block(layer, x):
        y = conv(layer.conv1, x, groups=x.shape[1]).movedim(1, -1)
        y = mask(F.layer_norm(y, y.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-6).movedim(-1, 1))
        return x + conv(layer.conv3, F.gelu(conv(layer.conv2, y)))

    parts = encoder.embeddings
    maps = []
    x = conv(parts.stem, mask(volumes))
    for stage in range(1, 6):
        for layer in getattr(parts, f"layer{stage}"):
            x = block(layer, x)
        if stage < 5:
            x = conv(getattr(parts, f"expend{stage}"), x)
            maps.append(x)
            x = mask(F.max_pool3d(x, 2) if x.ndim == 5 else F.max_pool2d(x, 2))
    tokens = x.flatten(2).transpose(1, 2) + encoder.mae.positions(x.shape[2:])
    out = torch.zeros_like(tokens)
    for sample, seen in enumerate(visible.flatten(1)):
        out[sample, seen] = encoder.mae.process(tokens[None, sample, seen])[0]
    return [*maps, out.transpose(1, 2).view_as(x)]


def assert_close_to_std(one, other, tolerance=1e-5):
    """Agreement relative to each map's standard deviation."""
    assert len(one) == len(other) == 5
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.std()


@pytest.mark.parametrize("size", SIZES)
def test_five_maps_finest_first(build, make_visible, size):
    encoder = build(size)
    for visible in (None, make_visible(2, grid(size))):
        maps = encoder(torch.rand(2, 1, *size), visible)
        shapes = [(2, c, *(s // 2**i for s in size)) for i, c in enumerate((12, 12, 24, 48, 48))]
        assert [tuple(x.shape) for x in maps] == shapes


@pytest.mark.parametrize("size", SIZES)
def test_masked_features_are_those_written_by_hand(build, make_visible, size):
    encoder, visible = build(size), make_visible(2, grid(size))
    volumes = torch.rand(2, 1, *size)
    with torch.no_grad():
        assert_close_to_std(encoder(volumes, visible), masked_by_hand(encoder, volumes, visible))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_hidden_voxels_never_change_features(build, make_visible, size, precision):
    encoder, visible = build(size), make_visible(2, grid(size))
    volumes = torch.rand(2, 1, *size)
    voxel_mask = visible_at(visible, size)
    with torch.no_grad(), PRECISIONS[precision]():
        expected = encoder(volumes, visible)
        for noise in NOISE.values():
            features = encoder(volumes.where(voxel_mask, noise(volumes)), visible)
            for x, y in zip(features, expected, strict=True):
                mask = visible_at(visible, x.shape[2:]).expand_as(x)
                assert torch.equal(x[mask], y[mask])
                assert (x[~mask] == 0).all()
        for x, y in zip(encoder(volumes + 0.5, visible), expected, strict=True):
            assert not torch.equal(x, y)  # while visible voxels do


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_hidden_voxels_get_no_gradient(build, make_visible, size, precision):
    encoder, visible = build(size), make_visible(2, grid(size))
    volumes = torch.rand(2, 1, *size, requires_grad=True)
    with PRECISIONS[precision]():
        sum(x.float().square().mean() for x in encoder(volumes, visible)).backward()
    mask = visible_at(visible, size)
    assert (volumes.grad[~mask] == 0).all()
    assert (volumes.grad[mask] != 0).float().mean() > 0.9


def test_hidden_patches_separate_visible_ones_in_the_convolutions(build):
    """Nothing crosses a hidden patch before the transformer: masking the input alone would let it pass."""
    encoder = build((16, 16, 48))
    visible = torch.tensor([True, False, True]).view(1, 1, 1, 1, 3)
    volumes = torch.rand(1, 1, 16, 16, 48)
    changed = volumes.clone()
    changed[..., :16] += 1
    with torch.no_grad():
        before, after = encoder(volumes, visible), encoder(changed, visible)
    for x, y in zip(before[:4], after[:4], strict=True):
        edge = x.shape[-1] // 3
        assert torch.equal(x[..., 2 * edge :], y[..., 2 * edge :])
        assert not torch.equal(x[..., :edge], y[..., :edge])
    assert not torch.equal(before[4][..., 2:], after[4][..., 2:])


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_equals_its_samples_one_by_one(build, make_visible, size):
    encoder, visible = build(size), make_visible(4, grid(size))
    volumes = torch.rand(4, 1, *size)
    with torch.no_grad():
        together = encoder(volumes, visible)
        alone = [encoder(volumes[i : i + 1], visible[i : i + 1]) for i in range(4)]
    assert_close_to_std(together, [torch.cat(maps) for maps in zip(*alone, strict=True)])


@pytest.mark.parametrize("size", SIZES)
def test_all_visible_is_dense(build, size):
    encoder = build(size)
    volumes = torch.rand(2, 1, *size)
    visible = torch.ones(2, 1, *grid(size), dtype=torch.bool)
    with torch.no_grad():
        assert_close_to_std(encoder(volumes, visible), encoder(volumes))


def test_nothing_is_remembered_between_calls(build, make_visible):
    encoder, visible = build(32), make_visible(2, (2, 2, 2))
    volumes = torch.rand(2, 1, 32, 32, 32)
    keys = set(encoder.state_dict())
    with torch.no_grad():
        dense = encoder(volumes)
        encoder(volumes, visible)
        assert all(torch.equal(x, y) for x, y in zip(encoder(volumes), dense, strict=True))
    assert set(encoder.state_dict()) == keys


def test_gradients_under_activation_checkpointing_are_the_same(build, make_visible):
    encoder, visible = build(32), make_visible(2, (2, 2, 2))
    volumes = torch.rand(2, 1, 32, 32, 32)
    gradients = []
    for run in (encoder, lambda *args: checkpoint(encoder, *args, use_reentrant=False)):
        sum(x.square().mean() for x in run(volumes, visible)).backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
        encoder.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_every_parameter_gets_a_gradient(build, make_visible):
    encoder = build(32)
    maps = encoder(torch.rand(2, 1, 32, 32, 32), make_visible(2, (2, 2, 2)))
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("visible", [None, "some"])
def test_other_sizes_than_the_stored_one_work(make_encoder, make_visible, visible):
    """The stored positions are for one crop size; another gives what an encoder built for it gives."""
    volumes = torch.rand(2, 1, 32, 48, 16)
    visible = visible and make_visible(2, (2, 3, 1))
    with torch.no_grad():
        assert_close_to_std(make_encoder(64)(volumes, visible), make_encoder((32, 48, 16))(volumes, visible))


def test_input_channels(make_encoder, make_visible):
    encoder = make_encoder(32, in_channels=2)
    volumes, visible = torch.rand(1, 2, 32, 32, 32), make_visible(1, (2, 2, 2))
    assert encoder(volumes, visible)[0].shape == (1, 12, 32, 32, 32)
    assert_close_to_std(encoder(volumes, visible), masked_by_hand(encoder, volumes, visible))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"multiple of 16.*\(40, 40, 40\)"):
        HybridEncoder(img_size=40, widths=WIDTHS)


def test_volumes_that_do_not_fit_are_refused(make_encoder):
    with pytest.raises(ValueError, match=r"multiple of 16.*nearest that fits is \(32, 32, 32\)"):
        make_encoder(32)(torch.rand(1, 1, 32, 30, 32))


@pytest.mark.parametrize("shape", [(2, 1, 2, 2, 3), (1, 1, 2, 2, 2), (2, 2, 2, 2), (2, 1, 32, 32, 32)])
def test_masks_of_another_shape_are_refused(build, shape):
    with pytest.raises(ValueError, match="visible: expected bool") as error:
        build(32)(torch.rand(2, 1, 32, 32, 32), torch.ones(shape, dtype=torch.bool))
    assert "(2, 1, 2, 2, 2)" in str(error.value)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("name", ["widths", "depths", "expansions"])
def test_other_than_five_stages_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected 5 numbers"):
        HybridEncoder(**{"img_size": 32, "widths": WIDTHS, name: (12, 12, 12, 12)})


@pytest.mark.parametrize("size", [(8, 4, 6), (8, 4)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_pooling_axis_by_axis_is_pooling(size, is_masked):
    """Values and gradients, also where a mask hides positions."""
    x = torch.randn(2, 3, *size, requires_grad=True)
    visible = torch.rand(2, 1, *(s // 2 for s in size)) < 0.5
    seen = visible_at(visible, size) if is_masked else torch.ones_like(x[:, :1], dtype=torch.bool)
    kept = visible if is_masked else torch.ones_like(visible)
    found = []
    for pool in (max_pool_2x, max_pool_by_axis):
        with hidden(visible) if is_masked else nullcontext():
            out = pool(x.where(seen, 0)) * kept
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
