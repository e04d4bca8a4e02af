"""Estimate operations, memory, time and disk of a pre-training before it starts. `--dry_run` prints this plan.

Parameters, operations, and bytes of weights, gradients and optimizer are computed. Time and the memory of activations
are extrapolated from trial steps. The size of the store is estimated from the headers of the volumes. Units are
decimal: 1 GB is 10^9 bytes. Numbers of crops are per step and process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hyspark.config.pretrain import PretrainConfig
from hyspark.data.preprocessing.store_size import StoreSize
from hyspark.models.contrastive import Siamese
from hyspark.models.defaults import grid_of
from hyspark.models.masked_autoencoder import MaskedAutoencoder
from hyspark.models.masking.mask import draw_visible
from hyspark.models.masking.reconstructed import draw_reconstructed
from hyspark.models.spark import PyramidEncoder
from hyspark.planning.flops import flops_by_layer, step_flops, sum_by_module
from hyspark.planning.trial_steps import Trial, extrapolate
from hyspark.training.distributed import Processes
from hyspark.utils.text import format_bytes, format_count, format_duration

ADAM_STATE = 2
"""Values per parameter in AdamW's state."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step in one process.

    Attributes:
        forward: forward pass, by module of the network.
        encoder: forward pass of the encoder, by its `compute` ("packed", "masked").
        backward: backward pass.
    """

    forward: dict[str, int]
    encoder: dict[str, int]
    backward: int


@dataclass(frozen=True)
class Memory:
    """Memory of a process in bytes.

    Attributes:
        base: memory without crops; None if not measured.
        per_crop: additional memory of each crop of a step; None if not measured.
        free: free memory; None if the system does not report it.
    """

    base: float | None
    per_crop: float | None
    free: int | None

    def of(self, crops: int) -> float | None:
        """Estimate the bytes of a step with the given number of crops."""
        return None if self.base is None or self.per_crop is None else self.base + crops * self.per_crop

    @property
    def most(self) -> float | None:
        """Number of crops that fit, infinite if their memory is not measurable; None if unknown."""
        if self.free is None or self.base is None or self.per_crop is None:
            return None
        if self.base > self.free:
            return 0
        return (self.free - self.base) // self.per_crop if self.per_crop else math.inf


def format_plan(
    config: PretrainConfig,
    processes: Processes,
    model: MaskedAutoencoder | Siamese,
    flops: Flops | None,
    trials: Sequence[Trial],
    free: int | None,
    storage: StoreSize,
    *,
    steps_per_epoch: int,
    steps_left: int,
) -> str:
    """Format the plan for the terminal.

    Args:
        config: settings of the run.
        processes: this process among the others.
        model: the network.
        flops: FLOPs of a step; None if not counted.
        trials: measured trial steps.
        free: bytes that a process may use; None if unknown.
        storage: state of the store.
        steps_per_epoch: number of steps of an epoch.
        steps_left: number of steps until the end of the run.
    """
    crops = crops_per_process(config, processes)
    lines = [
        *network_lines(model, flops, crops),
        *memory_lines(config, processes, model, estimate_memory(trials, free), crops, trials),
        *time_lines(trials, crops, steps_per_epoch, steps_left, processes),
        *storage_lines(storage),
    ]
    return "\n".join(f"{name:8s} {text}" for name, text in lines)


def crops_per_process(config: PretrainConfig, processes: Processes) -> int:
    """Compute the number of crops of a step in one process."""
    return config.batch_size // processes.world_size * config.crops_per_volume


def count_flops(config: PretrainConfig, model: MaskedAutoencoder | Siamese, crops: int) -> Flops | None:
    """Count the FLOPs of a step with the given number of crops, by a copy of the network.

    Returns:
        The FLOPs; None for networks that compare views, and those whose copies compute with their weights.
    """
    if isinstance(model, Siamese) or (isinstance(model.encoder, PyramidEncoder) and not model.encoder.can_be_copied()):
        return None
    size, channels = model.encoder.img_size, config.in_channels
    grid = grid_of(size, model.encoder.patch)
    generators = [torch.Generator().manual_seed(i) for i in range(crops)]
    visible = draw_visible(grid, config.mask_ratio, generators)
    fraction = config.reconstruct_fraction
    reconstructed = draw_reconstructed(visible, fraction, generators) if fraction < 1 else None
    masks = {"visible": visible, "reconstructed": reconstructed}
    _, backward = step_flops(model, size, crops, channels=channels, **masks)
    encoder: dict[str, int] = {}
    network: Any = model.encoder
    if network.compute == "packed":
        try:
            for network.compute in ("masked", "packed"):
                encoder[network.compute] = sum(flops_by_layer(network, size, crops, visible, channels).values())
        finally:
            network.compute = "packed"
    forward = sum_by_module(flops_by_layer(model, size, crops, channels=channels, **masks))
    return Flops(forward, encoder, backward)


def estimate_memory(trials: Sequence[Trial], free: int | None) -> Memory:
    """Estimate memory from the peaks of at least two trials."""
    peaks = [(t.crops, t.peak) for t in trials if t.peak is not None]
    if len(peaks) < 2:
        return Memory(None, None, free)
    base = extrapolate(peaks, 0)
    return Memory(base, extrapolate(peaks, 1) - base, free)


def state_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Compute the bytes of weights (with buffers), gradients and optimizer state."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    return weights, trained, ADAM_STATE * trained


def network_lines(model: nn.Module, flops: Flops | None, crops: int) -> list[tuple[str, str]]:
    """Format the lines on parameters and operations."""
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parts = ", ".join(f"{name} {format_count(number)}" for name, number in parameters.items() if number)
    network = ("network", f"{format_count(sum(parameters.values()))} parameters: {parts}")
    if flops is None:
        return [network]
    forward = ", ".join(f"{name} {format_count(number)}" for name, number in flops.forward.items())
    total = format_count(sum(flops.forward.values()))
    lines = [
        network,
        ("FLOPs", f"per step of {crops} crops in a process: {total} forward ({forward}),"),
        ("", f"{format_count(flops.backward)} backward, recomputation included (counted)"),
    ]
    if flops.encoder:
        packed, masked = flops.encoder["packed"], flops.encoder["masked"]
        times = f"{masked / packed:.1f} times as many"
        lines.append(("", f"encoder forward: packed {format_count(packed)}, masked {format_count(masked)}, {times}"))
    return lines


def memory_lines(
    config: PretrainConfig,
    processes: Processes,
    model: nn.Module,
    memory: Memory,
    crops: int,
    trials: Sequence[Trial],
) -> list[tuple[str, str]]:
    """Format the lines on memory: bytes, the number of crops that fit, and advice if the run's do not."""
    weights, gradients, optimizer = state_bytes(model)
    state = weights + gradients + optimizer
    parts = f"weights {format_bytes(weights)}, gradients {format_bytes(gradients)}, optimizer {format_bytes(optimizer)}"
    lines = [("memory", f"{format_bytes(state)} in each process: {parts} (computed)")]
    total = memory.of(crops)
    if memory.base is not None and memory.per_crop is not None and total is not None:
        parts = f"{format_bytes(memory.per_crop)} per crop and {format_bytes(memory.base)} for the rest"
        lines.append(
            (
                "",
                f"{format_bytes(total)} at the peak of {crops} crops: {parts} "
                f"(estimated from {describe_trials(trials)})",
            )
        )
    elif len(trials) == 1:
        lines.append(("", f"{format_bytes(trials[0].peak or state)} at the peak of one crop; two do not fit"))
    fits = "free memory is unknown" if memory.free is None else f"{format_bytes(memory.free)} free for each process"
    if memory.most is not None:
        most = "any number of" if math.isinf(memory.most) else f"about {memory.most:.0f}"
        fits += f": {most} crops would fit, this run has {crops}"
    lines.append(("", f"{fits}; loader processes come on top"))
    most_crops = memory.most if len(trials) >= 2 else len(trials)
    if most_crops is not None and most_crops < crops:
        lines.append(("WARNING", memory_advice(config, processes, model, int(most_crops), crops)))
    return lines


