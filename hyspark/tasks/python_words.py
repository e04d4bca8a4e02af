"""Messages for callers from Python: names of arguments in the position of flags."""

import functools
import logging
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hyspark.utils.log import LOG, set_up_log

ParamsT = ParamSpec("ParamsT")
ReturnT = TypeVar("ReturnT")
VALUE = r"[ =](?:[\d.]*\d|axial|bf16|cpu|fp32|skip)\b"
FLAG = re.compile(rf"(?<![\w-])--(?P<name>[a-z][a-z0-9_]*)(?P<value>{VALUE})?")
TYPED_COMMAND = re.compile(r"\b(hyspark [a-z][a-z-]*|torchrun|python|pip) [^;,`\n]*$")
"""A command line, in which flags stay."""


def in_python_words(function: Callable[ParamsT, ReturnT]) -> Callable[ParamsT, ReturnT]:
    """Wrap a function so that its errors and logs name arguments, not flags."""

    @functools.wraps(function)
    def wrapped(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ReturnT:
        set_up_log(keep_level=True)
        LOG.addFilter(rewrite_record)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            error.args = tuple(argument_names(text) if isinstance(text, str) else text for text in error.args)
            raise
        finally:
            LOG.removeFilter(rewrite_record)

    return wrapped


def argument_names(text: str) -> str:
    """Replace flags by arguments: --overlap by overlap, --on_bad_case skip by on_bad_case='skip'."""

    def as_argument(found: re.Match[str]) -> str:
        if TYPED_COMMAND.search(text[: found.start()]):
            return found[0]
        value = (found["value"] or "")[1:]
        return found["name"] + (f"={value if value[0].isdigit() else repr(value)}" if value else "")

    return FLAG.sub(as_argument, text)


def rewrite_record(record: logging.LogRecord) -> bool:
    """Replace flags in a line of the log."""
    record.msg, record.args = argument_names(record.getMessage()), ()
    return True
