"""Measure on a GPU, the most important rows first, within a budget of minutes. `make gpu` calls it.

    python benchmarks/gpu.py --minutes 9                        # rows go to ckpt/gpu/gpu.json and gpu.md at once
    python benchmarks/gpu.py --minutes 9 --published CHECKOUT   # the published network beside
    python benchmarks/gpu.py --device cpu --minutes 2           # the same rows at toy size: shows that they run
    python benchmarks/gpu.py --out RESULTS --work /tmp/gpu      # RESULTS holds three small files and nothing else

The same command continues: what is in the JSON is not measured again. Correctness comes first, then the step by
precision and batch, encoders packed and masked, the step by decoder and by variant, a profile, whole runs and
prediction. What is worth less than its time comes last.
"""

import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gpu_runs
import gpu_steps
import planned
import profile_step
import psutil
import torch
from budget import Record, Row, measure
from depthwise import depthwise
from filelock import FileLock, Timeout
from gpu_steps import Size, Variant
from sides import OWN, Case, How, Side
from tap import Tap

ROOT = Path(__file__).parents[1]
CEILINGS, TESTS, STEPS = "Ceilings of the card", "Tests of correctness", "A step by precision and batch"
ENCODERS, DECODERS = "An encoder packed and masked, bf16", "A step by decoder, bf16"
VARIANTS, DEPTHWISE = "A step by variant", "Depthwise convolution, bf16, forward and backward"
LAYERS, KERNELS, TRAINING, PREDICTION = "A step by layer", "A step by kernel", "Training", "Prediction"
BASE = "the default settings"
TESTS_LIMIT, COMPILE_LIMIT, PREDICTION_LIMIT = 150.0, 90.0, 150.0
"""Seconds that a row may take."""


Part = Literal[
    "ceilings",
    "tests",
    "steps",
    "encoders",
    "decoders",
    "variants",
    "depthwise",
    "profile",
    "training",
    "prediction",
]


class Arguments(Tap):
    """Measure on a GPU, within a budget of time."""

    minutes: float = 9  # Budget; rows that do not fit in are the next call's
    out: str = "ckpt/gpu"  # Folder for gpu.json, gpu.md and tests.log
    work: str = ""  # Folder for phantoms and runs; by default OUT/work
    published: str = ""  # A checkout of the published code, to measure beside
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: the same rows at toy size
    only: tuple[Part, ...] = ()  # Parts to measure; all by default


@dataclass(frozen=True)
class Scale:
    """How large everything is; the defaults are for a GPU.

    ceilings: options of `gpu_steps.ceilings`. batches: crops of a step. base: crops of the step that variants are
    compared in. encoders: computed packed, masked and dense. decoders: width, and fraction of the hidden patches that
    is reconstructed; the first is what the others are compared with. stages: of the encoder, samples or patches of a
    crop, channels, voxels per axis. spacing: mm of the phantoms. steps: of a training run. loading: seconds. window:
    voxels of the predicted volume.
    """

    size: Size = field(default_factory=Size)
    ceilings: Mapping[str, int] = field(default_factory=dict)
    batches: tuple[int, ...] = (8, 16, 32, 2)
    base: int = 16
    encoders: Mapping[str, Case] = field(
        default_factory=lambda: {
            "resnet50, 224^2": Case("timm/resnet50", 224, 0.6, 256, axes=2),
            "ResidualEncoderUNet, 96^3": Case("planned:resenc_m", 96, 0.75, 8),
            "HySparK-B, 96^3": Case(OWN, 96, 0.75, 16),
        }
    )
    decoders: tuple[tuple[int, float], ...] = (
        *((width, 1.0) for width in (768, 384, 192)),
        *((768, 0.5), (768, 0.25), (192, 0.5), (192, 0.25)),
    )
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
    Size("cpu", 32, TOY_NETWORK, 1),
    {"edge": 64, "megabytes": 1},
    (2, 1),
    1,
    {
        "resnet10t, 64^2": Case("timm/resnet10t", 64, 0.5, 1, axes=2),
        "ResidualEncoderUNet, 8^3": Case("planned:resenc_toy", 8, 0.75, 1),
        "HySparK, 32^3": Case(OWN, 32, 0.75, 1, options=(("vit_depth", 1), ("widths", (6, 6, 12, 12, 24)))),
    },
    ((16, 1.0), (32, 1.0), (16, 0.5)),
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
    """Yield the rows in the order of their worth."""
    out, work = Path(arguments.out), Path(arguments.work or f"{arguments.out}/work")
    parts = [
        ("ceilings", partial(ceiling_rows, scale)),
        ("tests", partial(test_rows, out, record)),
        ("steps", partial(step_rows, scale, record, arguments.published)),
        ("encoders", partial(encoder_rows, scale, record)),
        ("decoders", partial(decoder_rows, scale, record)),
        ("variants", partial(variant_rows, scale, record)),
        ("depthwise", partial(depthwise_rows, scale, record)),
        ("profile", partial(profile_rows, scale, record)),
        ("training", partial(training_rows, scale, work)),
        ("prediction", partial(prediction_rows, scale)),
        ("steps", partial(more_step_rows, scale, record)),
    ]
    for name, rows in parts:
        if not arguments.only or name in arguments.only:
            yield from rows()


