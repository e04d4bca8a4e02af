"""Time of the GPU study: what fits into the minutes of a call, and stopping at their end."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

MOST_RESERVE, RESERVE_RATIO = 15.0, 0.05
"""Seconds, and fraction of a call's time, that are kept for stopping and writing; the lesser counts."""
STEP_RATIO = 0.75
"""Fraction of the pre-training time that goes to steps. Validation, saving and waiting for crops take the rest."""
WARMUP_RATIO = 0.05
"""Fraction of the epochs that warm up."""


class OutOfTimeError(BaseException):
    """Raised at the end of the time where nothing listens for SIGTERM; no `except Exception` on its way stops it."""


@dataclass
class Limit:
    """Whether a time is over."""

    is_over: bool = False


@dataclass(frozen=True)
class Budget:
    """Time of one call, in seconds; `begun` and every `now` are readings of one clock."""

    begun: float
    seconds: float

    @property
    def deadline(self) -> float:
        """Clock reading at which work is stopped."""
        return self.begun + self.seconds - min(MOST_RESERVE, RESERVE_RATIO * self.seconds)

    def left(self, now: float) -> float:
        """Compute the seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - now)

    def left_of_first_half(self, now: float) -> float:
        """Compute the seconds until half of the time is over, at least 0."""
        return max(0.0, self.begun + self.seconds / 2 - now)


def epochs_that_fit(seconds: float, step_seconds: float, steps_per_epoch: int) -> int:
    """Choose the number of pre-training epochs for a time: at least one, whole schedules only."""
    return max(1, math.floor(seconds * STEP_RATIO / (step_seconds * steps_per_epoch)))


def warmup_of(epochs: int) -> int:
    """Choose the number of warm-up epochs: at least one, but none of a single epoch."""
    return 0 if epochs == 1 else max(1, round(WARMUP_RATIO * epochs))


def seeds_at_once(jobs: int, runs_per_seed: int) -> int:
    """Choose how many seeds are begun together, so that all jobs have a run."""
    return max(1, jobs // runs_per_seed)


@contextmanager
def time_limit(seconds: float) -> Iterator[Limit]:
    """Stop what runs in the block when the time is over; gives an object that says whether it is.

    A training or comparison that listens for SIGTERM gets one: it saves, stops its child processes and exits. Anything
    else is left by OutOfTimeError. Works in the main thread only.
    """
    limit = Limit()

    def end(number: int, frame: FrameType | None) -> None:
        limit.is_over = True
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            raise OutOfTimeError
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield limit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
