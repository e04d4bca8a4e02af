"""Where an error was raised: in this package or in a library, and while which file was read."""

from pathlib import Path
from types import FrameType

READING_MODULES = {
    *("PIL", "_pickle", "blosc2", "codecs", "csv", "_csv", "encodings", "gzip", "isal", "json", "nibabel", "pickle"),
    *("pydicom", "safetensors", "safetensors_rust", "yaml", "zipfile", "zlib"),
}
"""Modules that read files; one that raises an error has met a damaged file."""
FILE_NAMES = ("path", "file", "image", "label", "source", "weights")
"""Local variables that hold the file that a function reads."""


def raised_here(error: BaseException) -> bool:
    """Return whether this package's own code raised the error."""
    return is_own(frames(error)[-1])


def damaged_file(error: BaseException) -> str:
    """Return the file that a library for files failed to read, from the variables of this package's functions.

    Returns:
        The path; empty if another library raised the error, or no file is known.
    """
    found = frames(error)
    modules = {type(error).__module__, found[-1].f_globals.get("__name__", "")}
    if not {module.partition(".")[0] for module in modules} & READING_MODULES:
        return ""
    inside = [frame for frame in reversed(found) if is_own(frame)]
    if any(frame.f_code.co_name.startswith(("write", "save", "export")) for frame in inside):
        return ""  # a fault of what is written
    own = [frame.f_locals for frame in inside]
    values = [variables.get(name) for variables in own for name in FILE_NAMES]
    return next((str(value) for value in values if isinstance(value, Path | str) and str(value)), "")


def frames(error: BaseException) -> list[FrameType]:
    """List the frames of an error, the innermost last."""
    found, trace = [], error.__traceback__
    while trace:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    return found


def is_own(frame: FrameType) -> bool:
    """Return whether a frame is of a function of this package."""
    return Path(__file__).parents[1] in Path(frame.f_code.co_filename).parents
