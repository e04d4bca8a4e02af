"""What only a GPU can tell, in the order of its worth, within a budget of minutes. `make gpu` calls it.

    python benchmarks/gpu.py --minutes 9                        # rows go to ckpt/gpu/gpu.json and gpu.md at once
    python benchmarks/gpu.py --minutes 9 --published CHECKOUT   # the published network beside
    python benchmarks/gpu.py --device cpu --minutes 2           # the same rows at toy size: shows that they run

The same command continues: what is in the JSON is not measured again. Correctness comes first, then the step by
precision and batch, what the settings of speed are worth, where the time goes, whole runs, prediction.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import gpu_runs
import gpu_steps
import profile_step
import torch
from budget import Record, Row, measure
from depthwise import depthwise
from gpu_steps import Size, Variant
from tap import Tap

ROOT = Path(__file__).parents[1]
CEILINGS, TESTS, STEPS = "Ceilings of the card", "Tests of correctness", "A step by precision and batch"
VARIANTS, DEPTHWISE = "A step by variant", "Depthwise convolution, bf16, forward and backward"
LAYERS, KERNELS, TRAINING, PREDICTION = "A step by layer", "A step by kernel", "Training", "Prediction"
BASE, TOGETHER = "as a run takes it", "all that are faster"
PRECISIONS = ("bf16", "TF32", "fp32")
TESTS_LIMIT = 400.0
"""Seconds."""


class Arguments(Tap):
    """Measure on a GPU, within a budget of time."""

    minutes: float = 9  # Budget; rows that do not fit in are the next call's
    out: str = "ckpt/gpu"  # Folder for gpu.json, gpu.md, tests.log and the runs
    published: str = ""  # A checkout of the published code, to measure beside
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: the same rows at toy size
    only: list[Literal["ceilings", "tests", "steps", "variants", "depthwise", "profile", "training", "prediction"]] = []  # noqa: RUF012
    # Parts to measure; all by default


@dataclass(frozen=True)
class Scale:
    """How large everything is; the defaults are for a GPU.

    ceilings: options of `gpu_steps.ceilings`. batches: crops of a step. base: crops of the step that variants are
    compared in. stages: of the encoder, samples or patches of a crop, channels, voxels per axis. spacing: mm of the
    phantoms. steps: of a training run. loading: seconds. window: voxels of the predicted volume.
    """

    size: Size = field(default_factory=Size)
    ceilings: Mapping[str, int] = field(default_factory=dict)
    batches: tuple[int, ...] = (8, 16, 32, 2)
    base: int = 16
    stages: tuple[tuple[int, int, int], ...] = (
        *((54, width, edge) for width, edge in ((32, 16), (64, 8), (128, 4), (256, 2))),
        *((1, width, edge) for width, edge in ((32, 96), (64, 48), (384, 6))),
    )
    spacing: tuple[float, ...] = (1.5, 1.5, 1.5)
    volumes: int = 8
    workers: tuple[int, ...] = (8, 16)
    steps: int = 40
    loading: float = 8.0
    window: tuple[int, ...] = (512, 512, 300)
    classes: int = 14


TOY_NETWORK = (("decoder_width", 16), ("depths", (1,) * 5), ("vit_depth", 1), ("widths", (6, 6, 12, 12, 24)))
TOY = Scale(
    Size("cpu", 32, TOY_NETWORK, 2),
    {"edge": 64, "megabytes": 1},
    (2, 1),
    1,
    ((1, 4, 8), (2, 4, 4)),
    (8.0, 8.0, 8.0),
    2,
    (0, 1),
    2,
    0.2,
    (32, 32, 40),
    3,
)
SINGLE = {
    "cudnn.benchmark": Variant(cudnn_benchmark=True),
    "compile: encoder": Variant(compile="encoder"),
    "compile: decoder": Variant(compile="decoder"),
    "compile: blocks": Variant(compile="blocks"),
    "nothing recomputed": Variant(recompute=False),
    "up-convolution in two steps": Variant(compose=False),
    "weights channels first": Variant(channels_last=False),
    "AdamW not fused": Variant(fused=False),
}
GRAPH = {"CUDA graph, fixed mask": Variant(graph=True)}


def plan(arguments: Arguments, scale: Scale, record: Record) -> Iterator[Row]:
    """The rows in the order of their worth."""
    parts = {
        "ceilings": partial(ceiling_rows, scale),
        "tests": partial(test_rows, Path(arguments.out), record),
        "steps": partial(step_rows, scale, record, arguments.published),
        "variants": partial(variant_rows, scale, record),
        "depthwise": partial(depthwise_rows, scale, record),
        "profile": partial(profile_rows, scale, record),
        "training": partial(training_rows, scale, Path(arguments.out)),
        "prediction": partial(prediction_rows, scale),
    }
    for name, rows in parts.items():
        if not arguments.only or name in arguments.only:
            yield from rows()


def ceiling_rows(scale: Scale) -> Iterator[Row]:
    """What limits everything else."""
    yield Row(CEILINGS, "measured", gpu_steps.ceilings, {"device": scale.size.device, **scale.ceilings}, alone=True)


def test_rows(out: Path, record: Record) -> Iterator[Row]:
    """The tests that need a GPU."""
    paths = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text())
    passed = [name for name, values in record.rows.get(TESTS, {}).items() if values["outcome"] == "passed"]
    options = {"paths": [str(p.relative_to(ROOT)) for p in paths], "log": str(out / "tests.log"), "passed": passed}
    yield Row(TESTS, "pytest -m gpu", gpu_runs.run_tests, options, limit=TESTS_LIMIT)


def step_rows(scale: Scale, record: Record, published: str) -> Iterator[Row]:
    """bf16 first, since it is what a GPU is used in; of each precision the largest batch last."""
    for precision in PRECISIONS:
        for compute in ("packed", "masked"):
            ceiling = record.get(CEILINGS, "measured", f"{precision} TFLOP/s")
            how = {"size": scale.size, "compute": compute, "precision": precision, "ceiling": ceiling}
            name = f"{compute} {precision}"
            for batch in scale.batches:
                yield Row(STEPS, f"{name}, batch {batch}", gpu_steps.step, {**how, "batch": batch})
            peaks = [(b, record.get(STEPS, f"{name}, batch {b}", "peak GB")) for b in scale.batches]
            known = [(batch, peak) for batch, peak in peaks if peak is not None]
            if len(known) > 1:
                yield Row(STEPS, f"{name}, largest batch", gpu_steps.largest, {**how, "measured": known})
        if published and precision != "TF32":
            for batch in scale.batches:
                options = {"size": scale.size, "checkout": published, "batch": batch, "precision": precision}
                yield Row(STEPS, f"published {precision}, batch {batch}", gpu_steps.published_step, options, alone=True)


def variant_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Each choice against a step as a training run takes it, in bf16, then all that pay together."""
    how = {"size": scale.size, "batch": scale.base}
    yield Row(VARIANTS, BASE, gpu_steps.step, how)
    base = record.get(VARIANTS, BASE, "ms")
    singles = SINGLE | (GRAPH if scale.size.device == "cuda" else {})
    for name, variant in (*singles.items(), (TOGETHER, None)):
        variant = variant or best_variant(record)
        alone = variant.cudnn_benchmark  # torch remembers the algorithm of a shape, whichever way it was chosen
        yield Row(VARIANTS, name, gpu_steps.step, {**how, "variant": variant, "base_ms": base}, 120.0, alone)


