"""Packed against masked, network by network: time, peak memory and numerical difference. `make bench-packed`.

    python benchmarks/packed.py                                          # about 40 minutes of one core
    python benchmarks/packed.py --networks resnet50 segresnet --threads 2 --only times
    python benchmarks/packed.py --networks timm/densenet121 --axes 2 --edge 224 --batch_size 8
    python benchmarks/packed.py --nnssl path/to/nnssl                    # S3D beside, where it knows all layers

Each step is forward and backward of the encoder. Sides of a ratio take turns in one process, each step with another
mask. Memory is the peak of a process with one side alone, libraries and weights included. Differences are of double
precision. The other cells are ratios of medians of wall-clock time, and in brackets of processor time.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import planned
import s3d
import sides
from measure import in_fresh_process, machine
from sides import OWN, Case, How
from tap import Tap

from hyspark.utils.atomic import write_json, write_whole

CASES = {
    "resnet50": Case("timm/resnet50", 224, 0.6, 8, axes=2, checked_edge=128),
    "convnext_tiny": Case("timm/convnext_tiny", 224, 0.6, 8, axes=2, checked_edge=128),
    "resnet18": Case("monai/resnet18", 96, 0.75, 2),
    "segresnet": Case("monai/segresnet", 96, 0.75, 2),
    "resenc_m": Case("planned:resenc_m", 96, 0.75, 1),
    "resenc_m_128": Case("planned:resenc_m", 128, 0.75, 1),
    "hyspark_b": Case(OWN, 96, 0.75, 2),
}
TARGETS = {
    "resnet50": ">= 2.2, <= .6",
    "convnext_tiny": ">= 2.1, <= .6",
    "resnet18": ">= 3, <= .45",
    "segresnet": ">= 3, <= .45",
    "resenc_m": ">= 4.5, <= .45",
    "resenc_m_128": ">= 5, <= .45",
}
"""Against `hidden`: how many times as fast at least, and the fraction of its memory at most."""
OTHERS: tuple[sides.Side, ...] = ("hidden", "dense", "S3D")
"""Sides that packed is compared with."""
HEADING = (
    *("network", "crops", "fraction hidden", "s packed", *(f"faster than {side}" for side in OTHERS)),
    *("GiB packed", *(f"memory to {side}" for side in OTHERS), "targets (hidden)", "values", "gradients"),
)


class Arguments(Tap):
    """Measure networks packed, masked and dense."""

    networks: tuple[str, ...] = tuple(CASES)  # Of the table, or names as after spark/ in train.py --model
    only: tuple[Literal["times", "memory", "differences"], ...] = ("times", "memory", "differences")
    # Parts to measure; all by default
    against: tuple[sides.Side, ...] = OTHERS  # Sides that packed is compared with; S3D needs --nnssl
    nnssl: str = ""  # A checkout of nnssl, to measure its S3D beside
    threads: int = 1  # Of each process
    repeats: int = 3  # Timed steps of each side, whose median is taken
    axes: int = 3  # Of a network by another name
    edge: int = 96  # Voxels per axis of a crop, for a network by another name
    mask_ratio: float = 0.75  # Fraction of hidden patches, for a network by another name
    batch_size: int = 1  # Crops of a step, for a network by another name
    out: str = "ckpt/bench"  # Folder for packed.json and packed.md


def measure(case: Case, how: How, arguments: Arguments) -> dict[str, Any]:
    """Measure one network in fresh processes; returns numbers by part and side."""
    parts, wanted = arguments.only, ("packed", *arguments.against)
    compared = [side for side in sides.possible_sides(case, how) if side in wanted]
    found: dict[str, Any] = {}
    if "times" in parts:
        found["times"] = in_fresh_process(partial(sides.times, case, compared, how, arguments.repeats))[0]
    if "memory" in parts:
        found["memory"] = {side: sides.peak(case, side, how) for side in compared}
    if "differences" in parts:
        against = [side for side in compared if side in ("hidden", "S3D")]
        found["differences"] = {s: in_fresh_process(partial(sides.differences, case, how, s))[0] for s in against}
    return found


def cells(case: Case, found: Mapping[str, Any]) -> dict[str, str]:
    """Write what was measured of a network, by column."""
    line = {"crops": f"{case.batch} of {case.edge}^{case.axes}", "fraction hidden": f"{case.ratio:g}"}
    middle = {side: {k: statistics.median(v) for k, v in s.items()} for side, s in found.get("times", {}).items()}
    peaks = {side: memory["peak"] for side, memory in found.get("memory", {}).items()}
    if middle:
        line["s packed"] = f"{middle['packed']['seconds']:.2f}"
    if peaks:
        line["GiB packed"] = f"{peaks['packed'] / 2**30:.2f}"
    for side in OTHERS:
        if side in middle:
            wall, processor = (middle[side][key] / middle["packed"][key] for key in ("seconds", "processor"))
            line[f"faster than {side}"] = f"{wall:.2f} ({processor:.2f})"
        if side in peaks:
            line[f"memory to {side}"] = f"{peaks['packed'] / peaks[side]:.2f}"
    errors = found.get("differences", {}).get("hidden", {})
    return line | {what: f"{error:.0e}" for what, error in errors.items()}


def as_table(lines: Sequence[Mapping[str, str]]) -> str:
    """Write the table in Markdown."""
    rows = [HEADING, ["---"] * len(HEADING), *([line.get(column, "") for column in HEADING] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cases_of(arguments: Arguments) -> dict[str, Case]:
    """Collect what is asked for, by name."""
    a = arguments
    other = Case("", a.edge, a.mask_ratio, a.batch_size, a.axes, a.edge)
    return {name: CASES.get(name, replace(other, network=name)) for name in a.networks}


def main(words: list[str] | None = None) -> int:
    """Measure, print and write; returns 2 where nothing can be measured."""
    arguments = Arguments(prog="benchmarks/packed.py", description=__doc__).parse_args(words)
    try:
        if arguments.nnssl:
            s3d.check(arguments.nnssl)
        measure_all(arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure_all(arguments: Arguments) -> None:
    """Measure each network; the files hold what was measured so far."""
    out, how = Path(arguments.out), How("cpu", arguments.threads, nnssl=arguments.nnssl)
    results: dict[str, Any] = {"machine": machine(), "arguments": arguments.as_dict(), "networks": {}}
    lines = []
    for name, case in cases_of(arguments).items():
        if lacking := planned.missing(case.network):
            print(f"{name}: skipped; {lacking}", flush=True)
            continue
        print(f"measuring {name} ...", flush=True)
        results["networks"][name] = measure(case, how, arguments)
        lines.append(
            {"network": name, "targets (hidden)": TARGETS.get(name, ""), **cells(case, results["networks"][name])}
        )
        table = as_table(lines)
        print(table if len(lines) == 1 else table.splitlines()[-1], flush=True)
        write_json(out / "packed.json", results)
        write_whole(out / "packed.md", f"{table}\n".encode())
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main())
