"""Commands of pages in this process: verbs as they are, but trainings take one step, and phantoms are coarse."""

import contextlib
import io
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hyspark.comparison.benefit
import hyspark.tasks.api
import hyspark.tasks.classification
import hyspark.tasks.pretrain
import hyspark.tasks.segmentation
from hyspark.cli import commands, main
from hyspark.cli.run_verb import run_verb
from hyspark.config.classification import ClassificationConfig
from hyspark.config.pretrain import MASKED, PretrainConfig
from hyspark.data.preprocessing import estimate
from hyspark.data.synthetic import phantom
from hyspark.planning import trial_steps
from hyspark.reports import run_page
from tests.docs.blocks import ROOT, SCRIPTS

ENCODER = {
    "encoder_widths": (6, 6, 12, 12, 24),
    "encoder_depths": (1, 1, 1, 1, 1),
    "expansions": (2, 2, 2, 2, 2),
    "vit_depth": 1,
    "num_heads": 12,
}
TRAINING = {"device": "cpu", "dataloader_workers": 0, "max_steps": 1, "epochs": 1, "batch_size": 2}
COARSE = ((6.0, 6.0, 6.0), (5.0, 5.0, 8.0))
"""Spacings of phantoms."""
VOLUMES = {"spacing": (8.0, 8.0, 8.0), "crops_per_volume": 1, "prepare_workers": 1, "compile": "none"}
NARROW = {
    "moco": {"head_width": 16, "queue_size": 8},
    "byol": {"head_width": 16},
    "swav": {"head_width": 16, "prototypes": 6},
}
"""Settings of contrastive methods."""


@dataclass(frozen=True)
class Reply:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def shorten(config: Any) -> Any:
    """Make a training one that takes about a second; released weights keep their network."""
    changes: dict[str, Any] = dict(TRAINING)
    released = config.weights != "none" and Path(config.weights).resolve().is_relative_to(ROOT / "ckpt")
    if isinstance(config, ClassificationConfig):
        return replace(config, **changes, crop_size=64, steps_per_epoch=1, freeze_epochs=0)
    changes |= VOLUMES | {"warmup_epochs": 0}
    if isinstance(config, PretrainConfig):
        edge = 32 if config.slices == "none" else 64
        changes |= {"crop_size": (edge,), "picture_every": 0, "probe_cases": 2}
        if config.method == "hyspark" and not released:
            changes |= ENCODER
        if config.method in MASKED and not released:
            changes |= {"decoder_width": 32}
        return replace(config, **changes, **NARROW.get(config.method, {}))
    changes |= {"crop_size": (32,), "val_every": 1, "steps_per_epoch": 1, "freeze_epochs": 0, "accumulate": 1}
    if not released:
        changes |= ENCODER
        changes |= {"decoder_width": 32, "decoder_min_width": 0} if config.decoder == "light" else {}
    return replace(config, **changes)


def run_jobs_here(jobs: Sequence[Any], num_at_once: int, after_each: Any) -> list[str]:
    """Run the jobs of `benefit` in this process."""
    failed = []
    for job in jobs:
        words = list(job.command[len(hyspark.comparison.benefit.COMMAND) :])
        try:
            main.main(words)
            after_each()
        except SystemExit:
            failed.append(job.name)
    return failed


def measure_coarsely(seen: Any, settings: Any) -> Any:
    """Measure the preparation of a case for `check` in this process, at a spacing that takes milliseconds."""
    return estimate.measure_preparation(seen.case, replace(settings, spacing=VOLUMES["spacing"]))


@contextlib.contextmanager
def one_step() -> Iterator[None]:
    """Shorten all trainings that begin inside, and start no processes."""
    compare = hyspark.comparison.benefit.run_comparison

    def fewer(base: Any, out: Path, weights: Any, numbers: Sequence[int], seeds: Sequence[int], **known: Any) -> Any:
        return compare(shorten(base), out, weights, tuple(numbers)[:1], tuple(seeds)[:1], **known)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in (
            ("run_pretraining", hyspark.tasks.pretrain),
            ("run_segmentation", hyspark.tasks.segmentation),
            ("run_classification", hyspark.tasks.classification),
        ):
            whole = getattr(module, name)
            for place in (module, hyspark.tasks.api):
                patch.setattr(place, name, lambda config, whole=whole: whole(shorten(config)))
        patch.setattr(phantom, "write_phantoms", partial(phantom.write_phantoms, spacings=COARSE))
        patch.setattr(hyspark.comparison.benefit, "run_comparison", fewer)
        patch.setattr(hyspark.comparison.benefit, "run_jobs", run_jobs_here)
        patch.setattr(estimate, "measure_in_process", measure_coarsely)
        patch.setattr(trial_steps, "run_in_subprocess", lambda *args: list(trial_steps.iterate_trials(*args)))
        patch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
        patch.setattr(run_page, "curves_figure", lambda curves, dark: None)
        yield


@contextlib.contextmanager
def in_folder(folder: Path, variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Work in a folder, with environment variables of its own; then put all back."""
    before = Path.cwd(), dict(os.environ), list(sys.argv), list(sys.path), set(sys.modules)
    handlers, logging.root.handlers = logging.root.handlers, []
    level = logging.getLogger("hyspark").level
    try:
        os.chdir(folder)
        if variables is not None:
            os.environ.clear()
            os.environ.update(variables)
            sys.path[:0] = [str(folder / path) for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
        yield
    finally:
        logging.root.handlers = handlers
        logging.getLogger("hyspark").setLevel(level)
        os.chdir(before[0])
        os.environ.clear()
        os.environ.update(before[1])
        sys.argv[:], sys.path[:] = before[2], before[3]
        for name in set(sys.modules) - before[4]:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def typed_here(words: Sequence[str], stdin: str = "") -> Reply:
    """Run a command in this process and folder."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one_step():
        try:
            call(list(words), stdin)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc(file=err)
            code = 1
    return Reply(code, out.getvalue(), err.getvalue())


def call(words: list[str], stdin: str) -> None:
    """Call what a command of hyspark or Python calls.

    Raises:
        ValueError: It is a command that has to be marked.
    """
    program, *rest = words
    if program != "hyspark" and rest[:2] == ["-m", "hyspark"]:
        program, rest = "hyspark", rest[2:]
        sys.path.insert(0, str(Path.cwd()))
    if program == "hyspark":
        main.main(rest)
    elif rest and rest[0] in SCRIPTS:
        sys.path.insert(0, str(Path.cwd()))
        run_verb(getattr(commands, SCRIPTS[rest[0]]), rest[1:])
    elif rest and rest[0] in ("-c", "-"):
        sys.argv[:] = [rest[0], *rest[2:]]
        sys.path.insert(0, "")
        exec(compile(stdin if rest[0] == "-" else rest[1], "<typed>", "exec"), {"__name__": "__main__"})
    elif rest and rest[0].endswith(".py"):
        sys.argv[:] = rest
        sys.path.insert(0, str(Path(rest[0]).resolve().parent))
        runpy.run_path(rest[0], run_name="__main__")
    else:
        raise ValueError(f"{' '.join(words)}: not run by this test; mark the block, <!-- needs: ... -->")
