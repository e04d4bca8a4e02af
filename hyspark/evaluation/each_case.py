"""Work on many cases, which the processes of a run divide among themselves; no case ends it for the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from hyspark.evaluation.failures import case_failure
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.utils.log import LOG

T = TypeVar("T")


class Failed(NamedTuple):
    """Why the work on a case failed, in one line."""

    reason: str


def work_on_each(
    names: Sequence[str], work: Callable[[int], T], processes: Processes, title: str, keep_bar: bool = True
) -> tuple[dict[int, T], dict[str, str]]:
    """Call `work` with the index of each case; each process takes its part, and all get the results.

    Args:
        names: Names of the cases.
        work: Returns the result of a case, small enough to be sent to all processes.
        processes: The processes of the run.
        title: Title of the progress bar.
        keep_bar: Whether the bar stays when all is done.

    Returns:
        Results by index in order, and the reasons of the cases that failed, by name.
    """
    mine = range(processes.rank, len(names), processes.world_size)

    def work_on_mine() -> list[tuple[int, T | Failed]]:
        bar = tqdm(mine, desc=title, unit="case", leave=keep_bar, disable=not processes.is_main)
        return [(i, result_or_failed(work, i)) for i in bar]

    found = dict(sorted(distributed.run_and_gather(work_on_mine, processes), key=lambda pair: pair[0]))
    done = {i: result for i, result in found.items() if not isinstance(result, Failed)}
    return done, {names[i]: result.reason for i, result in found.items() if isinstance(result, Failed)}


def result_or_failed(work: Callable[[int], T], index: int) -> T | Failed:
    """Call `work` with an index; return why it failed if it does."""
    try:
        return work(index)
    except Exception as error:
        return Failed(case_failure(error))


def warn_of_failures(failures: Mapping[str, str], num: int, done: str) -> None:
    """Warn of the cases that failed, a line each.

    Args:
        failures: Reasons by case.
        num: Number of all cases.
        done: What was not done with them, as in "scored".
    """
    if failures:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
        LOG.warning("%d of %d cases were not %s:%s", len(failures), num, done, lines)
