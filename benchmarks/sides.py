"""One encoder in each of the ways that can compute it: dense, under `hidden`, under `packed`, and as S3D."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, Literal

import s3d
import torch
from measure import in_fresh_process, peak_memory, resident_memory, wall_and_processor_seconds
from networks import NUM_MASKS
from torch import Tensor, nn

from hyspark.models.backbones import build_backbone
from hyspark.models.defaults import grid_of
from hyspark.models.encoder import HybridEncoder
from hyspark.models.masking.context import hidden
from hyspark.models.masking.mask import draw_visible, visible_at
from hyspark.models.masking.packed import packed
from hyspark.models.spark import PyramidEncoder
from hyspark.training.precision import AUTOCAST_DTYPES

Side = Literal["dense", "hidden", "packed", "S3D"]
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
OWN = "hyspark"
"""Name of the package's own encoder, beside the names of `build_backbone`."""


@dataclass(frozen=True)
class Case:
    """What is computed.

    Args:
        network: name for `build_backbone`, or `OWN`.
        edge: voxels per axis of a crop.
        ratio: fraction of hidden patches.
        batch: crops of a step.
        axes: number of spatial axes.
        checked_edge: voxels per axis of the crops that `differences` compares.
        options: of the package's own encoder.
    """

    network: str
    edge: int
    ratio: float
    batch: int
    axes: int = 3
    checked_edge: int = 64
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def channels(self) -> int:
        """Channels of a crop: 3 of images, 1 of CT."""
        return 3 if self.axes == 2 else 1


@dataclass(frozen=True)
class How:
    """How it is computed: on which device and threads, in which precision, and S3D from which checkout."""

    device: str = "cpu"
    threads: int = 1
    precision: str = "fp32"
    nnssl: str = ""


def build_encoder(case: Case, side: Side) -> Any:
    """Build the encoder of a case, with maps at several strides as in pre-training and always the same weights."""
    torch.manual_seed(0)
    size = (case.edge,) * case.axes
    if case.network == OWN:
        compute = "packed" if side == "packed" else "masked"
        return HybridEncoder(case.channels, size, axes=case.axes, compute=compute, **dict(case.options))
    backbone = build_backbone(case.network, case.channels, case.axes)
    return PyramidEncoder(backbone.network, size, case.channels, run=backbone.run)


def possible_sides(case: Case, how: How) -> tuple[Side, ...]:
    """List the ways that can compute a case; S3D where a checkout is given and converts every layer."""
    sides: tuple[Side, ...] = ("packed", "hidden", "dense")
    if not how.nnssl or case.network == OWN or case.axes != 3:
        return sides
    encoder = build_encoder(replace(case, edge=case.checked_edge), "S3D")
    return (*sides, "S3D") if s3d.converts(encoder.backbone) else sides


def placed(encoder: Any, side: Side, axes: int, how: How) -> Any:
    """Place an encoder on its device as training does: weights channels last, but S3D's as its trainers have them."""
    if side == "S3D":
        encoder.backbone = s3d.convert(encoder.backbone, how.nnssl)
        return encoder.to(how.device)
    return encoder.to(how.device, memory_format=LAYOUTS[axes])


def compute_maps(encoder: Any, side: Side, volumes: Tensor, visible: Tensor, nnssl: str = "") -> list[Tensor]:
    """Compute the maps of an encoder, dense or (under `packed`) at visible patches.

    Args:
        encoder: on the device of the volumes.
        side: the way to compute them.
        volumes: (b, c, *size).
        visible: bool (b, 1, *grid), on the CPU or on that device.
        nnssl: checkout, for S3D.
    """
    if side == "dense":
        found: list[Tensor] = encoder(volumes)
        return found
    if isinstance(encoder, HybridEncoder):
        return encoder.encode(volumes, encoder.patches(volumes, visible))
    visible = visible.to(volumes.device)
    if side == "packed":
        with packed(visible, encoder.patch, encoder.safe) as context:
            return encoder.features(context.pack(volumes))
    masked = volumes * visible_at(visible, volumes.shape[2:])
    if side == "S3D":
        s3d.set_mask(visible, nnssl)
        return encoder.features(masked)
    with hidden(visible, encoder.safe):
        return encoder.features(masked)


