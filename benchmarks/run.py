"""All measurements behind docs/results/performance.md: one table, and JSON. `make bench` calls it.

    python benchmarks/run.py                                   # about 15 minutes on two cores
    python benchmarks/run.py --published path/to/HySparK       # also measures a checkout of the published code beside
    python benchmarks/run.py --native_ct ct.nii.gz --prepared_ct ct.nii.gz      # instead of phantoms
    python benchmarks/run.py --only encoder steps --device cuda --num_samples 16

Times are medians; the two sides of a ratio are measured in the same run.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import networks
import training
from measure import machine
from tap import Tap

import data

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 multiplications and additions per second, by the makers' data sheets."""
Measured = Mapping[str, Any]


class Arguments(Tap):
    """Measure encoder, step and data path."""

    only: list[Literal["encoder", "stages", "flops", "steps", "crops", "preparing", "worker_memory", "data_wait"]] = []  # noqa: RUF012
    # Parts to measure; all by default
    published: str = ""  # A checkout of the published code, to measure beside
    native_ct: str = ""  # A CT as the scanner gives it, for the preparation; by default a phantom
    prepared_ct: str = ""  # A CT for the crops; by default a phantom
    device: Literal["cpu", "cuda"] = "cpu"  # For encoder and steps
    threads: int = 2  # For encoder and steps
    num_samples: int = 2  # Crops per step
    edge: int = 96  # Voxels per axis of a crop
    repeats: int = 3  # Timed calls, whose median is taken
    out: str = "ckpt/bench"  # Folder for bench.json, bench.md and time_by_fraction.png


@dataclass(frozen=True)
class Row:
    """A line of the table; value gives nothing where its measurements are missing."""

    what: str
    target: str
    part: str
    value: Callable[[Any], str]


def ratio(part: Measured, above: str, below: str, key: str) -> str:
    """How many times one kind of step is better than another in `key`."""
    return f"{part[above][key] / part[below][key]:.2f}x"


def rows(arguments: Arguments) -> list[Row]:
    """The table."""
    against = [("published", "published fp32"), ("masked fp32", "masked fp32")]
    table = [
        Row("encoder, packed against masked, fp32", ">= 3.0x", "encoder", lambda m: f"{m['ratio']:.2f}x"),
        Row("encoder time at .9 masked to .75", "<= .5", "encoder", lambda m: f"{m['fraction_ratio']:.2f}"),
    ]
    for name, other in against:
        if name == "published" and not arguments.published:
            continue
        for precision, target in (("fp32", ">= 2.5x"), ("bf16", ">= 6x")):
            table.append(
                Row(
                    f"step, packed {precision} against {name}",
                    target if name == "published" else "",
                    "steps",
                    lambda m, p=precision, o=other: ratio(m, o, f"packed {p}", "seconds"),
                )
            )
        for precision in ("fp32", "bf16"):
            table.append(
                Row(
                    f"peak memory, packed {precision} to {name}",
                    "<= .45x" if name == "published" else "",
                    "steps",
                    lambda m, p=precision, o=other: ratio(m, f"packed {p}", o, "peak_bytes"),
                )
            )
    return [
        *table,
        Row("crops per second, store against MONAI's cache", ">= 15x", "crops", lambda m: f"{m['speed_ratio']:.1f}x"),
        Row("bytes on disk, MONAI's cache to store", ">= 4x", "crops", lambda m: f"{m['bytes_ratio']:.1f}x"),
        Row("preparing a CT against MONAI", ">= 1.5x", "preparing", lambda m: f"{m['speed_ratio']:.2f}x"),
        Row("largest difference of the prepared CTs", "<= 1e-4", "preparing", lambda m: f"{m['difference']:.1e}"),
        Row(
            "resident memory of a loader worker, late to early",
            "about 1",
            "worker_memory",
            lambda m: f"{m['late_to_early_ratio']:.3f} ({m['late_bytes'] / 2**20:.0f} MiB)",
        ),
        Row("fraction of a step spent waiting for data", "<= .05", "data_wait", lambda m: f"{m['data_wait']:.4f}"),
    ]


def measure(arguments: Arguments) -> dict[str, Any]:
    """Everything measured, by part."""
    a = arguments
    setting = networks.Setting(a.device, a.threads, a.num_samples, a.edge, a.repeats)
    native, prepared = (Path(p) if p else None for p in (a.native_ct, a.prepared_ct))
    parts: dict[str, Callable[[], Any]] = {
        "encoder": partial(networks.encoder, setting),
        "stages": partial(networks.stages, setting),
        "flops": partial(networks.flops, setting),
        "steps": partial(networks.steps, setting, a.published),
        "crops": partial(data.crops, prepared),
        "preparing": partial(data.preparing, native),
        "worker_memory": partial(data.worker_memory, [prepared] if prepared else []),
        "data_wait": training.data_wait,
    }
    results: dict[str, Any] = {"machine": machine(), "arguments": a.as_dict()}
    for name, part in parts.items():
        if not a.only or name in a.only:
            print(f"measuring {name} ...", flush=True)
            results[name] = part()
    if "steps" in results and "flops" in results:
        results["speed"] = speeds(
            results["steps"], results["flops"], results["machine"]["gpu"] if a.device == "cuda" else ""
        )
    return results


def speeds(steps: Measured, flops: Measured, gpu: str) -> dict[str, float]:
    """FLOPs per second of the packed steps, and on a GPU that is known the bf16 one's fraction of its peak."""
    work = flops["forward"] + flops["backward"]
    rates = {name: work / step["seconds"] for name, step in steps.items() if name.startswith("packed")}
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
    return rates | ({"fraction of the peak in bf16": rates["packed bf16"] / peak} if peak else {})


def as_table(arguments: Arguments, results: Measured) -> str:
    """The table in Markdown."""
    lines = ["| what | target | measured |", "|---|---|---|"]
    for row in rows(arguments):
        if row.part in results:
            lines.append(f"| {row.what} | {row.target} | {row.value(results[row.part])} |")
    if "flops" in results:
        lines += ["", "| layer | GFLOP forward, a sample | fraction |", "|---|---|---|"]
        forward = results["flops"]["forward"]
        for name, count in results["flops"]["by_layer"].items():
            if count > 0.01 * forward:
                lines.append(f"| {name} | {count / 1e9:.1f} | {count / forward:.3f} |")
    details = [f"- {name}: {text(part)}" for name, part in results.items() if name not in ("arguments", "flops")]
    return "\n".join([*lines, "", *details])


def text(value: Any) -> str:
    """Measured numbers in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} ({text(v)})" if isinstance(v, Mapping) else f"{k} {text(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_time_by_fraction(encoder: Measured, path: Path) -> None:
    """Seconds of the encoder against the visible fraction, with the masked reference as a line."""
    figure, axes = plt.subplots(figsize=(6, 4))
    fractions, times = zip(*encoder["seconds"].items(), strict=True)
    axes.plot(fractions, times, "o-", label="packed: visible patches only")
    axes.axhline(
        encoder["masked_seconds"], color="gray", linestyle="--", label="masked: every voxel, at any mask ratio"
    )
    axes.set(
        xlabel="visible fraction of patches", ylabel="seconds, forward and backward", xlim=(0, 1.05), ylim=(0, None)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    arguments = Arguments(prog="benchmarks/run.py", description=__doc__).parse_args()
    results = measure(arguments)
    table = as_table(arguments, results)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(results, indent=2))
    (out / "bench.md").write_text(table + "\n")
    if "encoder" in results:
        draw_time_by_fraction(results["encoder"], out / "time_by_fraction.png")
    print(f"\n{table}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
