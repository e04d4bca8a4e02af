"""Tables as aligned text and in Markdown; the first row is the heading."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


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
