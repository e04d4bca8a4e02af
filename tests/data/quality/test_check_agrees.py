"""`check` finds an error exactly where a run refuses a case or a data set, over a table of faults and at random."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.quality.faults_of_channels import CHANNELS, OF_MR
from tests.data.quality.faults_of_files import FILES, Fault
from tests.data.quality.faults_of_headers import HEADERS
from tests.data.quality.faults_of_lists import CLASSES, LISTS, SPLITS
from tests.data.quality.faults_of_names import ODD
from tests.data.quality.faults_of_values import LABELS, VALUES
from tests.data.quality.runs import VERBS, Checked, Outcome, Runs, run_check
from tests.data.quality.small_data import CASES, SmallData, write_mr

LABELLED = ("finetune", "evaluate")
FAULTS = [*FILES, *HEADERS, *VALUES, *LABELS, *ODD, *CLASSES, *LISTS, *SPLITS]
NUM_RANDOM = int(os.environ.get("HYSPARK_FUZZ", 25))
SAID = ("image without label", "empty side", "unnamed class")
"""Kinds of findings below errors for which labelled runs may refuse a data set."""
QUICK = {"image": ("finetune", "predict", "slices"), "label": LABELLED}
"""Verbs that are tried with each fault of a file; random combinations are tried with all."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqdm.std.tqdm.monitor_interval", 0)
        yield Runs(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_check_agrees_with_the_runs_on_one_fault(fault: Fault, runs: Runs, tmp_path: Path) -> None:
    data = SmallData(tmp_path, CASES[:2] if fault.where in QUICK else CASES)
    fault.edit(data, "p01")
    assert problems(fault, run_check(data), runs.outcomes(data, QUICK.get(fault.where, VERBS))) == []


@pytest.mark.parametrize("seed", range(NUM_RANDOM))
def test_check_agrees_with_the_runs_on_random_faults(seed: int, runs: Runs, tmp_path: Path) -> None:
    """Up to three faults of files on different cases; in half of the data sets one of the set, too."""
    rng = np.random.default_rng(seed)
    data = SmallData(tmp_path)
    of_files = [fault for fault in FAULTS if fault.where in QUICK]
    of_sets = [fault for fault in FAULTS if fault.where not in QUICK]
    drawn = [(of_files[rng.integers(len(of_files))], str(case)) for case in rng.permutation(CASES)[: rng.integers(4)]]
    for fault, case in drawn:
        fault.edit(data, case)
    if rng.random() < 0.5:
        fault = of_sets[rng.integers(len(of_sets))]
        try:
            fault.edit(data, "")
        except OSError:
            pytest.skip("the fault needs a file that another one removed")
        drawn.append((fault, ""))
    assert problems(None, run_check(data), runs.outcomes(data)) == [], [(fault.name, case) for fault, case in drawn]


@pytest.mark.parametrize("fault", CHANNELS, ids=[fault.name for fault in CHANNELS])
@pytest.mark.parametrize(("intensity", "num"), [("mr", 2), ("none", 2), ("mr", 1)])
def test_check_agrees_with_the_runs_on_channels(fault: Fault, intensity: str, num: int, tmp_path: Path) -> None:
    data = SmallData(tmp_path, CASES)
    write_mr(data.folder)
    fault.edit(data, "p01")
    settings = {"intensity": (intensity,), "image_channels": tuple(range(num))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqdm.std.tqdm.monitor_interval", 0)
        outcomes = Runs(tmp_path / "store", **settings).outcomes(data, (*LABELLED, "pretrain", "predict"))
    judged = fault if num == 2 and (intensity == "mr" or fault.name not in OF_MR) else None
    assert problems(judged, run_check(data, **settings), outcomes) == []


def test_many_kinds_of_faults_are_tried() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 300


def problems(fault: Fault | None, seen: Checked, outcomes: dict[str, Outcome]) -> list[str]:
    """Where `check`, the runs and the table disagree, in words."""
    wrong = [f"{verb}: a traceback" for verb, outcome in outcomes.items() if outcome.crash]
    if seen.crash:
        return [*wrong, "check: a traceback"]
    for verb, outcome in outcomes.items():
        wrong += [f"{verb}: {text}" for text in disagreements(verb, seen, outcome)]
    stops = [verb for verb, outcome in outcomes.items() if outcome.stopped]
    if seen.set_errors and not stops:
        wrong.append(f"check has an error of the set, no run stops: {seen.set_errors[0].kind}")
    if fault:
        wrong += surprises(fault, seen, outcomes)
    return wrong


def disagreements(verb: str, seen: Checked, outcome: Outcome) -> list[str]:
    """Where `check` and one run disagree."""
    found = {case.image for case in outcome.cases}
    broken = {c.image for c in outcome.cases if seen.errors_of(c)}
    if outcome.stopped:
        errors = [f for f in seen.findings if f.severity == "error"]
        is_said = verb in LABELLED and any(f.kind in SAID for f in seen.findings)
        return [] if errors or seen.stopped or is_said else [f"stops, but check has no error: {outcome.stopped[:90]}"]
    wrong = []
    if seen.stopped:
        wrong.append("goes on, but check stops")
    unnamed = {f.file for f in seen.findings if f.kind == "unnamed class"}  # right with more --out_channels
    broken |= {c.image for c in outcome.cases if str(c.label) in unnamed and c.image in outcome.refused}
    if names := [path.name for path in outcome.refused - broken]:
        wrong.append(f"refuses {names}, but check has no error")
    if verb == "slices":
        return wrong
    if names := [path.name for path in broken - outcome.refused]:
        wrong.append(f"takes {names}, but check has an error")
    examined = {case.image for case in seen.cases}
    named = {Path(finding.file).name for finding in seen.findings}
    if names := [path.name for path in found - examined if path.name not in named]:
        wrong.append(f"uses {names}, which check does not examine")
    expected = {c.image for c in seen.cases if c.label or verb not in LABELLED}
    texts = "\n".join(finding.found for finding in seen.findings)
    if names := [path.name for path in expected - found if path.name not in named and path.name not in texts]:
        wrong.append(f"passes over {names}, and check does not say so")
    for path in outcome.refused:
        if "\n" in outcome.messages[path] and len(outcome.messages[path].splitlines()) > 4:
            wrong.append(f"says too much: {outcome.messages[path]!r}")
    return wrong


def surprises(fault: Fault, seen: Checked, outcomes: dict[str, Outcome]) -> list[str]:
    """Where `check` and the runs agree on something else than the table says."""
    errors = [f.kind for f in seen.findings if f.severity == "error"] + ["stopped"] * bool(seen.stopped)
    others = [f.kind for f in seen.findings if f.severity != "error"]
    concerned = LABELLED if fault.where in ("label", "labelled") else tuple(outcomes)
    refusals = [verb for verb in concerned if outcomes[verb].refused or outcomes[verb].stopped]
    wrong = []
    if fault.expected == "refused" and not errors:
        wrong.append("table: expected an error, check has none")
    if fault.expected == "refused" and not refusals:
        wrong.append("table: expected a refusal, the runs refuse nothing")
    if fault.expected == "fine" and (errors or refusals):
        wrong.append(f"table: expected fine, got {errors} and {refusals}")
    if fault.expected == "otherwise" and (errors or not others):
        wrong.append(f"table: expected a warning or a note, got errors {errors}, others {others}")
    if fault.where == "labelled" and (outcomes["predict"].refused or outcomes["predict"].stopped):
        wrong.append("predict refuses what concerns labels alone")
    return wrong
