"""Tables as aligned text and in Markdown, and those that users write as CSV; the first row is the heading."""

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from hyspark.utils.paths import read_text

Rows = Sequence[Sequence[str]]


class CsvTable(NamedTuple):
    """Content of a CSV file, without spaces around names and values.

    Attributes:
        columns: Names of the columns.
        rows: Values by the name of the column, for each line of the file that has some; a short row ends with "".
    """

    columns: list[str]
    rows: dict[int, dict[str, str]]


def read_csv(path: Path, known: Collection[str]) -> CsvTable:
    """Read a CSV file with a heading.

    Args:
        path: The file.
        known: Names of columns that are read; the same in capitals are an error, since they would be passed over.

    Raises:
        ValueError: The file is no UTF-8, a column is named twice or in capitals, or a row has more values than columns.
    """
    try:
        reader = csv.reader(read_text(path).splitlines(keepends=True))
        columns = [name.strip() for name in next(reader, [])]
        given = ((reader.line_num, [value.strip() for value in row]) for row in reader)
        lines = {line: row for line, row in given if any(row)}
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file in UTF-8, got another ({error}); save it as such") from error
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise ValueError(f"{path}: two columns are named {twice[0]}; rename one")
    if capitals := [name for name in columns if name.lower() in {*known} - {*columns}]:
        raise ValueError(f"{path}: expected the column {capitals[0].lower()}, got {capitals[0]}; rename it")
    for line, row in lines.items():
        if any(row[len(columns) :]):
            raise ValueError(
                f"{path}, line {line}: expected {len(columns)} values, got {len(row)}; put values with a comma in "
                "quotes, and write numbers with a point"
            )
    blank = dict.fromkeys(columns, "")
    return CsvTable(columns, {line: blank | dict(zip(columns, row, strict=False)) for line, row in lines.items()})


def aligned_table(rows: Rows) -> str:
    """Align the columns of a table with spaces, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(rows: Rows) -> str:
    """Write a table in Markdown, the first column to the left, the others to the right."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
