"""What a pre-training would cost, before it is started: operations, memory, time, disk. `--dry_run` prints it.

Parameters, operations and the bytes of weights, gradients and optimizer are computed; time and the memory of
activations are extrapolated from trial steps; the store is estimated from the headers of the volumes. Units are
decimal: 1 GB is 10^9 bytes. Counts of crops are per step and process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hyspark.config.pretrain import PretrainConfig
from hyspark.data.preprocessing.store_size import StoreSize
from hyspark.models.contrastive import METHODS as VIEW_METHODS
from hyspark.models.contrastive import Siamese
from hyspark.models.encoder import HybridEncoder
from hyspark.models.masked_autoencoder import HySparK
from hyspark.models.masking.mask import draw_visible, grid_of
from hyspark.planning.flops import by_part, flops_by_layer, flops_of_step
from hyspark.planning.trial_steps import Trial, extrapolated
from hyspark.training.distributed import Processes
from hyspark.utils.text import format_bytes as size
from hyspark.utils.text import format_count as scaled
from hyspark.utils.text import format_duration as duration

ADAM_STATE = 2
"""Numbers per parameter that AdamW keeps."""


@dataclass(frozen=True)
class Flops:
    """Of a step in one process. forward: by part of the network. encoder: forward, by way of computing."""

    forward: dict[str, int]
    encoder: dict[str, int]
    backward: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: base, plus per_crop for each crop of a step (None where they could not be measured), and
    what is free (None where the system does not tell).
    """

    base: float | None
    per_crop: float | None
    free: int | None

    def of(self, crops: int) -> float | None:
        """Bytes with so many crops."""
        return None if self.base is None or self.per_crop is None else self.base + crops * self.per_crop

    @property
    def most(self) -> float | None:
        """Crops that fit, infinite where they take nothing measurable; None where it cannot be said."""
        if self.free is None or self.base is None or self.per_crop is None:
            return None
        if self.base > self.free:
            return 0
        return (self.free - self.base) // self.per_crop if self.per_crop else math.inf


def plan_text(
    config: PretrainConfig,
    processes: Processes,
    model: HySparK | Siamese,
    flops: Flops | None,
    trials: Sequence[Trial],
    free: int | None,
    storage: StoreSize,
    *,
    steps_per_epoch: int,
    steps_left: int,
) -> str:
    """The plan, for the terminal. free: bytes that a process may take. steps_left: of the whole run."""
    crops = crops_per_process(config, processes)
    lines = [
        *network_lines(model, flops, crops),
        *memory_lines(config, processes, model, estimate_memory(trials, free), crops, trials),
        *time_lines(trials, crops, steps_per_epoch, steps_left, processes),
        *storage_lines(storage),
    ]
    return "\n".join(f"{name:8s} {text}" for name, text in lines)


def crops_per_process(config: PretrainConfig, processes: Processes) -> int:
    """Crops of a step in one process."""
    return config.bs // processes.world_size * config.crops_per_volume


def count_flops(config: PretrainConfig, model: HySparK | Siamese, crops: int) -> Flops | None:
    """FLOPs of a step of so many crops; None for networks that compare views, which are not counted."""
    if isinstance(model, Siamese):
        return None
    size, channels = config.crop_size, config.channels
    grid = grid_of(size, model.encoder.patch)
    visible = draw_visible(grid, config.mask, [torch.Generator().manual_seed(i) for i in range(crops)])
    _, backward = flops_of_step(model, size, crops, visible, channels)
    encoder = {}
    if isinstance(model.encoder, HybridEncoder):
        chosen = model.encoder.compute
        try:
            for model.encoder.compute in ("packed", "masked"):
                encoder[model.encoder.compute] = sum(flops_by_layer(model.encoder, size, crops, visible).values())
        finally:
            model.encoder.compute = chosen
    return Flops(by_part(flops_by_layer(model, size, crops, visible, channels)), encoder, backward)


def estimate_memory(trials: Sequence[Trial], free: int | None) -> Memory:
    """From the peaks of two trials at least."""
    peaks = [(t.crops, t.peak) for t in trials if t.peak is not None]
    if len(peaks) < 2:
        return Memory(None, None, free)
    base = extrapolated(peaks, 0)
    return Memory(base, extrapolated(peaks, 1) - base, free)


def state_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of weights (with buffers), gradients and optimizer state."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    return weights, trained, ADAM_STATE * trained


# Text


def network_lines(model: nn.Module, flops: Flops | None, crops: int) -> list[tuple[str, str]]:
    """Parameters and operations."""
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parts = ", ".join(f"{name} {scaled(number)}" for name, number in parameters.items() if number)
    network = ("network", f"{scaled(sum(parameters.values()))} parameters: {parts}")
    if flops is None:
        return [network]
    forward = ", ".join(f"{name} {scaled(number)}" for name, number in flops.forward.items())
    total = scaled(sum(flops.forward.values()))
    lines = [
        network,
        ("FLOPs", f"per step of {crops} crops in a process: {total} forward ({forward}),"),
        ("", f"{scaled(flops.backward)} backward, with what it computes again (counted)"),
    ]
    if flops.encoder:
        packed, masked = flops.encoder["packed"], flops.encoder["masked"]
        times = f"{masked / packed:.1f} times as much"
        lines.append(("", f"encoder forward: packed {scaled(packed)}, masked {scaled(masked)}, {times}"))
    return lines


