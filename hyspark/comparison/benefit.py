"""Whether pre-training pays: the same fine-tuning from several initial weights, numbers of labels and seeds.

Every run is an ordinary fine-tuning run in a process and a folder of its own, OUT/runs/WEIGHTS_LABELS_seedSEED.
Finished runs are kept and interrupted ones continue, so the same command makes or completes the report.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyspark.comparison.classification import ClassificationRuns
from hyspark.comparison.jobs import Job, last_step, run_jobs
from hyspark.comparison.kind import RunKind
from hyspark.comparison.nnunet import NnunetRuns
from hyspark.comparison.records import check_data_digest, check_weights
from hyspark.comparison.report import write_benefit
from hyspark.comparison.segmentation import SegmentationRuns
from hyspark.comparison.table import RunKey, compare_runs, read_run
from hyspark.config.classification import ClassificationConfig
from hyspark.config.nnunet_training import NnunetTrainingConfig
from hyspark.config.recipes import as_plain, differences, read_yaml, write_yaml
from hyspark.config.segmentation import SegmentationConfig
from hyspark.evaluation.protocol import has_all_scores
from hyspark.utils.atomic import write_json
from hyspark.utils.processes import available_cores
from hyspark.utils.settings import field_info

FineTuningConfig = SegmentationConfig | ClassificationConfig
RUN_KINDS: dict[type, RunKind] = {
    SegmentationConfig: SegmentationRuns(),
    NnunetTrainingConfig: NnunetRuns(),
    ClassificationConfig: ClassificationRuns(),
}
"""Kinds of runs, by the class of their settings."""
SET_BY_COMPARISON = {
    "out": "out",
    "weights": "initial_weights",
    "seed": "seeds",
    "num_labelled": "num_labelled",
    "dry_run": "plan",
}
"""Settings of a run that the comparison sets, and its flags for them."""
COMMAND = (sys.executable, "-c", "from hyspark.cli.main import main; main()")


@dataclass(frozen=True)
class PlannedRun:
    """A run of the comparison."""

    key: RunKey
    config: Any

    @property
    def kind(self) -> RunKind:
        """Segmentation or classification."""
        return RUN_KINDS[type(self.config)]

    @property
    def scores(self) -> Path:
        """Folder of its scores: of the test part if there is one, else of the validation part."""
        return self.kind.scores_folder(self.config)

    @property
    def is_finished(self) -> bool:
        """Whether its scores exist, of all cases, and were made with these settings."""
        return has_all_scores(self.scores) and self.has_settings and not self.changes()

    @property
    def has_settings(self) -> bool:
        """Whether its folder holds the settings of an earlier attempt."""
        return (self.config.run_folder / "config.yaml").is_file()

    def changes(self) -> list[str]:
        """List the settings of its folder that differ from the present ones."""
        config_class = type(self.config)
        old = config_class(**read_yaml(self.config.run_folder / "config.yaml", config_class))
        infos = field_info(config_class)
        movable = [name for name, info in infos.items() if info.may_change and info.affects_results]
        moved = [(name, getattr(old, name), getattr(self.config, name)) for name in movable]
        found = differences(as_plain(old), self.config) + [f"{n}: was {a}, is {b}" for n, a, b in moved if a != b]
        return list(dict.fromkeys(found))


def run_comparison(
    base: FineTuningConfig,
    out: Path,
    initial_weights: Mapping[str, str],
    num_labelled: Sequence[int],
    seeds: Sequence[int],
    *,
    num_at_once: int = 1,
    plan_only: bool = False,
    after_report: Callable[[], None] = lambda: None,
) -> list[str]:
    """Run what is missing of the comparison, and write the report.

    Args:
        base: Settings of all runs.
        out: Folder of the runs and the report.
        initial_weights: By name, a file of weights, or "none"; the first is the baseline.
        num_labelled: Numbers of labelled training samples.
        seeds: Seeds.
        num_at_once: Number of runs side by side.
        plan_only: Whether the runs and their progress are only printed.
        after_report: Called whenever the report was written.

    Returns:
        The names of failed runs.

    Raises:
        FileNotFoundError: Weights or data are missing; raised before the first run.
        ValueError: Settings, weights and data do not fit each other, or runs in `out` were made with other ones; raised
            before the first run.
    """
    kind = RUN_KINDS[type(base)]
    base = kind.settings(base)
    runs = plan_runs(base, out, initial_weights, num_labelled, seeds, num_at_once)
    check_folders(runs)
    digests = check_weights(out, initial_weights)
    if plan_only:
        print("\n".join(f"{run.key.folder:40s} {progress_text(run)}" for run in runs))
        return []
    todo = [run for run in runs if not run.is_finished]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished; output in {out / 'runs'}/*/log.txt")
    if todo:
        data = check_data_digest(out, kind.data_digest(base))
        kind.check_data([run.config for run in todo], initial_weights)
        write_json(out / "data.json", {"digest": data})
    write_json(out / "starts.json", digests)

    def report() -> None:
        report_finished(kind, runs, out, initial_weights, digests)
        after_report()

    if len(todo) < len(runs):
        report()  # first, since finished runs may not fit each other
    failed = run_jobs([job_of(run) for run in todo], num_at_once, report)
    report()
    print(f"report {out / 'benefit.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return failed


def read_initial_weights(words: Sequence[str]) -> dict[str, str]:
    """Read NAME=FILE words as a dictionary; NAME=none is a random initialisation.

    Raises:
        ValueError: A word is no such pair, or a name comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                "--initial_weights: expected NAME=FILE, or NAME=none for a random initialisation, with a name of "
                f"letters, digits, '.', '_' and '-'; got {word!r}"
            )
        if name in found:
            raise ValueError(f"--initial_weights: expected each name once, got {name!r} twice")
        found[name] = path
    return found


