"""The one logger of the package, and silence of other libraries."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

LOG = logging.getLogger("hyspark")


def set_up_log() -> None:
    """Show messages on the terminal.

    Of the processes that torchrun started, the main one shows all messages, the first of each other machine warnings,
    and the others errors.
    """
    logging.basicConfig(format="%(message)s")
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
