"""dice.json of a fine-tuning run: Dice of the best and of the last weights on the validation cases."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyspark.atomic import write_whole


@dataclass(frozen=True)
class Scores:
    """Dice after a step: mean over organs, mean over cases of each organ, and each case's values in the organs'
    order.
    """

    step: int
    mean: float
    organs: dict[str, float]
    cases: dict[str, list[float]]


def write_scores(folder: Path, **entries: Scores) -> None:
    """Put entries ("best", "last") into dice.json of a run folder."""
    path = folder / "dice.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known |= {name: asdict(scores) for name, scores in entries.items()}
    write_whole(path, (json.dumps(known, indent=1) + "\n").encode())


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Dice per organ of the best and of the last weights of a run.

    Raises FileNotFoundError where the folder holds no scores yet.
    """
    loaded = load_scores(folder)
    return {name: loaded[name]["organs"] for name in ("best", "last")}


def read_cases(folder: Path) -> list[str]:
    """Names of the cases that a run was validated on, sorted; raises as `read_scores`."""
    return sorted(load_scores(folder)["best"]["cases"])


def load_scores(folder: Path) -> dict[str, Any]:
    """What dice.json of a run folder holds; raises as `read_scores`."""
    path = folder / "dice.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no scores (dice.json); is it a fine-tuning run that was validated?")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