def ceiling_rows(scale: Scale) -> Iterator[Row]:
    """Yield what limits everything else."""
    yield Row(CEILINGS, "measured", gpu_steps.ceilings, {"device": scale.size.device, **scale.ceilings}, alone=True)


def test_rows(out: Path, record: Record) -> Iterator[Row]:
    """Yield the tests that need a GPU, as one row that becomes several."""
    paths = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text())
    passed = [name for name, values in record.rows.get(TESTS, {}).items() if values["outcome"] == "passed"]
    options = {"paths": [str(p.relative_to(ROOT)) for p in paths], "log": str(out / "tests.log"), "passed": passed}
    yield Row(TESTS, "pytest -m gpu", gpu_runs.run_tests, options, TESTS_LIMIT)


def step_rows(scale: Scale, record: Record, published: str) -> Iterator[Row]:
    """Yield the step in bf16 with its largest batch, masked, in TF32 and fp32, and the published network's."""
    yield from batch_rows(scale, record, "packed", "bf16")
    yield largest_row(scale, record, "packed", "bf16")
    for compute, precision in (("masked", "bf16"), ("packed", "TF32"), ("packed", "fp32")):
        yield from batch_rows(scale, record, compute, precision)
    for precision in ("bf16", "fp32") if published else ():
        for batch in scale.batches:
            options = {"size": scale.size, "checkout": published, "batch": batch, "precision": precision}
            yield Row(STEPS, f"published {precision}, batch {batch}", gpu_steps.published_step, options, alone=True)


def more_step_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Yield the masked step in the other precisions, and the largest batches."""
    for precision in ("TF32", "fp32"):
        yield from batch_rows(scale, record, "masked", precision)
    for compute, precision in (("masked", "bf16"), ("packed", "TF32"), ("packed", "fp32")):
        yield largest_row(scale, record, compute, precision)


def batch_rows(scale: Scale, record: Record, compute: str, precision: str) -> Iterator[Row]:
    """Yield a kind of step at each batch."""
    for batch in scale.batches:
        options = {**step_options(scale, record, compute, precision), "batch": batch}
        yield Row(STEPS, f"{compute} {precision}, batch {batch}", gpu_steps.step, options)


def largest_row(scale: Scale, record: Record, compute: str, precision: str) -> Row:
    """Make the row of the largest batch that fits, by the peaks of smaller ones."""
    peaks = [(b, record.get(STEPS, f"{compute} {precision}, batch {b}", "peak GB")) for b in scale.batches]
    known = [(batch, peak) for batch, peak in peaks if peak is not None]
    options = {**step_options(scale, record, compute, precision), "measured": known}
    return Row(STEPS, f"{compute} {precision}, largest batch", gpu_steps.largest, options)


def step_options(scale: Scale, record: Record, compute: str, precision: str) -> dict[str, Any]:
    """Collect what rows of one kind of step share."""
    ceiling = record.get(CEILINGS, "measured", f"{precision} TFLOP/s")
    return {"size": scale.size, "compute": compute, "precision": precision, "ceiling": ceiling}


def encoder_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Yield each encoder packed, under `hidden` and dense; one whose package is missing has none."""
    how = How(scale.size.device, torch.get_num_threads(), "bf16")
    sides: tuple[Side, ...] = ("packed", "hidden", "dense")
    for side in sides:
        for name, case in scale.encoders.items():
            if not planned.missing(case.network):
                base = record.get(ENCODERS, f"{name}, packed", "ms") if side != "packed" else None
                options = {"case": case, "side": side, "how": how, "packed_ms": base}
                yield Row(ENCODERS, f"{name}, {side}", gpu_steps.encoder, options)