def memory_lines(
    config: PretrainConfig,
    processes: Processes,
    model: nn.Module,
    memory: Memory,
    crops: int,
    trials: Sequence[Trial],
) -> list[tuple[str, str]]:
    """Bytes, what fits, and what to change where it does not."""
    weights, gradients, optimizer = state_bytes(model)
    state = weights + gradients + optimizer
    parts = f"weights {size(weights)}, gradients {size(gradients)}, optimizer {size(optimizer)}"
    lines = [("memory", f"{size(state)} in each process: {parts} (computed)")]
    total = memory.of(crops)
    if memory.base is not None and memory.per_crop is not None and total is not None:
        parts = f"{size(memory.per_crop)} per crop and {size(memory.base)} for all else"
        lines.append(("", f"{size(total)} at the peak of {crops} crops: {parts} (estimated from {tried(trials)})"))
    elif len(trials) == 1:
        lines.append(("", f"{size(trials[0].peak or state)} at the peak of one crop; two do not fit"))
    fits = (
        "the system does not tell what is free" if memory.free is None else f"{size(memory.free)} free for each process"
    )
    if memory.most is not None:
        most = "any number of" if math.isinf(memory.most) else f"about {memory.most:.0f}"
        fits += f": {most} crops would fit, this run has {crops}"
    lines.append(("", f"{fits}; loader processes come on top"))
    most_crops = memory.most if len(trials) >= 2 else len(trials)
    if most_crops is not None and most_crops < crops:
        lines.append(("WARNING", shortage(config, processes, int(most_crops), crops)))
    return lines


def shortage(config: PretrainConfig, processes: Processes, most: int, crops: int) -> str:
    """What to change where a step does not fit."""
    change = []
    if most >= config.crops_per_volume:
        change.append(f"--bs {most // config.crops_per_volume * processes.world_size}")
    elif most:
        change.append(f"--bs {processes.world_size} --crops_per_volume {most}")
    if config.precision == "fp32":
        change.append("--precision bf16")
    if config.method not in VIEW_METHODS and config.decoder_width > 16:
        change.append(f"--decoder_width {max(16, config.decoder_width // 32 * 16)}")
    if not most:
        change.append("a smaller --input_size")
    what = f"{crops} crops in a process do not fit the memory" if most else "not even one crop fits the memory"
    return f"{what}; try {' or '.join(change)}"


def time_lines(
    trials: Sequence[Trial], crops: int, steps_per_epoch: int, steps_left: int, processes: Processes
) -> list[tuple[str, str]]:
    """Time of a step, an epoch and the run."""
    if not trials:
        return [("time", "unknown: no step could be tried")]
    step = seconds_per_step(trials, crops)
    how = "measured" if crops in [t.crops for t in trials] else f"extrapolated from {tried(trials)}"
    alone = "" if processes.world_size == 1 else f" by one of {processes.world_size} processes alone"
    busy = "with the machine as busy as it is now"
    return [
        ("time", f"{duration(step)} per step of {crops} crops in a process ({how}{alone}, {busy})"),
        ("", f"{duration(step * steps_per_epoch)} per epoch of {steps_per_epoch} steps"),
        ("", f"{duration(step * steps_left)} for the run, {steps_left} steps; preparing and reading volumes, reviews "
             "and exchange between processes come on top"),
    ]  # fmt: skip


def seconds_per_step(trials: Sequence[Trial], crops: int) -> float:
    """Seconds of a step of so many crops: those measured, or beyond them by the last two trials, but at most in
    proportion to the last, since no step has a negative fixed part.
    """
    known = {t.crops: t.seconds for t in trials}
    if crops in known:
        return known[crops]
    proportional = trials[-1].seconds * crops / trials[-1].crops
    line = extrapolated([(t.crops, t.seconds) for t in trials], crops)
    return min(max(line, trials[-1].seconds), proportional) if len(trials) > 1 else proportional


def storage_lines(storage: StoreSize) -> list[tuple[str, str]]:
    """What is prepared, what is to come, and whether it fits the disk."""
    total = storage.prepared + storage.missing
    done = f"{storage.prepared} of {total} volumes prepared in {storage.folder}, {size(storage.prepared_bytes)}"
    lines = [("store", done)]
    if storage.missing:
        basis = "assumed" if storage.is_assumed else "as in the volumes already prepared"
        lines.append(
            (
                "",
                f"the other {storage.missing} take about {size(storage.missing_bytes)}, by their headers and "
                f"{storage.bytes_per_voxel:.2g} bytes per voxel ({basis}); {size(storage.free)} free on that disk",
            )
        )
    if storage.unreadable:
        lines.append(("WARNING", f"{storage.unreadable} of the files looked at have no readable NIfTI header"))
    if storage.missing_bytes > storage.free:
        lines.append(("WARNING", "the prepared volumes do not fit the disk; name another folder with --store_dir"))
    return lines


def tried(trials: Sequence[Trial]) -> str:
    """The trials that estimates rest on: "steps of 2 and 4 crops"."""
    return f"steps of {' and '.join(str(t.crops) for t in trials[-2:])} crops"
