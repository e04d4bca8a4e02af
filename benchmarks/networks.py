"""Time and memory of the encoder and of the whole training step. HySparK-B unless told otherwise, random volumes."""

import statistics
from contextlib import nullcontext
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
from hyspark.models.masking.patches import PATCH_EDGES, same_conv
from hyspark.planning.flops import flops_by_layer, step_flops, sum_by_module
from hyspark.training.precision import AUTOCAST_DTYPES

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Visible shares at which the encoder is timed."""
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

    def visible(self, share: float, seed: int = 0) -> Tensor:
        """A mask with this share of patches, on the CPU."""
        first = seed * self.num_samples
        generators = [torch.Generator().manual_seed(first + i) for i in range(self.num_samples)]
        return draw_visible((self.edge // 16,) * 3, 1 - share, generators)

    def peak(self) -> int:
        """Largest memory of this process: of the device, or resident."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()


def encoder(setting: Setting, **options: Any) -> dict[str, Any]:
    """Forward and backward of the encoder in fp32: masked against packed at a quarter of the patches, taking turns, and
    packed at several shares. `seconds` by share, `share_ratio` of .1 to .25, `ratio` of masked to packed.
    """
    setting.start()
    net = HybridEncoder(img_size=setting.edge, **options).to(setting.device, memory_format=torch.channels_last_3d)
    volumes = setting.volumes()

    def both_ways(compute: str, visible: Tensor) -> None:
        net.compute = compute
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
    by_share = {
        share: statistics.median(seconds(partial(both_ways, "packed", mask)) for _ in range(setting.repeats))
        for share, mask in ((share, setting.visible(share)) for share in SHARES)
    }
    masked, packed = (statistics.median(taken) for taken in times.values())
    return {
        "masked_seconds": masked,
        "packed_seconds": packed,
        "ratio": masked / packed,
        "seconds": by_share,
        "share_ratio": by_share[0.1] / by_share[0.25],
    }


def stages(setting: Setting) -> dict[str, dict[str, float]]:
    """Each resolution of the encoder by itself, its blocks and the convolution that widens it: seconds forward and
    backward at a quarter of the patches in fp32, packed and masked taking turns, by voxels per patch and axis.
    """
    setting.start()
    net = HybridEncoder(img_size=setting.edge).to(setting.device, memory_format=torch.channels_last_3d)
    mask = setting.visible(0.25)
    patches = net.patches(setting.volumes(), mask)
    results = {}
    for number, (edge, width) in enumerate(zip(PATCH_EDGES, WIDTHS, strict=True), start=1):
        layers = [*net.embeddings.get_submodule(f"layer{number}").children()]
        widen = net.embeddings.get_submodule(f"expend{number}") if number < len(PATCH_EDGES) else None
        size = [g * edge for g in patches.grid]
        dense = torch.rand(setting.num_samples, *size, width, device=setting.device).movedim(-1, 1)
        inputs = {
            "masked": (dense.requires_grad_(), None),
            "packed": (patches.pack(dense.detach()).requires_grad_(), patches),
        }
        times: dict[str, list[float]] = {compute: [] for compute in inputs}

        def both_ways(compute: str, inputs: Any = inputs, layers: Any = layers, widen: Any = widen) -> None:
            x, geometry = inputs[compute]
            with hidden(patches.visible) if geometry is None else nullcontext():
                for layer in layers:
                    x = layer(x, geometry)
                x = x if widen is None else same_conv(widen, x, geometry)
            x.backward(torch.ones_like(x))
            setting.finish()

        for compute in inputs:
            both_ways(compute)
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
        "encoder_share": sum_by_module(layers)["encoder"] / forward,
        "masked_forward": sum(flops_by_layer(masked, size, b, visible).values()) / b,
        "by_layer": {name: n / b for name, n in sorted(layers.items(), key=lambda item: -item[1])},
    }
