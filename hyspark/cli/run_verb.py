"""Calling a verb: errors that are for the user become one message and an exit code (hyspark.utils.exit_codes)."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from hyspark.utils.exit_codes import FOUND, WRONG_USE

EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError)
"""Errors that this package raises for the user. A missing extra is an ImportError."""


def run_verb(function: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call a verb; print an error that this package raised for the user as one message.

    The exit code is WRONG_USE then, or FOUND for a training that diverged. Other errors keep their traceback.
    """
    try:
        function(sys.argv[1:] if argv is None else argv)
    except EXPECTED as error:
        if not isinstance(error, OSError) and not raised_here(error):
            raise
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"error{rank}: {error}", file=sys.stderr)
        sys.exit(FOUND if isinstance(error, FloatingPointError) else WRONG_USE)


def raised_here(error: BaseException) -> bool:
    """Return whether this package's own code raised the error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(__file__).parents[1] in Path(last.filename).parents
