"""Does pre-training pay? The same fine-tuning from several starts, at several numbers of labelled cases and seeds.

Every run is an ordinary fine-tuning run in a process and a folder of its own, <out>/runs/<start>_<labels>_seed<seed>.
What is finished is not run again and what was interrupted continues, so the same command makes or completes the
report.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyspark.comparison import classification, segmentation
from hyspark.comparison.jobs import Job, last_step, run_jobs
from hyspark.comparison.table import Kind, Place, name_of
from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import as_plain, differences, read_yaml, write_yaml
from hyspark.config.segmentation import SegmentationConfig
from hyspark.evaluation.protocol import SCORE_FILES
from hyspark.training.run_folder import checkpoint_file
from hyspark.utils.atomic import write_json
from hyspark.utils.processes import available_cores
from hyspark.utils.settings import field_info

Config = SegmentationConfig | ClassificationConfig
KINDS: dict[type, Kind] = {SegmentationConfig: segmentation.KIND, ClassificationConfig: classification.KIND}
"""What is compared, by the class of its settings."""

GIVEN = {"out": "out", "weights": "initial_weights", "seed": "seeds", "num_labelled": "num_labelled", "dry_run": "plan"}
"""Settings of a run that the comparison gives, and the flag that says them."""
COMMAND = (sys.executable, "-c", "from hyspark.cli.main import main; main()")


@dataclass(frozen=True)
class PlannedRun:
    """A run of the comparison."""

    place: Place
    config: Any

    @property
    def kind(self) -> Kind:
        """Segmentation or classification."""
        return KINDS[type(self.config)]

    @property
    def scores(self) -> Path:
        """Where its scores lie: of the test part where there is one, else of the validation part."""
        return self.kind.scores(self.config)

    @property
    def is_finished(self) -> bool:
        """Whether its scores are there and were made with these settings."""
        has_scores = all((self.scores / name).is_file() for name in SCORE_FILES)
        return has_scores and self.has_settings and not self.changes()

    @property
    def has_settings(self) -> bool:
        """Whether its folder holds the settings of an earlier attempt."""
        return (self.config.run_folder / "config.yaml").is_file()

    def changes(self) -> list[str]:
        """Settings of its folder that differ from those wanted now."""
        config_class = type(self.config)
        old = config_class(**read_yaml(self.config.run_folder / "config.yaml", config_class))
        infos = field_info(config_class)
        movable = [name for name, info in infos.items() if info.may_change and info.affects_results]
        moved = [(name, getattr(old, name), getattr(self.config, name)) for name in movable]
        found = differences(as_plain(old), self.config) + [f"{n}: was {a}, is {b}" for n, a, b in moved if a != b]
        return list(dict.fromkeys(found))


def benefit(
    base: Config,
    out: Path,
    starts: Mapping[str, str],
    num_labelled: Sequence[int],
    seeds: Sequence[int],
    *,
    num_at_once: int = 1,
    plan_only: bool = False,
    after_report: Callable[[], None] = lambda: None,
) -> list[str]:
    """Make what is missing of the runs, so many at once, and the report in `out`; returns the names of failed runs.

    base: what all runs share. starts: of `read_starts`. plan_only: print the runs and their state, run and write
    nothing. after_report: called whenever the report has been written. Raises, before the first run, ValueError or
    FileNotFoundError for settings, weights and data that do not fit, and for runs in `out` that were made with other
    ones.
    """
    runs = plan(base, out, starts, num_labelled, seeds, num_at_once)
    check_folders(runs)
    digests = check_weights(out, starts)
    if plan_only:
        print("\n".join(f"{name_of(run.place):40s} {state(run)}" for run in runs))
        return []
    todo = [run for run in runs if not run.is_finished]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished; output in {out / 'runs'}/*/log.txt")
    kind, defaults = KINDS[type(base)], as_plain(type(base)())
    if todo:
        data = check_data_digest(out, kind.digest(base))
        kind.check_data([run.config for run in todo], starts)
        write_json(out / "data.json", {"digest": data})
    write_json(out / "starts.json", digests)
    matters = {name for name, info in field_info(type(base)).items() if info.affects_results} - GIVEN.keys()
    recipe = {k: v for k, v in as_plain(runs[0].config).items() if k in matters and v != defaults[k]}
    scored_on = "test" if runs[0].scores.name.endswith("test") else "validation"
    more = {
        "scored_on": scored_on,
        "recipe": recipe,
        "digests": {name: digests[name] for name in starts if name in digests},
    }

    def report() -> None:
        make_report(kind, runs, out, starts, more)
        after_report()

    if len(todo) < len(runs):
        report()  # first, since what is finished may not go together
    failed = run_jobs([job(run) for run in todo], num_at_once, report)
    report()
    print(f"report {out / 'benefit.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return failed


def read_starts(words: Sequence[str]) -> dict[str, str]:
    """NAME=FILE words as a dictionary; a FILE of none is from scratch. Raises ValueError for what is not that."""
    starts: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"a start is NAME=FILE, or NAME=none for one from scratch, with a name of letters, digits, '.', '_' "
                f"and '-'; got {word!r}"
            )
        if name in starts:
            raise ValueError(f"two starts have the name {name!r}")
        starts[name] = path
    return starts


def numbers_of(base: Config, num_labelled: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Numbers of labelled cases: as given, or those that are so large a share of the training cases.

    Raises ValueError where both are given, or none, a share is none, or two are the same number.
    """
    if bool(num_labelled) == bool(fractions):
        raise ValueError("name the numbers of labelled cases by one of --num_labelled and --label_fractions")
    if not fractions:
        return list(num_labelled)
    if not 0 < min(fractions) <= max(fractions) <= 1:
        raise ValueError(f"--label_fractions are above 0 and at most 1, but got {list(fractions)}")
    num = KINDS[type(base)].num_training(base)
    numbers = [max(1, round(fraction * num)) for fraction in fractions]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"of {num} training cases, --label_fractions {list(fractions)} are {numbers}: some are the same"
        )
    return numbers


