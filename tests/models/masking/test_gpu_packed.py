"""Packed equals masked on CUDA, in fp32, and under autocast as nearly as masked equals itself in fp32."""

import copy

import pytest
import torch
from torch import nn

from hyspark.models.backbones import build_backbone
from hyspark.models.masking.mask import draw_visible
from hyspark.models.spark import PyramidEncoder

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NETWORKS = {"timm/resnet18": (2, 96), "monai/segresnet": (3, 32)}
"""Axes, and voxels per axis of a crop."""
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def maps_and_gradients(encoder: nn.Module, compute: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """All maps of a batch of three crops, and the gradients of all weights, in one order."""
    network = copy.deepcopy(encoder).to(DEVICE)
    network.compute = compute
    axes = len(network.img_size)
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn(3, network.in_channels, *network.img_size, generator=generator).to(DEVICE)
    grid = tuple(size // patch for size, patch in zip(network.img_size, network.patch, strict=True))
    visible = draw_visible(grid, 0.6, [torch.Generator().manual_seed(seed) for seed in range(3)])
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        maps = network(volumes, visible.to(DEVICE))
    assert all(x.ndim == axes + 2 for x in maps)
    torch.autograd.backward([x.float().square().mean() for x in maps])
    return [*maps, *(p.grad for p in network.parameters() if p.grad is not None)]


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference of a tensor by its norm, of the wanted one's; tensors that should be zero do not count."""
    norms = [x.float().norm().item() for x in wanted]
    pairs = [pair for *pair, norm in zip(found, wanted, norms, strict=True) if norm > 1e-4 * max(norms)]
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


@pytest.fixture(params=NETWORKS)
def encoder(request, monkeypatch) -> PyramidEncoder:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    axes, edge = NETWORKS[request.param]
    torch.manual_seed(0)
    backbone = build_backbone(request.param, 1, axes)
    return PyramidEncoder(backbone.network, (edge,) * axes, 1, run=backbone.run)


def test_packed_equals_masked(encoder):
    packed, masked = (maps_and_gradients(encoder, compute) for compute in ("packed", "masked"))
    assert error(packed, masked) < 5e-3


@pytest.mark.parametrize("precision", HALVES)
def test_packed_loses_no_more_than_masked_under_autocast(encoder, precision):
    wanted = maps_and_gradients(encoder, "masked")
    packed, masked = (error(maps_and_gradients(encoder, c, HALVES[precision]), wanted) for c in ("packed", "masked"))
    assert packed < 1.5 * masked + 1e-3
