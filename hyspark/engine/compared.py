"""What a comparison of fine-tuning runs has to know of the kind of task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyspark.comparison import Place


@dataclass(frozen=True)
class Kind:
    """A kind of fine-tuning. Settings are of the task's own class.

    verb: of the command that makes a run. scores: settings -> the folder of a run's scores. num_training: settings ->
    how many training cases there are. digest: settings -> digest of all data that runs with any number of labels and
    any seed train on or are scored on. check_data: look at the data and load each start once, before the first of the
    runs with these settings; raises ValueError or FileNotFoundError for data or weights that do not fit. report: into a
    folder, of the finished runs' settings by place, all places planned, starts, and what goes along with the numbers.
    """

    verb: str
    scores: Callable[[Any], Path]
    num_training: Callable[[Any], int]
    digest: Callable[[Any], str]
    check_data: Callable[[Sequence[Any], Mapping[str, str]], None]
    report: Callable[[Path, Mapping[Place, Any], Sequence[Place], Mapping[str, str], Mapping[str, Any]], None]
