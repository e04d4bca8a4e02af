"""Faults of single cases: one case, whatever is wrong with it, does not end the work on the others."""

import errno

from hyspark.utils.free_memory import is_out_of_memory
from hyspark.utils.text import first_line

NO_OUTPUT = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM") if hasattr(errno, name)}
"""Errors of a file system to which no case can be written."""
EXPLAINED = (ValueError, OSError, EOFError, RuntimeError, ImportError)
"""Errors whose messages stand without the name of their type."""


class OutputError(OSError):
    """The folder to write to takes no file, of whatever case; ends the run."""


def case_failure(error: Exception) -> str:
    """Describe in one line why a case failed.

    Raises:
        OutputError: The fault is that of the output, not of the case.
    """
    if isinstance(error, OutputError):
        raise error
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # as MONAI hides the reason
        error = error.__cause__
    if is_out_of_memory(error):
        return f"out of memory ({first_line(error)}); free memory, then do this case again"
    return first_line(error) if isinstance(error, EXPLAINED) else f"{type(error).__name__}: {first_line(error)}"
