"""The form of a page: what tests would pass over is an error, with its line.

Blocks in other languages or fences, commands in indented text, comments that are no mark, failures that a shell hides.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.blocks import (
    MARK,
    OUTPUTS,
    RUNS,
    WORKSPACE,
    Block,
    blocks_of,
    commands_of,
    logical_lines,
    name_of,
    operators_of,
    prose_of,
)

SHOWN = ("bibtex", "json", "yaml")
"""Languages of blocks that are neither typed nor printed; others are files (the mark file)."""
INSERTED = re.compile(r"<!-- changelog: .+? -->$")
"""A comment that docs/generate_reference.py replaces."""
FENCE_BEHIND_A_SIGN = re.compile(r"\s*(?:>|[-*+] |\d+[.)] )[\s>]*(?:`{3,}|~{3,})")
INDENTED_COMMAND = re.compile(
    r"(?: {4,}|\t)\s*(?:\$ |\w+=\S* |(?:\S*/)?bin/)*(?:hyspark|python3?|make|torchrun|pip|git|cd) \S"
)
NEEDED = re.compile(
    r"GPU|SLURM|nnU-Net|network access|git checkout|weights|torchrun|BTCV|OpenKBP|TotalSegmentator|Dataset\d|COVID-CT|"
    r"\ba CT\b"
)
"""What a block that is not run may need. A new reason is a decision, and joins these."""
NO_REASON = re.compile(r"minute|hour|time|second|slow", re.IGNORECASE)
HIDES_FAILURES = ("&&", "||", "&")


def faults_of(page: Path) -> list[str]:
    """List what is wrong with the form of a page."""
    try:
        blocks = blocks_of(page)
    except ValueError as error:
        return [str(error)]
    found = [f"{name_of(page)}:{block.line - 1}: {wrong}" for block in blocks for wrong in wrong_block(block)]
    lines = prose_of(page).splitlines()
    marks = {line for block in blocks if block.mark for line in (block.line - 3, block.line - 4)}
    for number, line in enumerate(lines):
        for wrong in wrong_line(line, lines[number - 1] if number else "", is_marks_line=number in marks):
            found.append(f"{name_of(page)}:{number + 1}: {line.strip()!r}: {wrong}")
    if len(WORKSPACE.findall("\n".join(lines))) > 1:
        found.append(f"{name_of(page)}: two comments name a workspace; one names several")
    return found


def wrong_block(block: Block) -> Iterator[str]:
    """Yield what is wrong with the form of a block."""
    if not block.language:
        yield f"the fence names no language; sh is typed, {OUTPUTS} is output"
    elif block.language not in (*RUNS, *OUTPUTS, *SHOWN) and block.mark != "file":
        yield f"a block in {block.language} is not run: sh, python and pycon are"
    if block.mark == "needs" and (NO_REASON.search(block.argument) or not NEEDED.search(block.argument)):
        yield f"{block.argument!r} is no reason not to run a block"
    if block.mark == "exit" and (block.language != "sh" or len(commands_of(block)) != 1):
        yield "a block with an exit code has one command"
    if block.mark == "exit" and not block.argument.isdigit():
        yield f"{block.argument!r} is no exit code"
    if block.language == "sh" and block.mark in ("", "exit"):
        hidden = sorted({sign for _, text in logical_lines(block) for sign in operators_of(text)} & {*HIDES_FAILURES})
        yield from (f"{sign} hides failures; one command a line" for sign in hidden)
    if block.language == "python" and block.mark == "needs":
        try:
            compile(block.text, str(block.page), "exec")
        except SyntaxError as error:
            yield str(error)


def wrong_line(line: str, before: str, *, is_marks_line: bool) -> Iterator[str]:
    """Yield what is wrong with a line outside of blocks."""
    if FENCE_BEHIND_A_SIGN.match(line):
        yield "a block inside a list or quotation begins on a line of its own"
    if INDENTED_COMMAND.match(line) and not before.strip():
        yield "a command stands in a fenced block, not in indented text"
    if re.search(r"<(?:pre|script)\b", line):
        yield "a command stands in a fenced block, not in HTML"
    if "<!--" in re.sub(r"`[^`]*`", "", line):
        known = WORKSPACE.match(line) or INSERTED.match(line) or (is_marks_line and MARK.match(line))
        if not known:
            yield "no mark before a block (tests/docs/blocks.py)"
