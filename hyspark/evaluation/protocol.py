"""How scores were measured: the protocol in the summary.json of a folder of scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyspark.utils.atomic import to_json

SCORE_FILES = ("cases.csv", "summary.json")
"""Files of a folder of scores that comparisons read."""
DATA_DIGEST = "data_digest"
"""Key of the digest of the scored cases' names and files (`cases_digest`)."""
TRAINED_ON = "training_cases"
"""Key of the number of training cases, without the excluded ones."""
FAILED = "failed"
"""Key of the cases that were not scored, with their reasons; absent if all were."""
RUN_SCORES = ("scores", "scores_test")
"""Folders of scores in a run, of its validation and its test cases."""
INFORMATIVE = ("data", "precision")
"""Keys without an effect on scores beyond rounding: the path of the data, and the precision that the machine offers."""


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """Write a protocol in one line."""
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in protocol.items())


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary.json of a folder of scores.

    Raises:
        FileNotFoundError: There is none.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no scores (summary.json); were its cases scored?")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def unscored_cases(run_folder: Path) -> dict[str, str]:
    """Read why validation and test cases of a finished run were not scored, as FOLDER/CASE; empty if all were."""
    folders = [run_folder / name for name in RUN_SCORES]
    failed = {f.name: read_summary(f).get(FAILED, {}) for f in folders if (f / "summary.json").is_file()}
    return {f"{folder}/{case}": reason for folder, reasons in failed.items() for case, reason in reasons.items()}


def has_score_files(folder: Path) -> bool:
    """Check that a folder holds all files of scores."""
    return all((folder / name).is_file() for name in SCORE_FILES)


def has_all_scores(folder: Path) -> bool:
    """Check that a folder holds all files of scores, and that no case is missing in them."""
    return has_score_files(folder) and not read_summary(folder).get(FAILED)


def has_scores(folder: Path, protocol: Mapping[str, Any]) -> bool:
    """Check that a folder holds scores that were measured by a protocol; `INFORMATIVE` keys may differ."""
    if not has_score_files(folder):
        return False
    known = read_summary(folder)["protocol"]
    return all(known.get(key) == to_json(value) for key, value in protocol.items() if key not in INFORMATIVE)