def decoder_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Yield the step by width of the decoder and fraction of the hidden patches that is reconstructed."""
    names = {decoder: f"width {decoder[0]}, fraction {decoder[1]:g}" for decoder in scale.decoders}
    for number, ((width, fraction), name) in enumerate(names.items()):
        chosen = {"decoder_width": width} | ({"reconstruct_fraction": fraction} if fraction < 1 else {})
        size = replace(scale.size, network=tuple((scale.size.options | chosen).items()))
        base = record.get(DECODERS, names[scale.decoders[0]], "ms") if number else None
        yield Row(DECODERS, name, gpu_steps.step, {"size": size, "batch": scale.base, "base_ms": base})


def variant_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Yield each choice against the default step, in bf16, then all that pay combined."""
    how = {"size": scale.size, "batch": scale.base}
    yield Row(VARIANTS, BASE, gpu_steps.step, how)
    base = record.get(VARIANTS, BASE, "ms")
    singles = SINGLE | (GRAPH if scale.size.device == "cuda" else {})
    for name, variant in singles.items():
        yield variant_row(name, how, variant, base)
    best = best_variant(record)
    if len(chosen := changes(best)) > 1:
        yield variant_row(f"combined: {', '.join(chosen)}", how, best, base)


def variant_row(name: str, how: Mapping[str, Any], variant: Variant, base: float | None) -> Row:
    """Make the row of a variant; alone where cuDNN searches, since torch keeps an algorithm however it was chosen."""
    options = {**how, "variant": variant, "base_ms": base}
    return Row(VARIANTS, name, gpu_steps.step, options, COMPILE_LIMIT, variant.cudnn_benchmark)


def best_variant(record: Record) -> Variant:
    """Combine the choices that were faster than the default step."""
    base = record.get(VARIANTS, BASE, "ms")
    measured = {v: record.get(VARIANTS, name, "ms") for name, v in SINGLE.items()}
    return gpu_steps.winners(base, {v: ms for v, ms in measured.items() if ms is not None}) if base else Variant()


def changes(variant: Variant) -> list[str]:
    """List what differs from the default, as "name=value"."""
    return [f"{name}={value}" for name, value in asdict(variant).items() if value != getattr(Variant(), name)]


