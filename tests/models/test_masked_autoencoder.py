"""The pre-training network: its loss, what the loss looks at, and what it trains."""

import numpy as np
import pytest
import torch

from hyspark import build_hyspark
from hyspark.models.masked_autoencoder import PretrainingOutput, patch_statistics, reconstruct, reconstruction_loss
from hyspark.models.masking.mask import patchify, visible_at
from hyspark.models.masking.patches import Patches


def loss_by_loops(volumes, prediction, visible):
    """The loss in numpy, patch by patch."""
    errors = []
    for sample, patch in np.argwhere(~visible.flatten(1).numpy()):
        corner = np.unravel_index(patch, visible.shape[2:])
        where = (sample, 0, *(slice(16 * c, 16 * c + 16) for c in corner))
        target = volumes[where].numpy().astype(np.float64)
        target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
        errors.append(np.mean((prediction[where].numpy() - target) ** 2))
    return np.mean(errors)


@pytest.mark.parametrize("size", [(32, 32, 32), (32, 48, 16), (48, 32)])
def test_loss_by_the_formula(make_visible, size):
    visible = make_visible(2, tuple(s // 16 for s in size))
    volumes, prediction = torch.rand(2, 1, *size), torch.randn(2, 1, *size)
    volumes[..., :16] *= 1e-3  # so that the small number added to the variance counts
    loss = reconstruction_loss(volumes, prediction, visible)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_by_loops(volumes, prediction, visible), rel=1e-5)


def test_loss_averages_over_hidden_patches_of_the_whole_batch():
    """Also where samples keep different numbers of patches, and not over the samples' means."""
    visible = torch.ones(2, 1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 0, 0, 0] = visible[1, 0, 0] = False
    volumes, prediction = torch.rand(2, 1, 32, 32, 32), torch.randn(2, 1, 32, 32, 32)
    prediction[0] *= 3
    expected = loss_by_loops(volumes, prediction, visible)
    assert reconstruction_loss(volumes, prediction, visible).item() == pytest.approx(expected, rel=1e-5)


def test_loss_looks_at_hidden_patches_only(make_visible):
    visible = make_visible(2, (2, 2, 2))
    volumes, prediction = torch.rand(2, 1, 32, 32, 32), torch.randn(2, 1, 32, 32, 32)
    voxels = visible_at(visible, (32, 32, 32))
    loss = reconstruction_loss(volumes, prediction, visible)
    assert reconstruction_loss(volumes, prediction.where(~voxels, 7.0), visible) == loss
    assert reconstruction_loss(volumes, prediction.where(voxels, 7.0), visible) != loss


def test_loss_is_computed_in_float32(make_visible):
    visible = make_visible(1, (2, 2, 2))
    volumes, prediction = torch.rand(1, 1, 32, 32, 32), torch.randn(1, 1, 32, 32, 32).bfloat16()
    loss = reconstruction_loss(volumes, prediction, visible)
    assert loss.dtype == torch.float32
    assert loss == reconstruction_loss(volumes, prediction.float(), visible)


def test_the_output_belongs_together(make_hyspark):
    net = make_hyspark()
    volumes = torch.rand(2, 1, 32, 32, 32)
    out = net(volumes)
    assert out.visible.dtype == torch.bool
    assert out.visible.flatten(1).sum(1).tolist() == [2, 2]
    assert out.prediction.shape == volumes.shape
    assert out.loss == reconstruction_loss(volumes, out.prediction, out.visible)


@pytest.mark.parametrize("compute", ["masked", "packed"])
@pytest.mark.parametrize("size", [32, (32, 48, 16)])
def test_the_loss_starts_at_about_one(make_hyspark, size, compute):
    net = make_hyspark(size, compute=compute)
    shape = (size,) * 3 if isinstance(size, int) else size
    assert 0.95 < net(torch.rand(4, 1, *shape)).loss.item() < 1.1


def test_both_ways_of_computing_agree(make_hyspark, make_visible):
    volumes, visible = torch.rand(2, 1, 32, 48, 16), make_visible(2, (2, 3, 1))
    losses = [make_hyspark((32, 48, 16), compute=c)(volumes, visible).loss.item() for c in ("masked", "packed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_given_mask_is_used(make_hyspark, make_visible):
    net, visible = make_hyspark(), make_visible(2, (2, 2, 2), 0.25)
    volumes = torch.rand(2, 1, 32, 32, 32)
    out = net.eval()(volumes, visible)
    assert torch.equal(out.visible, visible)
    unseen = volumes.where(visible_at(visible, (32, 32, 32)), float("nan"))
    assert torch.equal(net(unseen, visible).prediction, out.prediction)
    seen = volumes.where(~visible_at(visible, (32, 32, 32)), 0.5)
    assert not torch.equal(net(seen, visible).prediction, out.prediction)


def test_a_drawn_mask_follows_the_global_seed(make_hyspark):
    net = make_hyspark(64)
    volumes = torch.rand(3, 1, 64, 64, 64)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            outs.append(net(volumes[:, :, :32, :32]))
    assert torch.equal(outs[0].visible, outs[1].visible)
    assert outs[0].loss == outs[1].loss
    assert not torch.equal(outs[0].visible, outs[2].visible)
    assert len({mask.numpy().tobytes() for mask in net.draw_visible(20, (64, 64, 64))}) == 20


@pytest.mark.parametrize("options", [{}, {"size": (48, 32), "axes": 2}, {"size": (32, 48, 16)}])
def test_every_parameter_gets_a_gradient(make_hyspark, options):
    net = make_hyspark(**options)
    net(torch.rand(4, 1, *net.encoder.img_size)).loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_the_parts_have_the_sizes_of_the_paper(make_hyspark):
    """Four densified maps, deepest first; widths 768 -> 48 at full size, here 32 -> 2; no branch at full resolution."""
    net = make_hyspark()
    tokens = [tuple(fill.mask_token.shape) for fill in net.densify]
    assert tokens == [(1, c, 1, 1, 1) for c in (48, 48, 24, 12)]
    projections = [tuple(fill.project.weight.shape) for fill in net.densify]
    assert projections == [(32, 48, 1, 1, 1), (16, 48, 3, 3, 3), (8, 24, 3, 3, 3), (4, 12, 3, 3, 3)]
    ups = [tuple(level.up.weight.shape) for level in net.decoder.levels]
    assert ups == [(c, c, 2, 2, 2) for c in (32, 16, 8, 4)]
    assert [level.fuse is None for level in net.decoder.levels] == [True, False, False, False]
    assert tuple(net.decoder.out.weight.shape) == (1, 2, 1, 1, 1)


def test_the_default_network_has_the_decoder_of_the_paper():
    with torch.device("meta"):
        net = build_hyspark()
    assert [tuple(fill.project.weight.shape[:3]) for fill in net.densify] == [
        (768, 384, 1),
        (384, 384, 3),
        (192, 256, 3),
        (96, 128, 3),
    ]
    assert net.decoder.out.weight.shape[1] == 48
    assert net.mask_ratio == 0.75


def test_densify_fills_hidden_positions_with_its_token(make_hyspark, make_visible):
    fill = make_hyspark().densify[2]
    visible = make_visible(2, (2, 2, 2))
    x = torch.randn(2, 24, 8, 8, 8)
    mask = visible_at(visible, (8, 8, 8))
    filled = fill.norm(x)
    for sample, voxels in enumerate(mask[:, 0]):
        filled[sample][:, ~voxels] = fill.mask_token.view(24, 1)
    patches = Patches(visible)
    torch.testing.assert_close(fill(patches.pack(x), patches), fill.project(filled))


def test_the_size_of_features_is_no_way_to_a_lower_loss(make_hyspark, make_visible):
    """The decoder sees each position's features at one size, so that the encoder gains nothing from larger ones."""
    patches = Patches(make_visible(2, (2, 2, 2)))
    for fill in make_hyspark().densify:
        x = torch.randn(len(patches.token), fill.norm.normalized_shape[0], 4, 4, 4)
        torch.testing.assert_close(fill(100 * x, patches), fill(x, patches), rtol=1e-3, atol=1e-3)


def test_the_decoder_is_fuse_up_refine_level_by_level(make_hyspark):
    """Written out plainly, with every norm and ReLU done where it stands."""
    net = make_hyspark().train()
    decoder = net.decoder
    maps = [torch.randn(2, 32 >> level, *(2 << level,) * 3) for level in range(4)]
    x = maps[0]
    with torch.no_grad():
        for level, skip in zip(decoder.levels, [None, *maps[1:]], strict=True):
            if skip is not None:
                x = level.fuse(torch.cat([x, skip], dim=1))
            x = level.refine(level.up(x))
        torch.testing.assert_close(decoder(maps), decoder.out(x), rtol=1e-4, atol=1e-5)


def test_a_perfect_prediction_is_reconstructed_to_the_target(make_visible):
    volumes, visible = torch.rand(2, 1, 32, 48, 16), make_visible(2, (2, 3, 1))
    perfect = torch.empty_like(volumes)
    for corner in np.ndindex(2, 3, 1):
        where = (slice(None), slice(None), *(slice(16 * c, 16 * c + 16) for c in corner))
        patch = volumes[where].flatten(1)
        shape = (-1, 1, 1, 1, 1)
        perfect[where] = (volumes[where] - patch.mean(1).view(shape)) / (patch.var(1) + 1e-6).sqrt().view(shape)
    output = PretrainingOutput(reconstruction_loss(volumes, perfect, visible), visible, perfect)
    assert output.loss.item() == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(reconstruct(volumes, output), volumes, rtol=0, atol=1e-5)


def test_a_prediction_of_zero_is_reconstructed_to_the_mean_of_each_patch(make_visible):
    volumes, visible = torch.rand(1, 1, 32, 32, 32), make_visible(1, (2, 2, 2))
    output = PretrainingOutput(torch.tensor(1.0), visible, torch.zeros_like(volumes))
    patches = patchify(reconstruct(volumes, output))
    torch.testing.assert_close(patches, patchify(volumes).mean(-1, keepdim=True).expand_as(patches))


def test_patch_statistics_stay_finite_in_air():
    mean, deviation = patch_statistics(torch.zeros(1, 2, 4096))
    assert mean.tolist() == [[[0.0], [0.0]]]
    torch.testing.assert_close(deviation, torch.full((1, 2, 1), 1e-3))


def test_training_and_evaluation_differ_by_batch_statistics(make_hyspark, make_visible):
    net, visible = make_hyspark(), make_visible(2, (2, 2, 2))
    volumes = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        net.train()
        trained = [net(volumes, visible).prediction for _ in range(2)]
        net.eval()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        evaluated = [net(volumes, visible).prediction for _ in range(2)]
        alone = net(volumes[:1], visible[:1]).prediction
    assert torch.equal(*trained)
    assert torch.equal(*evaluated)
    assert not torch.equal(trained[0], evaluated[0])
    torch.testing.assert_close(alone, evaluated[0][:1])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_few_steps_lower_the_loss(make_hyspark, make_visible):
    net, visible = make_hyspark(), make_visible(2, (2, 2, 2), 0.25)
    ramp = torch.linspace(0, 1, 32)
    volumes = (ramp.view(-1, 1, 1) * ramp.view(-1, 1) * ramp).expand(2, 1, 32, 32, 32).contiguous()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = net(volumes, visible)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_two_axes(make_hyspark):
    out = make_hyspark((48, 32), axes=2)(torch.rand(2, 1, 48, 32))
    assert out.prediction.shape == (2, 1, 48, 32)
    assert out.visible.shape == (2, 1, 3, 2)
    assert out.loss.isfinite()


def test_names_of_computing():
    with pytest.raises(ValueError, match=r'"masked" or "packed", got \'sparse\''):
        build_hyspark(32, compute="sparse")


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 1.5])
def test_ratios_out_of_range_are_refused_when_building(make_hyspark, mask_ratio):
    with pytest.raises(ValueError, match="mask ratio: expected at least 0 and below 1"):
        make_hyspark(mask_ratio=mask_ratio)


@pytest.mark.parametrize(("size", "mask_ratio"), [(32, 0), (32, 0.01), (16, 0.75)])
def test_a_ratio_that_hides_nothing_is_refused_when_building(make_hyspark, size, mask_ratio):
    with pytest.raises(ValueError, match="hides no patch"):
        make_hyspark(size, mask_ratio=mask_ratio)


@pytest.mark.parametrize("width", [0, 8, 24, 100])
def test_decoder_widths_that_do_not_halve_are_refused(make_hyspark, width):
    with pytest.raises(ValueError, match=f"multiple of 16.* got {width}"):
        make_hyspark(decoder_width=width)


def test_sizes_that_do_not_fit_are_refused(make_hyspark):
    with pytest.raises(ValueError, match=r"multiple of 16.*nearest that fits is \(48, 48, 48\)"):
        make_hyspark(50)
    with pytest.raises(ValueError, match="multiple of 16"):
        make_hyspark()(torch.rand(1, 1, 32, 32, 20))


def test_a_mask_for_another_grid_is_refused(make_hyspark, make_visible):
    with pytest.raises(ValueError, match=r"visible: expected bool \(1, 1, 2, 2, 2\)"):
        make_hyspark()(torch.rand(1, 1, 32, 32, 32), make_visible(1, (2, 2, 3)))