def plan(
    base: Config,
    out: Path,
    starts: Mapping[str, str],
    num_labelled: Sequence[int],
    seeds: Sequence[int],
    num_at_once: int,
) -> list[PlannedRun]:
    """All runs in the order in which they tell most early: seed by seed, few labels first, the starts side by side.

    Raises ValueError for settings that do not fit.
    """
    defaults = type(base)()
    for name, flag in GIVEN.items():
        if getattr(base, name) != getattr(defaults, name):
            raise ValueError(f"{name} is given to each run of a comparison by --{flag}; take it out of the recipe")
    if base.label_fraction != defaults.label_fraction:
        raise ValueError("a comparison takes numbers of cases (--num_labelled), not label_fraction")
    for flag, values in (("num_labelled", num_labelled), ("seeds", seeds), ("starts", list(starts))):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"--{flag} takes one value or more, each once, but got {list(values)}")
    if min(num_labelled) < 1 or num_at_once < 1:
        raise ValueError(f"--num_labelled and --jobs are at least 1, but got {list(num_labelled)} and {num_at_once}")
    if num_at_once > 1 and base.dataloader_workers < 0:
        base = replace(base, dataloader_workers=max(1, min(8, available_cores() // num_at_once)))
    places = [Place(start, n, seed) for seed in seeds for n in sorted(num_labelled) for start in starts]
    return [PlannedRun(place, settings(base, out, place, starts[place.start])) for place in places]


def settings(base: Config, out: Path, place: Place, weights: str) -> Config:
    """The settings of one run."""
    folder = str(out / "runs" / name_of(place))
    return replace(base, out=folder, weights=weights, seed=place.seed, num_labelled=place.num_labelled)


def check_folders(runs: Sequence[PlannedRun]) -> None:
    """Raises ValueError where a run's folder holds weights or scores that were made with other settings."""
    for run in runs:
        folder = run.config.run_folder
        is_used = checkpoint_file(run.config).is_file() or run.scores.is_dir()
        if is_used and run.has_settings and run.changes():
            raise ValueError(
                f"{folder} holds a run with other settings; name another --out, or use the same to continue:\n  "
                + "\n  ".join(run.changes())
            )


def check_weights(out: Path, starts: Mapping[str, str]) -> dict[str, str]:
    """Digests of the starts' files, those that earlier calls noted in `out` included.

    Raises FileNotFoundError for a missing file; ValueError where a file is not what it was in an earlier call.
    """
    noted = out / "starts.json"
    digests: dict[str, str] = json.loads(noted.read_text()) if noted.is_file() else {}
    for name, weights in starts.items():
        if weights == "none":
            continue
        if not Path(weights).is_file():
            raise FileNotFoundError(f"no weights at {weights}, named by --initial_weights {name}={weights}")
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        if digests.setdefault(name, digest) != digest:
            raise ValueError(
                f"{weights} is not the file that runs of {name!r} in {out} were started from: its content has changed; "
                "give it another name in --initial_weights, or name another --out"
            )
    return digests


def check_data_digest(out: Path, digest: str) -> str:
    """The digest; raises ValueError where an earlier call noted another one in `out`."""
    noted = out / "data.json"
    known = json.loads(noted.read_text())["digest"] if noted.is_file() else digest
    if known != digest:
        raise ValueError(
            f"the data is not what runs in {out} were made with: images, labels, or which of them are to train on, to "
            f"validate on and to score have changed (digest was {known}, is {digest}); name another --out"
        )
    return digest


def job(run: PlannedRun) -> Job:
    """The process that makes a run, from the settings that it leaves in the run's folder."""
    recipe = run.config.run_folder / "config.yaml"
    write_yaml(run.config, recipe)
    command = [*COMMAND, run.kind.verb, "--config", str(recipe)]
    return Job(name_of(run.place), command, run.config.run_folder, lambda: run.is_finished)


def state(run: PlannedRun) -> str:
    """How far a run is."""
    step = last_step(run.config.run_folder / "metrics.jsonl")
    return "finished" if run.is_finished else f"begun, at{step}" if step else "to do"


def make_report(
    kind: Kind, runs: Sequence[PlannedRun], out: Path, starts: Mapping[str, str], more: Mapping[str, Any]
) -> None:
    """Write the report of what is finished. more: goes along with the numbers."""
    finished = {run.place: run.config for run in runs if run.is_finished}
    kind.report(out, finished, [run.place for run in runs], starts, more)