def best_variant(record: Record) -> Variant:
    """The choices that were faster than the base, together."""
    base = record.get(VARIANTS, BASE, "ms")
    measured = {v: record.get(VARIANTS, name, "ms") for name, v in SINGLE.items()}
    return gpu_steps.winners(base, {v: ms for v, ms in measured.items() if ms is not None}) if base else Variant()


def depthwise_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """The convolution that only bandwidth should limit: on visible patches, and dense."""
    bandwidth = record.get(CEILINGS, "measured", "GB/s")
    for number, channels, edge in scale.stages:
        n = number * scale.base
        what = f"{n} {'patches' if number > 1 else 'samples'} of {edge}^3, {channels} channels"
        sizes = {"n": n, "channels": channels, "edge": edge}
        yield Row(DEPTHWISE, what, depthwise, {"device": scale.size.device, **sizes, "bandwidth": bandwidth})


def profile_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Where the time goes: by layer as a run takes the step, by kernel in the fastest way."""
    how = {"size": scale.size, "batch": scale.base}
    ceilings = tuple(record.get(CEILINGS, "measured", column) for column in ("bf16 TFLOP/s", "GB/s"))
    yield Row(LAYERS, BASE, profile_step.by_layer, {**how, "variant": Variant(), "ceilings": ceilings})
    yield Row(KERNELS, TOGETHER, profile_step.by_kernel, {**how, "variant": best_variant(record)}, alone=True)


def training_rows(scale: Scale, out: Path) -> Iterator[Row]:
    """train.py on phantoms, as a user starts it, and its loader alone."""
    folder = str(out / "phantoms")
    where = {"folder": folder, "size": scale.size, "spacing": scale.spacing}
    made = {"folder": folder, "number": scale.volumes, "spacing": scale.spacing}
    yield Row(TRAINING, "phantoms made", gpu_runs.make_phantoms, made)
    for torchrun, workers in ((False, scale.workers[-1]), (True, scale.workers[-1]), (False, scale.workers[0])):
        name = f"{'torchrun, one process' if torchrun else 'train.py'}, {workers} workers"
        run = str(out / f"run_{'ddp_' if torchrun else ''}{workers}")
        how = {"run": run, "workers": workers, "steps": scale.steps, "precision": "bf16", "torchrun": torchrun}
        yield Row(TRAINING, name, gpu_runs.training, {**where, **how})
    for workers in scale.workers:
        how = {"workers": workers, "seconds": scale.loading}
        yield Row(TRAINING, f"loader alone, {workers} workers", gpu_runs.loader, {**where, **how})


def prediction_rows(scale: Scale) -> Iterator[Row]:
    """One large volume."""
    what = f"{' x '.join(map(str, scale.window))} voxels, {scale.classes} classes"
    for precision in ("bf16", "fp32"):
        options = {"size": scale.size, "shape": scale.window, "classes": scale.classes, "precision": precision}
        yield Row(PREDICTION, f"{what}, {precision}", gpu_runs.sliding_window, options, 180.0)


def main(words: list[str] | None = None) -> int:
    """Measure what fits in the time; 1 where a test failed, 2 where nothing can be measured."""
    arguments = Arguments(prog="benchmarks/gpu.py", description=__doc__).parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device; --device cpu tries the same at toy size", file=sys.stderr)
        return 2
    record = Record(Path(arguments.out), "gpu")
    try:
        record.begin(gpu_steps.environment(arguments.device))
    except ValueError as error:
        print(f"--out: {error}", file=sys.stderr)
        return 2
    scale = Scale() if arguments.device == "cuda" else TOY
    seconds = 60 * arguments.minutes - time.process_time()  # the imports count
    is_whole = measure(partial(plan, arguments, scale), record, seconds)
    print(f"\n{record.as_markdown()}\n\nwritten to {record.markdown}")
    if not is_whole:
        print(f"the {arguments.minutes:g} minutes are over; the same command measures the rest")
    outcomes = [values["outcome"] for values in record.rows.get(TESTS, {}).values()]
    return int("failed" in outcomes or "error" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
