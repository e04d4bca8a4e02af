"""Networks of others under a mask: what loads back into the original, and how well what must not change does not.

    python benchmarks/backbones.py                              # the table of docs/reference/networks.md
    python benchmarks/backbones.py --names timm/resnet50 mypackage.module:factory

Errors are the largest over all maps, as fractions of the map's largest value, in double precision; a network in which
all is visible is compared in training, with the statistics of the batch.
"""

import re
from collections.abc import Sequence

import timm
import torch
import torchvision
from tap import Tap
from torch import Tensor, nn

from hyspark import build_spark
from hyspark.models.backbones import build_backbone
from hyspark.models.defaults import grid_of
from hyspark.models.masking.mask import visible_at

NAMES = (
    *(f"timm/{name}" for name in ("resnet18", "resnet50", "resnet101", "resnet152", "resnet200", "resnetv2_50")),
    *(f"timm/convnext_{name}" for name in ("small", "base", "large")),
    *(f"timm/{name}" for name in ("convnextv2_tiny", "efficientnet_b0", "regnety_002", "densenet121", "nfnet_f0")),
    *(f"torchvision/{name}" for name in ("resnet18", "resnet50", "convnext_tiny")),
    *(f"monai/resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200)),
    *("monai/segresnet", "monai/dynunet"),
)


class Arguments(Tap):
    """Check networks under a mask."""

    names: tuple[str, ...] = NAMES  # As after spark/ in train.py --model


def with_head(name: str, plain: nn.Module) -> nn.Module:
    """The network as its library makes it, fresh, with a classifier where it comes with one."""
    library, _, rest = name.partition("/")
    if library == "timm":
        return timm.create_model(rest)
    if library == "torchvision":
        return torchvision.models.get_model(rest, weights=None)
    return plain


def error(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Largest difference of maps, of each map's largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ones, others, strict=True))


def seeded(encoder: nn.Module, images: Tensor, visible: Tensor | None) -> list[Tensor]:
    """Its maps, with the same blocks left out by stochastic depth in every call."""
    torch.manual_seed(1)
    maps: list[Tensor] = encoder(images, visible)
    return maps


@torch.no_grad()
def row(name: str) -> list[str]:
    """A line of the table."""
    torch.manual_seed(0)
    axes = 3 if name.startswith("monai/") else 2
    channels, size = (1, 64) if axes == 3 else (3, 128)
    fresh = [build_backbone(name, channels, axes) for _ in range(2)]
    encoder = build_spark(
        fresh[0].network, size, 0.5, in_channels=channels, axes=axes, decoder_width=64, run=fresh[0].run
    ).encoder
    original = with_head(name, fresh[1].network)
    loaded = original.load_state_dict(encoder.weights(), strict=False)
    assert not loaded.unexpected_keys
    heads = sorted({re.sub(r"\.\w+$", "", key) for key in loaded.missing_keys})
    encoder.double().eval()
    images = torch.randn(2, channels, *(size,) * axes, dtype=torch.float64)
    visible = torch.rand(2, 1, *grid_of(encoder.img_size, encoder.patch)) > 0.5
    visible.view(2, -1)[:, 0], visible.view(2, -1)[:, -1] = True, False
    found = encoder(images, visible)
    seen = visible_at(visible, images.shape[2:])
    changed = encoder(images.where(seen, torch.full_like(images, 1e3)), visible)
    left = max(float(x[~visible_at(visible, x.shape[2:]).expand_as(x)].abs().max()) for x in found)
    alone = [encoder(images[i : i + 1], visible[i : i + 1]) for i in range(2)]
    together = [torch.cat(maps) for maps in zip(*alone, strict=True)]
    encoder.train()  # with the statistics of the batch
    dense, all_visible = (seeded(encoder, images, mask) for mask in (None, torch.ones_like(visible)))
    return [
        name,
        f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M",
        str(len(encoder.weights())),
        ", ".join(heads) or "none",
        ", ".join(str(s[0] if len(set(s)) == 1 else s) for _, s in reversed(encoder.maps)),
        f"{error(changed, found):.0e}",
        f"{left:.0e}",
        f"{error(all_visible, dense):.0e}",
        f"{error(found, together):.0e}",
    ]


if __name__ == "__main__":
    heading = ["network", "parameters", "keys loaded", "randomly initialised", "strides of its maps"]
    heading += ["hidden pixels changed", "at hidden positions", "all visible against plain", "batch against samples"]
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for name in Arguments().parse_args().names:
        print(f"| {' | '.join(row(name))} |", flush=True)
