"""Exit codes: 0 done, 1 found something, 2 wrong use, 75 stopped and can be continued."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def run(function: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call a verb; an error that this package raised for the user becomes one message and exit code 2, or 1 for a
    failed training.
    """
    try:
        function(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, FloatingPointError) as error:
        if not isinstance(error, OSError) and not raised_here(error):
            raise
        # One of each machine speaks, whose disk or data may be the cause.
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def raised_here(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code; others keep their traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(__file__).parents[1] in Path(last.filename).parents