def memory_advice(config: PretrainConfig, processes: Processes, model: nn.Module, most: int, crops: int) -> str:
    """Describe which settings to change if a step does not fit the memory."""
    change = []
    if most >= config.crops_per_volume:
        change.append(f"--batch_size {most // config.crops_per_volume * processes.world_size}")
    elif most:
        change.append(f"--batch_size {processes.world_size} --crops_per_volume {most}")
    if config.precision == "fp32":
        change.append("--precision bf16")
    if isinstance(model, MaskedAutoencoder):
        least = 2 ** len(model.decoder.levels)
        if config.decoder_width > least:
            change.append(f"--decoder_width {max(least, config.decoder_width // (2 * least) * least)}")
    if not most:
        change.append("a smaller --crop_size")
    what = f"{crops} crops in a process do not fit the memory" if most else "not even one crop fits the memory"
    return f"{what}; try {' or '.join(change)}"


def time_lines(
    trials: Sequence[Trial], crops: int, steps_per_epoch: int, steps_left: int, processes: Processes
) -> list[tuple[str, str]]:
    """Format the lines on the time of a step, an epoch and the run."""
    if not trials:
        return [("time", "unknown: no trial step succeeded")]
    step = seconds_per_step(trials, crops)
    how = "measured" if crops in [t.crops for t in trials] else f"extrapolated from {describe_trials(trials)}"
    alone = "" if processes.world_size == 1 else f" by one of {processes.world_size} processes alone"
    busy = "at the current load of the machine"
    return [
        ("time", f"{format_duration(step)} per step of {crops} crops in a process ({how}{alone}, {busy})"),
        ("", f"{format_duration(step * steps_per_epoch)} per epoch of {steps_per_epoch} steps"),
        ("", f"{format_duration(step * steps_left)} for the run, {steps_left} steps; preparing and reading volumes, "
             "validation and exchange between processes come on top"),
    ]  # fmt: skip


