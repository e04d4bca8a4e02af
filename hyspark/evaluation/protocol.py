"""How scores were made: the protocol that stands beside them, and the files of a run's scores."""

from collections.abc import Mapping
from typing import Any

SCORE_FILES = ("cases.csv", "summary.json")
DATA_DIGEST = "data_digest"  # in a protocol: `cases_digest` of what was scored
TRAINED_ON = "training_cases"  # in a protocol: their number, without those that could not be used


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """How scores were measured, in one line."""
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in protocol.items())
