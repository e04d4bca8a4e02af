"""The transformer: positions by the formula, visible tokens only, twelve heads at every crop size."""

import math

import numpy as np
import pytest
import torch

from hyspark.models.masking.patches import Patches
from hyspark.models.vit import TokenTransformer, sincos_position

NUM_HEADS = 12
CHANNELS = 48


def formula(grid, channels):
    """The positions written out number by number."""
    count = channels // (2 * len(grid))
    rows = []
    for position in np.ndindex(*grid):
        row = []
        for coordinate in position:
            angles = [coordinate * 10000 ** (-k / count) for k in range(count)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row)
    return torch.tensor([rows])


def by_hand(transformer, tokens):
    """The transformer in its plain form: (b, v, c) -> same."""

    def norm(layer, x):
        variance = x.var(-1, keepdim=True, correction=0)
        return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * layer.weight + layer.bias

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    width = CHANNELS // NUM_HEADS
    for block in transformer.blocks:
        q, k, v = linear(block.attn.qkv, norm(block.norm1, tokens)).chunk(3, dim=-1)
        heads = []
        for h in range(NUM_HEADS):
            part = slice(h * width, (h + 1) * width)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)).softmax(-1)
            heads.append(weights @ v[..., part])
        tokens = tokens + linear(block.attn.proj, torch.cat(heads, dim=-1))
        x = linear(block.mlp.fc1, norm(block.norm2, tokens))
        tokens = tokens + linear(block.mlp.fc2, x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    return norm(transformer.norm, tokens)


def make_transformer(grid, depth=2):
    torch.manual_seed(0)
    transformer = TokenTransformer(CHANNELS, depth, NUM_HEADS, grid)
    for parameter in transformer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return transformer.double()


def random_map(num_samples, grid):
    return torch.randn(num_samples, CHANNELS, *grid, dtype=torch.float64)


def as_tokens(x):
    return x.flatten(2).transpose(1, 2)


def on_visible(transformer, x, visible):
    """The transformer on the visible tokens of a dense map, zero elsewhere."""
    patches = Patches(visible)
    return patches.unpack(transformer(patches.pack(x), patches))


def different_counts(num_samples, grid):
    """A mask whose samples keep 1, 2, ... patches."""
    visible = torch.zeros(num_samples, 1, *grid, dtype=torch.bool)
    for number, row in enumerate(visible.flatten(1), start=1):
        row[torch.randperm(len(row))[: min(number, len(row))]] = True
    return visible


@pytest.mark.parametrize("grid", [(2, 3, 4), (3, 1, 2), (6, 6, 6), (2, 3), (5,)])
def test_positions_follow_the_formula(grid):
    positions = sincos_position(grid, 48)
    assert positions.dtype == torch.float32
    assert positions.shape == (1, math.prod(grid), 48)
    torch.testing.assert_close(positions, formula(grid, 48), rtol=0, atol=1e-6)


def test_positions_of_the_released_width():
    """Spot values of the 6 x 6 x 6 grid at width 384: 64 frequencies, sin and cos, axes in the order h, w, d."""
    positions = sincos_position((6, 6, 6), 384)[0]
    token = positions[36 * 2 + 6 * 3 + 5]  # h = 2, w = 3, d = 5
    assert token[0].item() == pytest.approx(math.sin(2))
    assert token[64].item() == pytest.approx(math.cos(2))
    assert token[128].item() == pytest.approx(math.sin(3))
    assert token[192 + 7].item() == pytest.approx(math.cos(3 * 10000 ** (-7 / 64)))
    assert token[256 + 63].item() == pytest.approx(math.sin(5 * 10000 ** (-63 / 64)), rel=1e-5)
    assert token[320].item() == pytest.approx(math.cos(5))


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"multiple of 6 for 3 axes, got 20"):
        sincos_position((2, 2, 2), 20)
    with pytest.raises(ValueError, match=r"multiple of the 12 attention heads, got 30"):
        TokenTransformer(30, 1, NUM_HEADS, (2, 2, 2))


@pytest.mark.parametrize("grid", [(2, 2, 2), (2, 3, 1), (3, 2)])
def test_dense_is_the_plain_transformer_on_all_tokens(grid):
    transformer = make_transformer(grid)
    x = 1e-2 * random_map(2, grid)
    expected = by_hand(transformer, as_tokens(x) + formula(grid, CHANNELS))
    torch.testing.assert_close(as_tokens(transformer(x)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("grid", [(2, 2, 2), (2, 3, 1), (3, 2)])
def test_masked_is_the_plain_transformer_on_the_visible_tokens_of_each_sample(make_visible, grid, equal):
    transformer = make_transformer(grid)
    x, visible = random_map(3, grid), make_visible(3, grid) if equal else different_counts(3, grid)
    out = as_tokens(on_visible(transformer, x, visible))
    for sample, mask in enumerate(visible.flatten(1)):
        tokens = as_tokens(x) + formula(grid, CHANNELS)
        expected = by_hand(transformer, tokens[sample : sample + 1, mask])
        torch.testing.assert_close(out[sample : sample + 1, mask], expected, rtol=0, atol=1e-5)
        assert (out[sample, ~mask] == 0).all()


def test_hidden_tokens_change_nothing_and_visible_ones_do(make_visible):
    grid = (2, 3, 2)
    transformer, visible = make_transformer(grid), make_visible(2, grid)
    x = random_map(2, grid)
    changed = x.where(visible, float("nan"))
    assert torch.equal(on_visible(transformer, x, visible), on_visible(transformer, changed, visible))
    assert not torch.equal(on_visible(transformer, x, visible), on_visible(transformer, x + visible, visible))


@pytest.mark.parametrize(("mask_ratio", "num"), [(0.75, 2), (0.5, 4), (0.0, 8)])
def test_the_blocks_process_the_visible_tokens_only(make_visible, mask_ratio, num):
    transformer = make_transformer((2, 2, 2))
    shapes = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda _module, args, out: shapes.append((args[0].shape, out.shape)))
    on_visible(transformer, random_map(4, (2, 2, 2)), make_visible(4, (2, 2, 2), mask_ratio))
    assert shapes == [((4, num, CHANNELS), (4, num, CHANNELS))] * 2


def test_all_visible_is_dense():
    transformer, x = make_transformer((2, 3, 1)), random_map(2, (2, 3, 1))
    visible = torch.ones(2, 1, 2, 3, 1, dtype=torch.bool)
    torch.testing.assert_close(on_visible(transformer, x, visible), transformer(x))


def test_another_grid_than_the_stored_one_gets_positions_of_its_own():
    """A transformer stored for one grid equals, on another, one that was built for it; also for as many tokens."""
    for stored, used in [((2, 2, 2), (3, 2, 1)), ((2, 3, 1), (1, 3, 2)), ((3, 1, 2), (2, 2, 2))]:
        x = random_map(1, used)
        torch.testing.assert_close(make_transformer(stored)(x), make_transformer(used)(x), rtol=0, atol=1e-6)


def test_positions_are_stored_but_not_trained():
    transformer = make_transformer((2, 2, 2))
    assert "pos_embed" in transformer.state_dict()
    assert "pos_embed" not in dict(transformer.named_parameters())


@pytest.mark.parametrize("size", [32, 64, (32, 48, 16)])
def test_heads_do_not_depend_on_the_crop_size(make_encoder, size):
    blocks = make_encoder(size).mae.blocks
    assert [block.attn.num_heads for block in blocks] == [12, 12, 12]
