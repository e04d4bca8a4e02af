"""Where hidden patches are excluded (`hide`): what each ablation gives away, and what none of them may see."""

import pytest
import torch

from hyspark.models.encoder import HybridEncoder
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.packed import packed

EVERYWHERE, CONVOLUTIONS, INPUT = "everywhere", "convolutions", "input"


def maps_of(make_encoder, hide, volumes, visible, compute="packed"):
    encoder = make_encoder(tuple(volumes.shape[2:]), hide=hide, compute=compute)
    with torch.no_grad():
        return encoder(volumes, visible)


@pytest.mark.parametrize("hide", [EVERYWHERE, CONVOLUTIONS, INPUT])
def test_no_ablation_sees_a_hidden_voxel(make_encoder, make_visible, hide):
    volumes, visible = torch.rand(2, 1, 32, 32, 32), make_visible(2, (2, 2, 2))
    other = volumes.where(visible_at(visible, (32, 32, 32)), 7)
    for x, y in zip(*(maps_of(make_encoder, hide, v, visible) for v in (volumes, other)), strict=True):
        assert torch.equal(x, y)
        assert (x[~visible_at(visible, x.shape[2:]).expand_as(x)] == 0).all()


@pytest.mark.parametrize("compute", ["packed", "masked"])
def test_the_transformer_on_all_tokens(make_encoder, make_visible, compute):
    """The convolutions are those of the method; the transformer reads zeros with a position at hidden places."""
    volumes, visible = torch.rand(2, 1, 32, 32, 32), make_visible(2, (2, 2, 2))
    method = maps_of(make_encoder, EVERYWHERE, volumes, visible, compute)
    ablated = maps_of(make_encoder, CONVOLUTIONS, volumes, visible, compute)
    for x, y in zip(method[:4], ablated[:4], strict=True):
        assert torch.equal(x, y)
    assert not torch.allclose(method[4], ablated[4], atol=1e-3)

    encoder = make_encoder(32)
    with torch.no_grad():
        patches = encoder.patches(volumes, visible)
        with packed(patches, 16):
            maps = encoder.embeddings(patches.pack(volumes))
        deepest = patches.unpack(maps[-1])
        expected = encoder.mae(deepest) * visible
    torch.testing.assert_close(ablated[4], expected, rtol=1e-5, atol=1e-5)


def test_zeros_in_the_input_let_convolutions_cross_a_hidden_patch(make_encoder):
    visible = torch.tensor([True, False, True]).view(1, 1, 1, 1, 3)
    volumes = torch.rand(1, 1, 16, 16, 48)
    changed = volumes.clone()
    changed[..., :16] += 1
    for hide, crosses in ((INPUT, True), (CONVOLUTIONS, False)):
        before, after = (maps_of(make_encoder, hide, v, visible)[3] for v in (volumes, changed))
        assert torch.equal(before[..., 4:], after[..., 4:]) != crosses, hide
    dense = make_encoder((16, 16, 48))
    with torch.no_grad():
        expected = dense(volumes.where(visible_at(visible, (16, 16, 48)), 0))
    for x, y in zip(maps_of(make_encoder, INPUT, volumes, visible), expected, strict=True):
        mask = visible_at(visible, x.shape[2:]).expand_as(x)
        assert torch.equal(x[mask], y[mask])


def test_another_word_is_refused():
    with pytest.raises(ValueError, match='hide: expected "everywhere", "convolutions" or "input"'):
        HybridEncoder(hide="nowhere")
