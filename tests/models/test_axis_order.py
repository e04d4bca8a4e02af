"""A network on arrays of other axes computes what it computes on its own."""

from itertools import permutations

import pytest
import torch
from torch import nn

from hyspark import build_hybird
from hyspark.models.axis_order import PermutedAxes
from tests.conftest import SMALL


@pytest.mark.parametrize("order", [*permutations(range(3)), (1, 0)])
def test_arrays_are_turned_to_the_network_and_scores_back(order):
    axes = len(order)
    conv = nn.Conv3d if axes == 3 else nn.Conv2d
    network = conv(1, 2, 3, padding=1)
    volume = torch.rand(1, 1, *(4, 5, 6)[:axes])
    turned = volume.permute(0, 1, *(2 + axis for axis in order))  # its axis k is the volume's axis order[k]
    found = PermutedAxes(network, order)(turned)
    torch.testing.assert_close(found, network(volume).permute(0, 1, *(2 + axis for axis in order)))


def test_the_encoder_keeps_its_layers():
    options = {name: SMALL[f"encoder_{name}"] for name in ("widths", "depths")}
    network = build_hybird(1, 2, 32, **options, expansions=SMALL["expansions"], vit_depth=1)
    wrapped = PermutedAxes(network, (2, 1, 0))
    layers = wrapped.encoder_layers()
    assert layers == {f"network.{name}": layer for name, layer in network.encoder_layers().items()}
    assert layers.keys() <= dict(wrapped.named_parameters()).keys()
