"""The results of the GPU study as one small folder: at most 8 files, each below 16 MB, written as they come."""

import io
import json
import shutil
import statistics
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyspark.evaluation.protocol import SCORE_FILES
from hyspark.training.metrics_log import read_metrics
from hyspark.utils.atomic import write_json, write_whole

WEIGHTS, PRETRAINING, RUNS, STUDY = "weights.safetensors", "pretraining.jsonl", "runs.zip", "study.json"
PLAN = "pretrain_plan.json"
REPORT = ("benefit.md", "benefit.json", "benefit.png")
KEPT = ("config.yaml", "metrics.jsonl", *(f"scores/{name}" for name in SCORE_FILES))
"""Files of a finished run that a comparison reads."""
MOST_BYTES = 16 * 10**6


def folder_of(out: Path) -> Path:
    """Name the folder of results."""
    return out / "results"


def restore(out: Path) -> None:
    """Unpack finished runs into an output folder that has none yet, for a study that goes on at another place."""
    archive = folder_of(out) / RUNS
    if archive.is_file() and not (out / "benefit").exists():
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(out)


def calls_before(out: Path) -> list[dict[str, Any]]:
    """Read the account of earlier calls."""
    path = folder_of(out) / STUDY
    return list(json.loads(path.read_text())["calls"]) if path.is_file() else []


def write(out: Path, shared: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the folder anew from what is finished; returns what study.json holds.

    Args:
        out: the study's folder.
        shared: machine, data and settings, as study.json shows them.
        calls: the account of all calls, this one last.
    """
    folder = folder_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = out / "pretrain" / "metrics.jsonl"
    if metrics.is_file():
        shutil.copyfile(metrics, folder / PRETRAINING)
    for name in REPORT:
        if (out / "benefit" / name).is_file():
            write_whole(folder / name, (out / "benefit" / name).read_bytes())
    write_whole(folder / RUNS, packed_runs(out))
    content = {**shared, "pretraining": pretraining(out), "fine_tuning": fine_tuning(out), "calls": list(calls)}
    write_json(folder / STUDY, content)
    write_whole(folder / "study.md", page(content).encode())
    for file in folder.iterdir():
        if file.stat().st_size >= MOST_BYTES:
            print(f"WARNING: {file}: expected less than 16 MB, got {file.stat().st_size / 1e6:.1f}; it may not travel")
    return content


def packed_runs(out: Path) -> bytes:
    """Pack what another call needs to take finished runs and the plan of pre-training as they are."""
    benefit = out / "benefit"
    runs = [run for run in sorted(benefit.glob("runs/*")) if all((run / name).is_file() for name in KEPT)]
    files = [run / name for run in runs for name in KEPT]
    files += [file for file in (benefit / "starts.json", benefit / "data.json", out / PLAN) if file.is_file()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.relative_to(out).as_posix())
    return buffer.getvalue()


def pretraining(out: Path) -> dict[str, Any]:
    """Sum up how far pre-training is: its plan, steps, speed and validation losses."""
    plan, metrics, weights = out / PLAN, folder_of(out) / PRETRAINING, folder_of(out) / WEIGHTS
    found: dict[str, Any] = json.loads(plan.read_text()) if plan.is_file() else {}
    lines = read_metrics(metrics) if metrics.is_file() else []
    steps = [line for line in lines if "loss" in line]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    found["steps"] = steps[-1]["step"] + 1 if steps else 0
    if steps:
        found["crops_per_second"] = statistics.median(line["samples_per_second"] for line in steps)
        found["data_wait"] = statistics.median(line["data_wait"] for line in steps)
    if losses:
        found["val_loss_after_first_epoch"], found["val_loss"] = losses[0], losses[-1]
    found["weights_mb"] = weights.stat().st_size / 1e6 if weights.is_file() else None
    return found


def fine_tuning(out: Path) -> dict[str, Any]:
    """Sum up the comparison: finished runs, and a row for each number of labels and start."""
    path = out / "benefit" / "benefit.json"
    if not path.is_file():
        return {"finished": 0, "rows": []}
    numbers = json.loads(path.read_text())
    rows = []
    for cell in numbers["cells"]:
        row = {name: cell[name] for name in ("num_labelled", "start", "seeds")}
        row["dice"] = cell.get("dice", {}).get("mean")
        row["difference"] = cell.get("difference", {}).get("dice")
        rows.append(row)
    return {"finished": numbers["finished"], "rows": rows}


def page(content: Mapping[str, Any]) -> str:
    """Write the study in Markdown."""
    pre, fine, data = content["pretraining"], content["fine_tuning"], content["data"]
    facts = {
        "machine": f"{content['machine']['gpu']}; {content['machine']['cpu']}, {content['machine']['cores']} cores",
        "size": "toy: proves that it works, says nothing of the method" if content["is_toy"] else "full",
        "volumes": f"{data['num_volumes']} at {data['spacing_mm']} mm, a patch is {data['patch_mm']} mm",
        "pre-training": pretraining_text(pre),
        "weights": f"{pre['weights_mb']:.2f} MB" if pre["weights_mb"] else "not written yet",
        "fine-tuning": f"{fine['finished']} runs finished" + ("; details in benefit.md" if fine["rows"] else ""),
        "calls": "; ".join(f"{c['seconds']:.0f} of {60 * c['minutes']:.0f} s, {c['ended']}" for c in content["calls"]),
    }
    lines = ["# A study for one GPU in minutes", "", *(f"- {name}: {text}" for name, text in facts.items()), ""]
    if fine["rows"]:
        lines += ["| labels | start | seeds | Dice, % | difference, points |", "|---|---|---|---|---|"]
        lines += [row_text(row) for row in fine["rows"]]
    return "\n".join(lines) + "\n"


def pretraining_text(pre: Mapping[str, Any]) -> str:
    """Write how far pre-training is in one line."""
    if not pre["steps"]:
        return "not begun"
    text = f"{pre['steps']} of {pre['total_steps']} steps, {pre['crops_per_second']:.1f} crops a second"
    if "val_loss" not in pre:
        return text
    return f"{text}, validation loss {pre['val_loss_after_first_epoch']:.3f} after an epoch, {pre['val_loss']:.3f} now"


def row_text(row: Mapping[str, Any]) -> str:
    """Write a row of the table; nothing stands where there is no number yet."""
    dice = "" if row["dice"] is None else f"{100 * row['dice']:.1f}"
    found = row["difference"] or {}
    numbers = [found.get(name) for name in ("mean", "low", "high")]
    difference = "" if None in numbers else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in numbers))
    return f"| {row['num_labelled']} | {row['start']} | {len(row['seeds'])} | {dice} | {difference} |"
