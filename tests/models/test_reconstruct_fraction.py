"""Pre-training that reconstructs a fraction of the hidden patches: against the dense decoder, and what it costs."""

import copy

import pytest
import torch
from torch import nn

from hyspark import build_hyspark
from hyspark.models.masked_autoencoder import first_packed_level, reconstruction_loss
from hyspark.models.masking.borders import pack_with_border
from hyspark.models.masking.mask import visible_at
from hyspark.models.masking.patches import Patches
from hyspark.models.spark import build_spark
from hyspark.planning.flops import flops_by_layer
from tests.models.conftest import WIDTHS, randomise


class Thick(nn.Module):
    """A network whose strides differ by axis: (1, 2, 2), then (2, 4, 4), then (4, 4, 8)."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv3d(1, 4, 3, stride=(1, 2, 2), padding=1)
        self.two = nn.Conv3d(4, 6, 3, stride=2, padding=1)
        self.three = nn.Conv3d(6, 8, 3, stride=(2, 1, 2), padding=1)

    def forward(self, x):
        return self.three(self.two(self.one(x).relu()).relu())


class Coarse(nn.Module):
    """A network with one map, of stride 2."""

    def __init__(self):
        super().__init__()
        self.only = nn.Conv2d(1, 8, 2, stride=2)

    def forward(self, x):
        return self.only(x)


def hybrid(size, axes=3, **options):
    return build_hyspark(size, 0.6, widths=WIDTHS, decoder_width=32, axes=axes, **options)


def around(network, size, axes, **options):
    return build_spark(network, size, 0.6, in_channels=1, axes=axes, decoder_width=16, **options)


NETWORKS = {
    "hybrid": (lambda **o: hybrid((32, 48, 16), **o), (32, 48, 16)),
    "hybrid in 2D": (lambda **o: hybrid(48, 2, **o), (48, 48)),
    "strides by axis": (lambda **o: around(Thick(), (8, 12, 16), 3, **o), (8, 12, 16)),
    "a mask unit of two positions": (
        lambda **o: around(Thick(), (8, 16, 32), 3, mask_unit=(8, 8, 16), **o),
        (8, 16, 32),
    ),
    "a mask unit below the stride": (
        lambda **o: around(Thick(), (8, 12, 16), 3, mask_unit=(2, 4, 4), **o),
        (8, 12, 16),
    ),
    "one map": (lambda **o: around(Coarse(), (8, 6), 2, **o), (8, 6)),
}


def build(name, **options):
    torch.manual_seed(0)
    net = randomise(NETWORKS[name][0](**options)).double()
    volumes = torch.rand(2, 1, *NETWORKS[name][1], dtype=torch.float64)
    return net, volumes, net.draw_visible(2, volumes.shape[2:])


def gradients(net, prediction):
    weights = torch.linspace(-1, 1, prediction.numel(), dtype=prediction.dtype).view_as(prediction)
    parameters = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad((prediction * weights).sum(), parameters)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_all_patches_of_a_crop_the_packed_decoder_equals_the_dense_one(name):
    """Values, gradients and running statistics, in training, where BatchNorm takes statistics of computed positions."""
    net, volumes, visible = build(name)
    packed = copy.deepcopy(net)
    dense, all_patches = net(volumes, visible), packed(volumes, visible, torch.ones_like(visible))
    torch.testing.assert_close(all_patches.prediction, dense.prediction)
    for one, other in zip(gradients(packed, all_patches.prediction), gradients(net, dense.prediction), strict=True):
        torch.testing.assert_close(one, other)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(packed.state_dict()[key], value)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name):
    net, volumes, visible = build(name, reconstruct_fraction=0.4)
    out = net(volumes, visible)
    out.loss.backward()
    assert out.reconstructed.sum() < (~visible).sum()
    assert [n for n, p in net.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0] == []


def test_the_loss_is_of_the_reconstructed_patches(make_hyspark, make_visible):
    net, visible = make_hyspark(reconstruct_fraction=0.5), make_visible(2, (2, 2, 2))
    volumes = torch.rand(2, 1, 32, 32, 32)
    out = net(volumes, visible)
    assert out.reconstructed.flatten(1).sum(1).tolist() == [2, 2]
    assert not (out.reconstructed & visible).any()
    assert out.loss == reconstruction_loss(volumes, out.prediction, ~out.reconstructed)
    is_scored = visible_at(out.reconstructed, (32, 32, 32))
    assert not out.prediction[~is_scored].any()
    assert out.prediction[is_scored].any()
    unseen = volumes.where(is_scored | visible_at(visible, (32, 32, 32)), float("nan"))
    assert torch.equal(net(unseen, visible, out.reconstructed).prediction, out.prediction)


def test_evaluation_reconstructs_all(make_hyspark, make_visible):
    volumes, visible = torch.rand(2, 1, 32, 32, 32), make_visible(2, (2, 2, 2))
    some, whole = (make_hyspark(reconstruct_fraction=f).eval()(volumes, visible) for f in (0.5, 1.0))
    assert torch.equal(some.prediction, whole.prediction)
    assert some.loss == whole.loss
    assert some.reconstructed is None


def test_a_given_draw_is_used_and_a_drawn_one_follows_the_global_seed(make_hyspark, make_visible):
    net, visible = make_hyspark(48, reconstruct_fraction=0.5), make_visible(2, (3, 3, 3))
    volumes = torch.rand(2, 1, 48, 48, 48)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(net(volumes, visible).reconstructed)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(net.eval()(volumes, visible, outs[0]).reconstructed, outs[0])


def test_an_isolated_patch_sees_what_lies_beside_it(make_hyspark, make_visible):
    """The first convolution of packed levels takes borders from the dense map, the others have none here."""
    net = randomise(make_hyspark(48)).double().eval()
    maps = [torch.randn(1, 32, 3, 3, 3), torch.randn(1, 16, 6, 6, 6), torch.randn(1, 8, 12, 12, 12)]
    chosen = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    chosen[0, 0, 1, 1, 1] = True
    patches = Patches(chosen)
    dense = [x.double().requires_grad_() for x in [*maps, torch.randn(1, 4, 24, 24, 24)]]
    skips = [pack_with_border(x, patches, 1) for x in dense[2:]]
    net.decoder([*dense[:2], *skips], patches, 2).square().sum().backward()
    seen = (dense[2].grad != 0).any(1)[0]
    expected = torch.zeros_like(seen)
    expected[3:9, 3:9, 3:9] = True
    assert torch.equal(seen, expected)


def test_finest_levels_cost_the_reconstructed_fraction(make_hyspark, make_visible):
    net, visible = make_hyspark(48), make_visible(2, (3, 3, 3), 2 / 3)
    reconstructed = torch.zeros_like(visible)
    reconstructed.view(2, -1)[:, ::9] = True
    dense, packed = (flops_by_layer(net, (48, 48, 48), 2, visible, 1, r) for r in (None, reconstructed))
    coarse = [name for name in dense if name.startswith(("encoder.", "decoder.levels.0.", "decoder.levels.1."))]
    fine = [f"decoder.levels.{level}.{name}" for level in (2, 3) for name in ("fuse.0", "fuse.3", "refine.3")]
    assert len(coarse) > 10
    assert {name: packed[name] for name in coarse} == {name: dense[name] for name in coarse}
    assert {name: 9 * packed[name] for name in fine} == {name: dense[name] for name in fine}
    assert packed["densify.3.project"] < 0.3 * dense["densify.3.project"]


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_fractions_that_are_none_are_refused(make_hyspark, fraction):
    with pytest.raises(ValueError, match="reconstruct_fraction: expected a number above 0 and at most 1, got"):
        make_hyspark(reconstruct_fraction=fraction)


def test_the_packed_levels_are_those_whose_positions_divide_a_mask_unit():
    maps = [(8, (8, 8)), (8, (4, 4)), (4, (2, 2))]
    assert [first_packed_level(maps, unit) for unit in ((8, 8), (4, 4), (2, 2), (4, 2), (6, 6))] == [1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match=r"reconstruct_fraction: expected mask units of a multiple of \(2, 2\) voxels"):
        first_packed_level(maps, (1, 2))


def test_a_draw_of_another_shape_is_refused(make_hyspark, make_visible):
    with pytest.raises(ValueError, match=r"reconstructed: expected bool \(2, 1, 2, 2, 2\), got shape \(2, 1, 2, 2\)"):
        make_hyspark()(torch.rand(2, 1, 32, 32, 32), make_visible(2, (2, 2, 2)), make_visible(2, (2, 2)))