def depthwise_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Yield the convolution that only bandwidth should limit: on visible patches, and dense."""
    bandwidth = record.get(CEILINGS, "measured", "GB/s")
    for number, channels, edge in scale.stages:
        n = number * scale.base
        what = f"{n} {'patches' if number > 1 else 'samples'} of {edge}^3, {channels} channels"
        sizes = {"n": n, "channels": channels, "edge": edge}
        yield Row(DEPTHWISE, what, depthwise, {"device": scale.size.device, **sizes, "bandwidth": bandwidth})


def profile_rows(scale: Scale, record: Record) -> Iterator[Row]:
    """Yield where the time goes: by layer in the default step, by kernel in that and in the fastest one."""
    how = {"size": scale.size, "batch": scale.base}
    ceilings = tuple(record.get(CEILINGS, "measured", column) for column in ("bf16 TFLOP/s", "GB/s"))
    yield Row(LAYERS, BASE, profile_step.by_layer, {**how, "variant": Variant(), "ceilings": ceilings})
    best = best_variant(record)
    name = ", ".join(changes(best)) or BASE
    yield Row(f"{KERNELS} ({name})", "profiled", profile_step.by_kernel, {**how, "variant": best}, alone=True)


def training_rows(scale: Scale, work: Path) -> Iterator[Row]:
    """Yield train.py on phantoms, as a user starts it, and its loader alone."""
    folder = str(work / "phantoms")
    where = {"folder": folder, "size": scale.size, "spacing": scale.spacing}
    made = {"folder": folder, "number": scale.volumes, "spacing": scale.spacing}
    yield Row(TRAINING, "phantoms made", gpu_runs.make_phantoms, made)
    for torchrun, workers in ((False, scale.workers[-1]), (True, scale.workers[-1]), (False, scale.workers[0])):
        name = f"{'torchrun, one process' if torchrun else 'train.py'}, {workers} workers"
        run = str(work / f"run_{'ddp_' if torchrun else ''}{workers}")
        how = {"run": run, "workers": workers, "steps": scale.steps, "precision": "bf16", "torchrun": torchrun}
        yield Row(TRAINING, name, gpu_runs.training, {**where, **how})
    for workers in scale.workers:
        how = {"workers": workers, "seconds": scale.loading}
        yield Row(TRAINING, f"loader alone, {workers} workers", gpu_runs.loader, {**where, **how})


def prediction_rows(scale: Scale) -> Iterator[Row]:
    """Yield the prediction of one large volume, each in a process of its own, whose memory is its alone."""
    what = f"{' x '.join(map(str, scale.window))} voxels, {scale.classes} classes"
    for precision in ("bf16", "fp32"):
        options = {"size": scale.size, "shape": scale.window, "classes": scale.classes, "precision": precision}
        yield Row(PREDICTION, f"{what}, {precision}", gpu_runs.sliding_window, options, PREDICTION_LIMIT, True)


def main(words: list[str] | None = None, begun: float | None = None) -> int:
    """Measure what fits in the time; returns 1 where a row failed, 2 where nothing can be measured.

    Args:
        words: of the command line.
        begun: time.time() from which the minutes count; now by default.
    """
    begun = time.time() if begun is None else begun
    arguments = Arguments(prog="benchmarks/gpu.py", description=__doc__).parse_args(words)
    out = Path(arguments.out).absolute()
    try:
        check(arguments)
        out.mkdir(parents=True, exist_ok=True)
        arguments.out, arguments.published = str(out), arguments.published and str(Path(arguments.published).absolute())
        arguments.work = arguments.work and str(Path(arguments.work).absolute())
        with FileLock(out / ".lock", timeout=0):
            return measure_all(arguments, begun)
    except Timeout:
        print(f"--out {out}: another call is measuring into it; wait for it, or name another folder", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
    return 2


def check(arguments: Arguments) -> None:
    """Raise ValueError for what cannot be measured."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; --device cpu tries the same rows at toy size")
    if not 0 < arguments.minutes < math.inf:
        raise ValueError(f"--minutes: expected a number above 0, got {arguments.minutes}")
    if arguments.published and not (Path(arguments.published) / "hyspark.py").is_file():
        raise ValueError(f"--published {arguments.published}: expected a checkout with hyspark.py, got none")


def measure_all(arguments: Arguments, begun: float) -> int:
    """Measure into a folder that is this call's alone, and print what is in it."""
    record = Record(Path(arguments.out), "gpu")
    record.begin(gpu_steps.environment(arguments.device), gpu_steps.SAME)
    scale = Scale() if arguments.device == "cuda" else TOY
    for name, case in scale.encoders.items():
        if lacking := planned.missing(case.network):
            print(f"{ENCODERS}: {name}: skipped; {lacking}")
    is_whole = measure(partial(plan, arguments, scale), record, begun + 60 * arguments.minutes - time.time())
    print(f"\n{record.as_markdown()}\n\nwritten to {record.markdown}")
    if record.failed:
        print(f"{len(record.failed)} rows failed; the same command tries them again")
    if not is_whole:
        print(f"the {arguments.minutes:g} minutes are over; the same command measures the rest")
    return int(bool(record.failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the worker is ended on the way out
    sys.exit(main(begun=psutil.Process().create_time()))  # the imports count
