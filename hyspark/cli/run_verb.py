"""Calling a verb: errors that are for the user become one message and an exit code (hyspark.utils.exit_codes)."""

import os
import sys
from collections.abc import Callable, Sequence

from hyspark.utils.exit_codes import FOUND, INTERRUPTED, STOPPED, WRONG_USE
from hyspark.utils.install import install_command
from hyspark.utils.log import set_up_log
from hyspark.utils.text import first_line
from hyspark.utils.tracebacks import damaged_file, raised_here
from hyspark.utils.version import VERSION

EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError)
"""Errors that this package raises for the user. A missing extra is an ImportError."""
REPORT = "the lines above show a fault of hyspark: please report them, with the command and `hyspark --version`"


def run_verb(function: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call a verb; print an error that is for the user as one message, once for all ranks that have it.

    The exit code is WRONG_USE then, or FOUND for a training that diverged. Other errors keep their traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what a terminal cannot show
    set_up_log()
    try:
        function(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("stopped by Control-C", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as stop:
        if stop.code == STOPPED and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from hyspark.training.rank_errors import post_killed_ranks

            message, printing = post_killed_ranks()
            if printing:
                print(f"error ({printing}): {message}", file=sys.stderr)
            if message:
                sys.exit(FOUND)
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_has_ended():
            sys.exit(FOUND)
        message = user_message(error)
        code = WRONG_USE if message and not isinstance(error, FloatingPointError) else FOUND
        ranks = ""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from hyspark.training.rank_errors import post_error

            message, printing = post_error(error, message)
            if not printing:
                sys.exit(code)
            ranks = f" ({printing})"
        if message:
            print(f"error{ranks}: {message}", file=sys.stderr)
            sys.exit(code)
        report_bug(error, ranks)
        raise


def user_message(error: BaseException) -> str:
    """Return what is wrong with the user's files, flags or machine, in the words of an error; empty for a bug."""
    text = str(error).strip()
    if isinstance(error, OSError):
        return text or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and raised_here(error):
        return f"{error.name}: not installed, and needed by hyspark {VERSION}; install it with: {install_command()}"
    if isinstance(error, EXPECTED) and raised_here(error):
        return text or type(error).__name__
    if isinstance(error, MemoryError | RuntimeError):
        from hyspark.training.distributed import describe_unusable_gpu
        from hyspark.utils.free_memory import is_out_of_memory

        if is_out_of_memory(error):
            return f"not enough memory ({first_line(error)}); use smaller batches or crops, or fewer worker processes"
        if advice := describe_unusable_gpu(error):
            return advice
    if file := damaged_file(error):
        return f"{file}: unreadable ({type(error).__name__}: {first_line(error)}); replace the file"
    return ""


def report_bug(error: BaseException, ranks: str) -> None:
    """Add to an error, whose traceback Python prints, what to do with it."""
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"error{ranks}: {REPORT}")


def reader_has_ended() -> bool:
    """Return whether whatever reads the output has ended, as `| head` does; if so, write no more."""
    try:
        print(flush=True)  # what was not written before may be lost, so that a flush alone may succeed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
