"""Counts of operations: by hand where that is possible, and as shares of each other."""

import pytest
import torch
from torch import nn

from hyspark.models.blocks import MedNeXtBlock
from hyspark.planning import flops


class Loss(nn.Module):
    """A network whose output has a loss."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, volumes):
        return type("Output", (), {"loss": self.layers(volumes).square().mean()})


def test_convolutions_by_hand():
    net = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 4, 2, stride=2, groups=4))
    layers = flops.flops_by_layer(net, (16, 8, 4), 3, None)
    assert layers == {"0": 2 * 3 * 512 * 27 * 8, "2": 2 * 3 * 64 * 8 * 2 * 4}


def test_matrix_products_and_attention_by_hand():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(*[self.project(x)[:, :, 0]] * 3)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attention()

        def forward(self, volumes):
            return self.inner(volumes)

    layers = flops.flops_by_layer(Outer(), (1, 10, 6), 2, None)
    assert layers == {"inner.project": 2 * 2 * 10 * 6 * 6, "inner": 2 * 2 * 2 * 10 * 10 * 6}


@pytest.mark.parametrize("groups", [1, 8])
def test_the_backward_pass_costs_two_forward_passes(groups):
    net = Loss(nn.Conv3d(1, 8, 1), nn.Conv3d(8, 8, 3, padding=1, groups=groups), nn.ConvTranspose3d(8, 4, 2, stride=2))
    forward, backward = flops.step_flops(net, (8, 8, 8), 2)
    first = 2 * 2 * 512 * 8  # needs no gradient of its input
    assert backward == 2 * forward - first


def test_packed_convolutions_cost_the_visible_share(make_hyspark, make_visible):
    visible = make_visible(2, (2, 2, 4), mask_ratio=0.75)
    counts = {}
    for compute in ("packed", "masked"):
        net = make_hyspark((32, 32, 64), compute=compute)
        layers = flops.flops_by_layer(net, (32, 32, 64), 2, visible)
        counts[compute] = {name: n for name, n in layers.items() if ".embeddings." in name}
        assert flops.sum_by_module(layers).keys() == {"encoder", "densify", "decoder"}
        assert sum(flops.sum_by_module(layers).values()) == flops.step_flops(net, (32, 32, 64), 2, visible)[0]
    assert {"encoder.embeddings.stem", "encoder.embeddings.layer3.2.conv1"} <= counts["packed"].keys()
    dense = "encoder.embeddings.layer5.0.conv1"  # one voxel a patch: computed densely, which is faster
    assert counts["packed"].pop(dense) == counts["masked"].pop(dense)
    assert counts["packed"] == {name: n // 4 for name, n in counts["masked"].items()}


def test_the_backward_pass_of_hyspark_costs_twice_the_forward_pass_and_a_little(make_hyspark, make_visible):
    forward, backward = flops.step_flops(make_hyspark(), (32, 32, 32), 4, make_visible(4, (2, 2, 2)))
    assert 1.9 < backward / forward < 2.5


def test_all_layers_of_a_network_without_a_mask_are_named(make_hybird):
    net = make_hybird()
    weighty = {name for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv3d, nn.ConvTranspose3d))}
    layers = flops.flops_by_layer(net, (32, 32, 32), 1, None)
    assert weighty - layers.keys() == set()


def test_the_network_stays_as_it_is(make_hyspark, make_visible):
    net = make_hyspark()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flops.step_flops(net, (32, 32, 32), 2, make_visible(2, (2, 2, 2)))
    flops.flops_by_layer(net, (32, 32, 32), 2, make_visible(2, (2, 2, 2)))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_huge_sizes_cost_no_memory():
    net = nn.Sequential(MedNeXtBlock(1, 4), nn.Conv3d(1, 1000, 3, padding=1))
    layers = flops.flops_by_layer(net, (4096, 4096, 4096), 100, None)  # a map of 27 EB
    assert layers["1"] == 2 * 100 * 4096**3 * 27 * 1000
