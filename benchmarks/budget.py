"""Rows measured within a budget of time: each is kept as soon as it is there, and the next call does the rest.

The rows are measured one after the other in a worker process, which is ended where a row takes too long or breaks the
device, so that neither costs the rows behind it. Nothing here imports torch: it is the worker's to wait for that.
"""

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]
GRACE = 3.0
"""Seconds that a worker has to end its own children."""
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
    """What was measured so far, in a folder: `NAME.json`, and `NAME.md` for reading."""

    def __init__(self, folder: Path, name: str) -> None:
        self.json, self.markdown = folder / f"{name}.json", folder / f"{name}.md"
        known = json.loads(self.json.read_text()) if self.json.is_file() else {}
        self.environment: dict[str, Any] = known.get("environment", {})
        self.rows: dict[str, dict[str, dict[str, Any]]] = known.get("rows", {})
        self.finished: list[str] = known.get("finished", [])
        self.failed: dict[str, str] = {}

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Note where it is measured.

        Raises:
            ValueError: the folder holds rows of another machine.
        """
        if self.rows and self.environment != environment:
            raise ValueError(
                f"{self.json} holds rows of another machine; name another folder (--out):\n"
                f"  there: {line_of(self.environment)}\n  here:  {line_of(environment)}"
            )
        self.environment = dict(environment)
        self.write()

    def get(self, section: str, name: str, column: str) -> Any:
        """A value that was measured, None where there is none."""
        return self.rows.get(section, {}).get(name, {}).get(column)

    def is_done(self, row: Row) -> bool:
        """Whether a row, or all rows that its function yields, were measured."""
        return key_of(row) in self.finished

    def add(self, section: str, name: str, values: Values) -> None:
        """Keep a row."""
        self.rows.setdefault(section, {})[name] = dict(values)
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
        known = {"environment": self.environment, "rows": self.rows, "finished": self.finished, "failed": self.failed}
        self.json.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((self.json, json.dumps(known, indent=1)), (self.markdown, self.as_markdown())):
            new = path.with_name(f".{path.name}.new")
            new.write_text(text + "\n")
            os.replace(new, path)

    def as_markdown(self) -> str:
        """A table for each section, and what could not be measured."""
        lines = [line_of(self.environment)]
        for section, rows in self.rows.items():
            columns = list(dict.fromkeys(column for values in rows.values() for column in values))
            lines += ["", f"### {section}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
            lines += [
                f"| {name} | {' | '.join(text(values.get(c)) for c in columns)} |" for name, values in rows.items()
            ]
        if self.failed:
            lines += [
                "",
                "### Not measured",
                "",
                *(f"- {key}: {why.splitlines()[0]}" for key, why in self.failed.items()),
            ]
        return "\n".join(lines)


def key_of(row: Row) -> str:
    """The row's name with its section."""
    return f"{row.section}: {row.name}"


def line_of(environment: Mapping[str, Any]) -> str:
    """The environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def text(value: Any) -> str:
    """A value for a table: four significant digits."""
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
    worker = Worker()
    try:
        for row in plan(record):
            if record.is_done(row):
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
            if row.alone:
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
        """End the process and what it started."""
        process, self.process = self.process, None
        if process is None or process.pid is None:
            return
        for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):  # it has ended, or has no group of its own yet
                process.kill()
            process.join(wait)


def work(connection: Connection) -> None:
    """Measure what is asked for, in a process group of its own, until the other end closes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly end gives back locks and temporary files
    while True:
        try:
            function, options = connection.recv()
        except EOFError:
            return
        try:
            result = function(**options)
            for name, values in [("", result)] if isinstance(result, Mapping) else result:
                connection.send(("row", name, values))
            connection.send(("done",))
        except Exception as error:
            where = traceback.format_exc()[-STACK:]
            connection.send(("failed", f"{type(error).__name__}: {str(error).strip()[:300]}\n{where}"))
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()