class Steps:
    """Forward and backward of an encoder on one batch, with another mask each time."""

    def __init__(self, case: Case, side: Side, how: How) -> None:
        torch.set_num_threads(how.threads)
        self.encoder = placed(build_encoder(case, side), side, case.axes, how)
        self.side, self.how = side, how
        shape = (case.batch, case.channels, *(case.edge,) * case.axes)
        self.volumes = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(how.device)
        self.masks = cycle(draw_masks(case, self.encoder.patch))

    def __call__(self) -> None:
        how = self.how
        dtype, enabled = AUTOCAST_DTYPES[how.precision], how.precision != "fp32"
        with torch.autocast(how.device, dtype, enabled=enabled):
            maps = compute_maps(self.encoder, self.side, self.volumes, next(self.masks), how.nnssl)
        used = [x for x in maps if x.requires_grad]
        torch.autograd.backward(used, [torch.ones_like(x) for x in used])
        self.encoder.zero_grad(set_to_none=True)
        if how.device == "cuda":
            torch.cuda.synchronize()


def draw_masks(case: Case, patch: Any) -> list[Tensor]:
    """Draw the masks that steps take in turn, bool (b, 1, *grid) on the CPU."""
    grid = grid_of((case.edge,) * case.axes, patch)
    seeds = [range(number * case.batch, (number + 1) * case.batch) for number in range(NUM_MASKS)]
    return [draw_visible(grid, case.ratio, [torch.Generator().manual_seed(s) for s in own]) for own in seeds]


def times(case: Case, sides: Sequence[Side], how: How, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Measure steps of several sides that take turns, after one of each to warm up.

    Returns:
        By side, the seconds of each step and the seconds of the processor (user and system).
    """
    steps = {side: Steps(case, side, how) for side in sides}
    for step in steps.values():
        step()
    found: dict[str, dict[str, list[float]]] = {side: {"seconds": [], "processor": []} for side in sides}
    for _ in range(repeats):
        for side, step in steps.items():
            for name, taken in zip(found[side], wall_and_processor_seconds(step), strict=True):
                found[side][name].append(taken)
    return found


def peak(case: Case, side: Side, how: How) -> dict[str, int]:
    """Measure the memory of a step in a process that is its alone: in bytes before it, and the peak."""
    measured: dict[str, int] = in_fresh_process(partial(own_peak, case, side, how))[0]
    return measured


def own_peak(case: Case, side: Side, how: How) -> dict[str, int]:
    """Measure the memory of this process before and during a step."""
    step = Steps(case, side, how)
    before = resident_memory()
    step()
    return {"before": before, "peak": peak_memory()}


def differences(case: Case, how: How, against: Side = "hidden") -> dict[str, float]:
    """Compare packed with another side in double precision, in crops of `checked_edge`.

    Returns:
        Largest difference of the maps' values at visible positions, as a fraction of the largest of the map, and of
        the gradients of a module's weights, as a fraction of the largest of the module.
    """
    torch.set_num_threads(how.threads)
    case = replace(case, edge=case.checked_edge, batch=min(case.batch, 2))
    encoder, other = build_encoder(case, "packed"), build_encoder(case, against)
    if against == "S3D":
        other.backbone = s3d.convert(other.backbone, how.nnssl)
    encoder, other = encoder.double(), other.double()
    visible = draw_masks(case, encoder.patch)[0]
    volumes = torch.randn(case.batch, case.channels, *(case.edge,) * case.axes, dtype=torch.float64)
    geometry = encoder.patches(volumes, visible)
    torch.manual_seed(1)  # of stochastic depth and dropout
    maps = compute_maps(encoder, "packed", volumes, visible)
    torch.manual_seed(1)
    wanted = compute_maps(other, against, volumes, visible, how.nnssl)
    wanted = [x if x.shape == y.shape else geometry.pack(x) for x, y in zip(wanted, maps, strict=True)]
    for found in (maps, wanted):
        used = [x for x in found if x.requires_grad]
        torch.autograd.backward(used, [torch.linspace(-1, 1, x.numel()).to(x).view(x.shape) for x in used])
    return {
        "values": max(relative([a], [b]) for a, b in zip(maps, wanted, strict=True)),
        "gradients": worst_gradient(encoder, other),
    }


def relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of several tensors, as a fraction of the largest value of all."""
    most = max(x.detach().abs().max().item() for x in wanted)
    error = max((a - b).detach().abs().max().item() for a, b in zip(found, wanted, strict=True))
    return error / most if most else error


def worst_gradient(encoder: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of gradients of two encoders, by module."""
    worst = 0.0
    modules = dict(other.named_modules())
    for name, module in encoder.named_modules():
        pairs = [(p.grad, modules[name].get_parameter(key).grad) for key, p in module.named_parameters(recurse=False)]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known:
            worst = max(worst, relative(*zip(*known, strict=True)))
    return worst