def seconds_per_step(trials: Sequence[Trial], crops: int) -> float:
    """Estimate the seconds of a step with the given number of crops.

    They are measured, or else extrapolated from the last two trials. The upper bound is proportional to the last trial,
    because no step has a negative fixed cost.
    """
    known = {t.crops: t.seconds for t in trials}
    if crops in known:
        return known[crops]
    proportional = trials[-1].seconds * crops / trials[-1].crops
    line = extrapolate([(t.crops, t.seconds) for t in trials], crops)
    return min(max(line, trials[-1].seconds), proportional) if len(trials) > 1 else proportional


def storage_lines(storage: StoreSize) -> list[tuple[str, str]]:
    """Format the lines on the store: volumes prepared and missing, and a warning if they do not fit the disk."""
    total = storage.prepared + storage.missing
    done = f"{storage.prepared} of {total} volumes prepared in {storage.folder}, {format_bytes(storage.prepared_bytes)}"
    lines = [("store", done)]
    if storage.missing:
        basis = "assumed" if storage.is_assumed else "as in the volumes already prepared"
        lines.append(
            (
                "",
                f"the other {storage.missing} take about {format_bytes(storage.missing_bytes)}, by their headers and "
                f"{storage.bytes_per_voxel:.2g} bytes per voxel ({basis}); "
                f"{format_bytes(storage.free)} free on that disk",
            )
        )
    if storage.unreadable:
        lines.append(("WARNING", f"{storage.unreadable} of the sampled files have no readable NIfTI header"))
    if storage.exceeds_disk:
        lines.append(("WARNING", "the prepared volumes do not fit the disk; set another folder with --store_dir"))
    return lines


def describe_trials(trials: Sequence[Trial]) -> str:
    """Format the trials behind an estimate, e.g. "steps of 2 and 4 crops"."""
    return f"steps of {' and '.join(str(t.crops) for t in trials[-2:])} crops"
