"""The one logger of the package."""

import logging
import os

LOG = logging.getLogger("hyspark")


def set_up_log() -> None:
    """Show messages on the terminal; of several processes that torchrun started, the main one shows all of them."""
    logging.basicConfig(format="%(message)s")
    LOG.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
