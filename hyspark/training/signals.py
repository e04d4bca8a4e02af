"""SIGTERM and SIGUSR1 ask a run to stop: it finishes its step, saves and ends with a code of its own, so that whoever
started it knows that the same command continues it. Schedulers send them before a job's time is up.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hyspark.utils.log import LOG
from hyspark.utils.processes import STOP_SIGNALS

EXIT_CODE = 75
"""Of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, "try again later"."""


class AskedToStop(SystemExit):
    """Ends a process that was asked to stop, with its message logged and the code that says so."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        LOG.info("%s", message)


class Requests:
    """What was asked of this process. pending: name of the signal, or nothing. at_once: whether a signal ends the run
    where it stands, by AskedToStop; otherwise the loop looks at `pending` between two steps.
    """

    def __init__(self) -> None:
        self.pending = ""
        self.at_once = True

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.pending = signal.Signals(number).name
        self.heed()

    def heed(self) -> None:
        """End the run, where that is asked and allowed."""
        if self.pending and self.at_once:
            raise AskedToStop(f"stopped by {self.pending}; the same command continues")

    @contextmanager
    def stops(self, at_once: bool) -> Iterator[None]:
        """How signals are heeded within the block."""
        before, self.at_once = self.at_once, at_once
        try:
            self.heed()
            yield
        finally:
            self.at_once = before


@contextmanager
def requests() -> Iterator[Requests]:
    """Take note of signals, in the main thread (others cannot); those that the caller handles or ignores are left."""
    found = Requests()
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number in STOP_SIGNALS if in_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, found.ask)
    try:
        yield found
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
