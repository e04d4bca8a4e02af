"""Time and memory of the encoder and of the whole training step. HySparK-B unless told otherwise, random volumes."""

import statistics
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import published
import torch
from measure import in_fresh_process, peak_memory, seconds
from torch import Tensor, nn

from hyspark import build_hyspark
from hyspark.models.defaults import WIDTHS
from hyspark.models.encoder import HybridEncoder
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import draw_visible
from hyspark.models.masking.packed import packed
from hyspark.planning.flops import flops_by_layer, step_flops, sum_by_module
from hyspark.training.precision import AUTOCAST_DTYPES

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Visible fractions at which the encoder is timed."""
NUM_MASKS = 5
"""Masks that repeated steps take in turn: each has its own number of neighbours, as in training."""


@dataclass(frozen=True)
class Setting:
    """What is measured. repeats: of the timed calls, whose median is taken; one more comes first."""

    device: str = "cpu"
    threads: int = 2
    num_samples: int = 2
    edge: int = 96
    repeats: int = 3

    def start(self) -> None:
        """Threads and seed of this process."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)

    def finish(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def volumes(self) -> Tensor:
        """Random (b, 1, *size)."""
        return torch.rand(self.num_samples, 1, *(self.edge,) * 3, device=self.device)

    def visible(self, fraction: float, seed: int = 0) -> Tensor:
        """A mask with this fraction of patches, on the CPU."""
        first = seed * self.num_samples
        generators = [torch.Generator().manual_seed(first + i) for i in range(self.num_samples)]
        return draw_visible((self.edge // 16,) * 3, 1 - fraction, generators)

    def peak(self) -> int:
        """Largest memory of this process: of the device, or resident."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()


def both_encoders(setting: Setting, **options: Any) -> dict[str, HybridEncoder]:
    """The encoder masked and packed."""
    return {
        compute: HybridEncoder(img_size=setting.edge, compute=compute, **options).to(
            setting.device, memory_format=torch.channels_last_3d
        )
        for compute in ("masked", "packed")
    }


def encoder(setting: Setting, **options: Any) -> dict[str, Any]:
    """Forward and backward of the encoder in fp32: masked against packed at a quarter of the patches, taking turns, and
    packed at several fractions. `seconds` by fraction, `fraction_ratio` of .1 to .25, `ratio` of masked to packed.
    """
    setting.start()
    nets = both_encoders(setting, **options)
    volumes = setting.volumes()

    def both_ways(compute: str, visible: Tensor) -> None:
        net = nets[compute]
        maps = net.encode(volumes, net.patches(volumes, visible))[1:]
        torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
        net.zero_grad()
        setting.finish()

    quarter = setting.visible(0.25)
    both_ways("masked", quarter)
    both_ways("packed", quarter)
    times: dict[str, list[float]] = {"masked": [], "packed": []}
    for _ in range(setting.repeats):
        for compute, taken in times.items():
            taken.append(seconds(partial(both_ways, compute, quarter)))
    by_fraction = {
        fraction: statistics.median(seconds(partial(both_ways, "packed", mask)) for _ in range(setting.repeats))
        for fraction, mask in ((fraction, setting.visible(fraction)) for fraction in FRACTIONS)
    }
    masked, packed = (statistics.median(taken) for taken in times.values())
    return {
        "masked_seconds": masked,
        "packed_seconds": packed,
        "ratio": masked / packed,
        "seconds": by_fraction,
        "fraction_ratio": by_fraction[0.1] / by_fraction[0.25],
    }


def stages(setting: Setting) -> dict[str, dict[str, float]]:
    """Each resolution of the encoder by itself, its blocks and the convolution that widens it: seconds forward and
    backward at a quarter of the patches in fp32, packed and masked taking turns, by voxels per patch and axis.
    """
    setting.start()
    nets = both_encoders(setting)
    patches = nets["packed"].patches(setting.volumes(), setting.visible(0.25))
    results = {}
    for number, width in enumerate(WIDTHS, start=1):
        edge = setting.edge // patches.grid[0] >> (number - 1)
        names = [f"layer{number}", *([f"expend{number}"] if number < len(WIDTHS) else [])]
        layers = {
            compute: nn.Sequential(*(net.embeddings.get_submodule(name) for name in names))
            for compute, net in nets.items()
        }
        dense = torch.rand(setting.num_samples, *(g * edge for g in patches.grid), width, device=setting.device)
        maps = {"masked": dense.movedim(-1, 1), "packed": patches.pack(dense.movedim(-1, 1))}

        def both_ways(compute: str, maps: Any = maps, layers: Any = layers) -> None:
            with packed(patches, nets["packed"].patch) if compute == "packed" else hidden(patches.visible):
                out = layers[compute](maps[compute].requires_grad_())
            out.backward(torch.ones_like(out))
            setting.finish()

        for compute in maps:
            both_ways(compute)
        times: dict[str, list[float]] = {compute: [] for compute in maps}
        for _ in range(setting.repeats):
            for compute, taken in times.items():
                taken.append(seconds(partial(both_ways, compute)))
        results[f"{edge} voxels"] = {compute: statistics.median(taken) for compute, taken in times.items()}
    return results


class TrainingStep:
    """A pre-training step that can be repeated: forward, backward, clip, AdamW; one batch, changing masks.

    Args:
        precision: "fp32" or "bf16".
        channels_last, fused: layout of the weights, kind of AdamW; a training run has both.
        options: of `build_hyspark`.
    """

    def __init__(
        self,
        setting: Setting,
        compute: str,
        precision: str,
        *,
        channels_last: bool = True,
        fused: bool = True,
        **options: Any,
    ) -> None:
        setting.start()
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.setting = setting
        self.network = build_hyspark(setting.edge, compute=compute, **options).to(setting.device, memory_format=layout)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=fused)
        self.volumes = setting.volumes()
        self.masks = cycle([setting.visible(0.25, seed) for seed in range(NUM_MASKS)])
        self.precision = precision

    def __call__(self) -> None:
        with torch.autocast(self.setting.device, AUTOCAST_DTYPES[self.precision], enabled=self.precision != "fp32"):
            loss = self.network(self.volumes, next(self.masks)).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5).item()
        self.optimizer.step()
        self.setting.finish()


def step(setting: Setting, compute: str, precision: str, **options: Any) -> dict[str, float]:
    """A training step (forward, backward, clip, AdamW): median seconds a sample, and peak memory in bytes."""
    take = TrainingStep(setting, compute, precision, **options)
    take()
    median = statistics.median(seconds(take) for _ in range(setting.repeats))
    return {"seconds": median / setting.num_samples, "peak_bytes": setting.peak()}


def steps(setting: Setting, checkout: str = "", **options: Any) -> dict[str, dict[str, float]]:
    """The whole step in several ways, each in a fresh process: "masked fp32", "packed fp32", "packed bf16", and
    "published fp32" where a checkout is given.
    """
    rows = {
        f"{compute} {precision}": in_fresh_process(partial(step, setting, compute, precision, **options))[0]
        for compute, precision in (("packed", "fp32"), ("packed", "bf16"), ("masked", "fp32"))
    }
    if checkout:
        s = setting
        arguments = (checkout, s.device, s.threads, s.num_samples, s.edge, s.repeats)
        rows["published fp32"] = in_fresh_process(published.step, *arguments)[0]
    return rows


def flops(setting: Setting, **options: Any) -> dict[str, Any]:
    """Counted, not timed: FLOPs a sample of the packed step forward and backward, of the masked one forward, and the
    forward pass by layer, largest first.
    """
    visible, size = setting.visible(0.25), (setting.edge,) * 3
    packed, masked = (build_hyspark(setting.edge, compute=compute, **options) for compute in ("packed", "masked"))
    layers = flops_by_layer(packed, size, setting.num_samples, visible)
    forward, backward = step_flops(packed, size, setting.num_samples, visible)
    b = setting.num_samples
    return {
        "forward": forward / b,
        "backward": backward / b,
        "encoder_fraction": sum_by_module(layers)["encoder"] / forward,
        "masked_forward": sum(flops_by_layer(masked, size, b, visible).values()) / b,
        "by_layer": {name: n / b for name, n in sorted(layers.items(), key=lambda item: -item[1])},
    }
