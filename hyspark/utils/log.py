"""The one logger of the package, and silence of other libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

LOG = logging.getLogger("hyspark")


class TerminalHandler(logging.Handler):
    """Shows messages on the terminal while the program has no handler of its own, for this logger or for all."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message to the standard error stream of the moment."""
        if any(handler is not self for handler in (*LOG.handlers, *logging.root.handlers)):
            return
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:  # a message that cannot be shown ends no run
            self.handleError(record)


TERMINAL = TerminalHandler()


def set_up_log(*, keep_level: bool = False) -> None:
    """Show messages on the terminal.

    Of the processes that torchrun started, the main one shows all messages, the first of each other machine warnings,
    and the others errors.

    Args:
        keep_level: Keep the level that the logger has, as a program sets it that calls this package from Python.
    """
    LOG.addHandler(TERMINAL)
    if keep_level and LOG.level != logging.NOTSET:
        return
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    LOG.setLevel(logging.INFO if rank == 0 else logging.WARNING if local_rank == 0 else logging.ERROR)


@contextmanager
def silence() -> Iterator[None]:
    """Hide what other packages print, log and warn of inside the block; errors are raised as always."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
