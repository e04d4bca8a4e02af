"""Signals that ask a run to stop.

SIGTERM and SIGUSR1, which schedulers send before a job's time is up, let a run finish its step, save and exit. An exit
code of its own says that the same command continues it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hyspark.utils.exit_codes import STOPPED
from hyspark.utils.log import LOG
from hyspark.utils.processes import STOP_SIGNALS


class StopRequested(SystemExit):
    """The end of a process that was asked to stop, with its message logged."""

    def __init__(self, message: str) -> None:
        super().__init__(STOPPED)
        LOG.info("%s", message)


class StopRequests:
    """Requests to stop that this process has got.

    Attributes:
        pending: Name of the signal; empty if there was none.
        at_once: Whether a signal ends the run at once, by StopRequested; otherwise the loop checks `pending` between
            steps.
    """

    def __init__(self) -> None:
        self.pending = ""
        self.at_once = True

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.pending = signal.Signals(number).name
        self.stop_if_allowed()

    def stop_if_allowed(self) -> None:
        """Raise StopRequested if a request is pending and may end the run at once."""
        if self.pending and self.at_once:
            raise StopRequested(f"stopped by {self.pending}; the same command continues")

    @contextmanager
    def handled(self, at_once: bool) -> Iterator[None]:
        """Handle signals in the block at once, or between steps."""
        before, self.at_once = self.at_once, at_once
        try:
            self.stop_if_allowed()
            yield
        finally:
            self.at_once = before


@contextmanager
def catch_stop_signals() -> Iterator[StopRequests]:
    """Catch the signals in the block, in the main thread only; those that the caller handles or ignores are left alone.

    Yields:
        The requests, which signals change.
    """
    requests = StopRequests()
    in_main = threading.current_thread() is threading.main_thread()
    caught = [number for number in STOP_SIGNALS if in_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, requests.receive)
    try:
        yield requests
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
