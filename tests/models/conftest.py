"""Small networks and masks for the tests of the models."""

import pytest
import torch

from hyspark import build_hybird, build_hyspark
from hyspark.models.encoder import HybridEncoder
from hyspark.models.masking.mask import draw_visible

WIDTHS = (6, 12, 12, 24, 48)
"""Small, and as unequal as 12 heads and three axes of positions allow."""


def randomise(module):
    """Move every parameter away from special values (norms of 1 and 0, zero biases), and return the module."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def make_encoder():
    """make(size=32, **options) -> a small encoder with random weights, the same ones at every size."""

    def make(size=32, **options):
        torch.manual_seed(0)
        return randomise(HybridEncoder(img_size=size, **{"widths": WIDTHS, **options}))

    return make


@pytest.fixture
def make_hyspark():
    """make(size=32, **options) -> a small pre-training network as built."""

    def make(size=32, **options):
        torch.manual_seed(0)
        return build_hyspark(size, **{"widths": WIDTHS, "decoder_width": 32, **options})

    return make


@pytest.fixture
def make_hybird():
    """make(in_channel=1, n_classes=3, size=32, **options) -> a small segmentation network with random weights."""

    def make(in_channel=1, n_classes=3, size=32, **options):
        torch.manual_seed(0)
        return randomise(build_hybird(in_channel, n_classes, size, **{"widths": WIDTHS, **options}))

    return make


@pytest.fixture
def make_visible():
    """make(num_samples, grid, mask_ratio=0.5) -> a mask, another one for each sample."""

    def make(num_samples, grid, mask_ratio=0.5):
        return draw_visible(grid, mask_ratio, [torch.Generator().manual_seed(5 + i) for i in range(num_samples)])

    return make