def labelled_numbers(base: FineTuningConfig, num_labelled: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Return the numbers of labelled training samples, as given or as fractions of all.

    Raises:
        ValueError: Both are given, or none; a fraction is not within 0 to 1; or two fractions give one number.
    """
    if bool(num_labelled) == bool(fractions):
        raise ValueError("name the numbers of labelled cases by one of --num_labelled and --label_fractions")
    if min(num_labelled, default=1) < 1:
        raise ValueError(f"--num_labelled: expected numbers above 0, got {list(num_labelled)}")
    if not fractions:
        return list(num_labelled)
    if not 0 < min(fractions) <= max(fractions) <= 1:
        raise ValueError(f"--label_fractions: expected fractions above 0 and at most 1, got {list(fractions)}")
    num = RUN_KINDS[type(base)].num_training(base)
    numbers = [max(1, round(fraction * num)) for fraction in fractions]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"--label_fractions: of {num} training cases, {list(fractions)} are {numbers}; expected different numbers"
        )
    return numbers


def plan_runs(
    base: FineTuningConfig,
    out: Path,
    initial_weights: Mapping[str, str],
    num_labelled: Sequence[int],
    seeds: Sequence[int],
    num_at_once: int,
) -> list[PlannedRun]:
    """List all runs in the order of early insight: seed by seed, few labels first, initial weights side by side.

    Raises:
        ValueError: Settings do not fit.
    """
    defaults = type(base)()
    for name, flag in SET_BY_COMPARISON.items():
        if getattr(base, name) != getattr(defaults, name):
            raise ValueError(
                f"{name}: set for each run of a comparison by --{flag}; drop it from the flags or the recipe"
            )
    if base.label_fraction != defaults.label_fraction:
        raise ValueError("label_fraction: a comparison takes --num_labelled or --label_fractions; drop label_fraction")
    lists = {"num_labelled": num_labelled, "seeds": seeds, "initial_weights": list(initial_weights)}
    for flag, values in lists.items():
        if not values or len(set(values)) != len(values):
            raise ValueError(f"--{flag}: expected one value or more, each once, got {list(values)}")
    if min(num_labelled) < 1 or num_at_once < 1:
        raise ValueError(f"--num_labelled, --jobs: expected 1 or more, got {list(num_labelled)} and {num_at_once}")
    if num_at_once > 1 and base.dataloader_workers < 0:
        base = replace(base, dataloader_workers=max(1, min(8, available_cores() // num_at_once)))
    keys = [RunKey(name, n, seed) for seed in seeds for n in sorted(num_labelled) for name in initial_weights]
    return [PlannedRun(key, run_settings(base, out, key, initial_weights[key.weights])) for key in keys]


def run_settings(base: FineTuningConfig, out: Path, key: RunKey, weights: str) -> FineTuningConfig:
    """Return the settings of one run."""
    folder = str(out / "runs" / key.folder)
    return replace(base, out=folder, weights=weights, seed=key.seed, num_labelled=key.num_labelled)


def check_folders(runs: Sequence[PlannedRun]) -> None:
    """Check that the folders of runs hold no weights or scores of other settings.

    Raises:
        ValueError: One does.
    """
    for run in runs:
        folder = run.config.run_folder
        is_used = run.kind.has_weights(run.config) or run.scores.is_dir()
        if is_used and run.has_settings and run.changes():
            raise ValueError(
                f"{folder} holds a run with other settings; name another --out, or use the same to continue:\n  "
                + "\n  ".join(run.changes())
            )


def job_of(run: PlannedRun) -> Job:
    """Write the settings of a run into its folder, and return the job that makes the run."""
    recipe = run.config.run_folder / "config.yaml"
    write_yaml(run.config, recipe)
    command = [*(run.kind.program or (*COMMAND, run.kind.verb)), "--config", str(recipe)]
    return Job(run.key.folder, command, run.config.run_folder, lambda: run.is_finished)


def progress_text(run: PlannedRun) -> str:
    """Write the progress of a run."""
    step = last_step(run.config.run_folder / "metrics.jsonl")
    return "finished" if run.is_finished else f"begun, at{step}" if step else "to do"


def report_finished(
    kind: RunKind,
    runs: Sequence[PlannedRun],
    out: Path,
    initial_weights: Mapping[str, str],
    digests: Mapping[str, str],
) -> None:
    """Write the report of the finished runs."""
    finished = {
        run.key: read_run(run.scores, run.config.run_folder / "metrics.jsonl", kind.samples_per_step(run.config))
        for run in runs
        if run.is_finished
    }
    config = runs[0].config
    infos, defaults = field_info(type(config)), as_plain(type(config)())
    matters = {name for name, info in infos.items() if info.affects_results} - SET_BY_COMPARISON.keys()
    numbers = compare_runs(kind, finished, [run.key for run in runs], initial_weights) | {
        "scored_on": "test" if runs[0].scores.name.endswith("test") else "validation",
        "recipe": {k: v for k, v in as_plain(config).items() if k in matters and v != defaults[k]},
        "digests": {name: digests[name] for name in initial_weights if name in digests},
    }
    write_benefit(out, kind, numbers)
