"""The one logger of the package."""

import logging
import os

LOG = logging.getLogger("hyspark")


def set_up_log() -> None:
    """Show messages on the terminal.

    Of the processes that torchrun started, the main one shows all messages, the first of each other machine warnings,
    and the others errors.
    """
    logging.basicConfig(format="%(message)s")
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    LOG.setLevel(logging.INFO if rank == 0 else logging.WARNING if local_rank == 0 else logging.ERROR)
