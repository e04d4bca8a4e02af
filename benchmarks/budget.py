"""Rows measured within a budget of time: each is kept as soon as it is there, and the next call does the rest.

The rows are measured one after the other in a worker process. It is ended where a row takes too long or fails, so that
neither costs the rows behind it: an error of CUDA leaves a process in which nothing works any more.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from hyspark.utils.atomic import write_whole

Values = Mapping[str, Any]
GRACE = 3.0
"""Seconds that a worker and what it has started have to end."""
ENVIRONMENT = "environment"
"""Column that tells the environments of several calls apart."""
OUT_OF_MEMORY = "OutOfMemoryError"
"""Name of the one error after which a process is as good as before."""
STACK = 4000
"""Characters of a traceback that are kept."""


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Args:
        section: heading of its table.
        name: of the row, unique in its section. A function that yields rows names them itself.
        function: called in the worker with the options; returns {column: value} or yields (name, {column: value}).
        limit: seconds that it may take.
        alone: whether it needs a process without traces of other rows.
    """

    section: str
    name: str
    function: Callable[..., Values | Iterator[tuple[str, Values]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 90.0
    alone: bool = False


class Record:
    """What was measured so far, in a folder: `NAME.json`, and `NAME.md` for reading.

    Raises:
        ValueError: the folder holds a file of this name that is none of these.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.json, self.markdown = folder / f"{name}.json", folder / f"{name}.md"
        try:
            known = json.loads(self.json.read_text()) if self.json.is_file() else {}
            self.environments: list[dict[str, Any]] = list(known.get("environments", []))
            self.rows: dict[str, dict[str, dict[str, Any]]] = dict(known.get("rows", {}))
            self.finished: list[str] = list(known.get("finished", []))
            self.failed: dict[str, str] = dict(known.get("failed", {}))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{self.json} is damaged ({error}); remove it, or name another folder") from error

    def begin(self, environment: Mapping[str, Any], same: Sequence[str]) -> None:
        """Note where it is measured, and by which code: rows of several calls may stand beside each other.

        Args:
            same: entries that must be the same in all calls.

        Raises:
            ValueError: the folder holds rows of another device or library.
        """
        for before in self.environments:
            changed = {name: (before.get(name), environment.get(name)) for name in same}
            if different := {name: pair for name, pair in changed.items() if pair[0] != pair[1]}:
                texts = [f"{name}: was {was}, is {now}" for name, (was, now) in different.items()]
                raise ValueError(f"{self.json} holds rows of another machine; name another folder: {'; '.join(texts)}")
        if environment not in self.environments:
            self.environments.append(dict(environment))
        self.environment = self.environments.index(dict(environment))
        self.write()

    def get(self, section: str, name: str, column: str) -> Any:
        """Look up a value that was measured; None where there is none."""
        return self.rows.get(section, {}).get(name, {}).get(column)

    def is_done(self, row: Row) -> bool:
        """Whether a row, or all rows that its function yields, were measured."""
        return key_of(row) in self.finished

    def add(self, section: str, name: str, values: Values) -> None:
        """Keep a row, with the number of the environment that it was measured in."""
        self.rows.setdefault(section, {})[name] = {**values, ENVIRONMENT: 1 + self.environment}
        self.write()

    def finish(self, row: Row) -> None:
        """Note that a row need not be measured again."""
        self.failed.pop(key_of(row), None)
        self.finished.append(key_of(row))
        self.write()

    def fail(self, row: Row, why: str) -> None:
        """Note why a row could not be measured; the next call tries it again."""
        self.failed[key_of(row)] = why
        self.write()

    def write(self) -> None:
        """Write both files, each whole or not at all."""
        known = {name: getattr(self, name) for name in ("environments", "rows", "finished", "failed")}
        self.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.json, (json.dumps(known, indent=1) + "\n").encode())
        write_whole(self.markdown, (self.as_markdown() + "\n").encode())

    def as_markdown(self) -> str:
        """Write a table for each section, and what could not be measured."""
        lines = [f"{number}. {line_of(environment)}" for number, environment in enumerate(self.environments, start=1)]
        several = len(self.environments) > 1
        for section, rows in self.rows.items():
            columns = list(dict.fromkeys(column for values in rows.values() for column in values))
            columns = [column for column in columns if column != ENVIRONMENT or several]
            lines += ["", f"### {section}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
            for name, values in rows.items():
                lines.append(f"| {name} | {' | '.join(text(values.get(column)) for column in columns)} |")
        if self.failed:
            lines += ["", "### Not measured", ""]
            lines += [f"- {key}: {why.splitlines()[0]}" for key, why in self.failed.items()]
        return "\n".join(lines)


def key_of(row: Row) -> str:
    """Name a row with its section."""
    return f"{row.section}: {row.name}"


def line_of(environment: Mapping[str, Any]) -> str:
    """Write an environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def text(value: Any) -> str:
    """Write a value for a table, numbers with four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(plan: Callable[[Record], Iterable[Row]], record: Record, seconds: float) -> bool:
    """Measure the rows of a plan until the time is up; returns whether all were measured or tried.

    Args:
        plan: yields the rows in their order; it is asked for the next one when the one before is done, and may look
            at the record for its options.
        seconds: from now on. Rows that are under way then are stopped, and are the next call's.
    """
    deadline = time.monotonic() + seconds
    failed_before = set(record.failed)
    worker = Worker()
    try:
        for again in (False, True):  # what failed in an earlier call comes last
            for row in plan(record):
                if record.is_done(row) or (key_of(row) in failed_before) != again:
                    continue
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                print(f"{left:5.0f} s left: {key_of(row)}", flush=True)
                if row.alone:
                    worker.stop()
                why = worker.run(row, record, min(row.limit, left))
                if why and time.monotonic() >= deadline:
                    return False
                if why:
                    record.fail(row, why)
                    print(f"        not measured: {why.splitlines()[0]}", flush=True)
                if row.alone or (why and not why.startswith(OUT_OF_MEMORY)):
                    worker.stop()
    finally:
        worker.stop()
    return True


class Worker:
    """The process that measures; started when it is needed."""

    def __init__(self) -> None:
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None

    def run(self, row: Row, record: Record, seconds: float) -> str:
        """Measure a row and keep what it gives; returns why it did not come to its end, or nothing."""
        start = time.monotonic()
        if self.process is None or self.connection is None or not self.process.is_alive():
            context = get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs,))
            self.process.start()
            theirs.close()
        try:
            self.connection.send((row.function, dict(row.options)))
            while self.connection.poll(max(0.0, start + seconds - time.monotonic())):
                kind, *message = self.connection.recv()
                if kind == "row":
                    record.add(row.section, message[0] or row.name, message[1])
                elif kind == "done":
                    record.finish(row)
                    return ""
                else:
                    return str(message[0])
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            return f"its process ended with code {code}"
        self.stop()
        return f"took longer than {seconds:.0f} s"

    def stop(self) -> None:
        """End the process and all that it has started, in whatever session."""
        process, self.process = self.process, None
        if process is None or process.pid is None:
            return
        try:
            worker = psutil.Process(process.pid)
            family = [*worker.children(recursive=True), worker]
        except psutil.NoSuchProcess:
            family = []
        for member in family:
            end(member.terminate)
        _, left = psutil.wait_procs(family, GRACE)
        for member in left:
            end(member.kill)
        process.join()


def end(how: Callable[[], None]) -> None:
    """Signal a process that may have ended."""
    with suppress(psutil.NoSuchProcess):
        how()


def work(connection: Connection) -> None:
    """Measure what is asked for until the other end closes, or the process that asks has ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly end gives back locks and temporary files
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try:
            function, options = connection.recv()
        except EOFError:
            return
        try:
            result = function(**options)
            for name, values in [("", result)] if isinstance(result, Mapping) else result:
                connection.send(("row", name, values))
            del result
            clean_up()
            connection.send(("done",))
        except Exception as error:
            where = traceback.format_exc()[-STACK:]
            connection.send(("failed", f"{type(error).__name__}: {str(error).strip()[:300]}\n{where}"))
            del error
            with suppress(Exception):
                clean_up()


def clean_up() -> None:
    """Give back memory before the next row."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()


def end_with_parent() -> None:
    """Wait for the end of the process that asks, which may have been killed, and end all that this one has started."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    for child in psutil.Process().children(recursive=True):
        end(child.kill)
    os._exit(1)
