"""Fenced blocks of the pages, with their marks; `python -m tests.docs.blocks` prints how many commands are run.

A block in `sh` is typed by users; `python` and `pycon` run; `console` and `text` show what is printed. An HTML comment
on the line before a block is its mark:

    none                    the fast test runs the block, with trainings shortened to one step of a tiny network
    <!-- slow -->           `pytest -m slow` runs the page as it stands
    <!-- needs: 4 GPUs -->  not run; verbs, flags and recipes are checked
    <!-- exit: 1 -->        the block, one command, is run and ends with this exit code
    <!-- file: my_nets.py -->  the block, in any language, is written to this file, as a user does in an editor

`<!-- workspace: labelled pretrained -->`, once on a page, names what lies in its folder beforehand (workspaces.py).
A page in any other form is an error (page_form.py): nothing is passed over.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = ("README.md", "CONTRIBUTING.md", "data/README.md", "ckpt/README.md")
RUNS = ("sh", "python", "pycon")
OUTPUTS = ("console", "text")
SCRIPTS = {"generate_js.py": "datalist", "train.py": "pretrain", "finetune_btcv.py": "finetune"}
"""Scripts at the top level, with their verbs."""
MARK = re.compile(r"\s*<!--\s*(?:(slow)|(needs|exit|file):\s*(.+?))\s*-->\s*$")
WORKSPACE = re.compile(r"^\s*<!--\s*workspace:\s*(.*?)\s*-->\s*$", re.MULTILINE)
FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*(\S*)")
KEYWORDS = {"do", "then", "else", "time", "!", "done", "fi", "exec", "$"}
STARTERS = ("srun", "nohup", "nice", "env", "sudo", "taskset", "numactl")
"""Programs that start the command behind them."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Its file.
        line: Line of the page on which its text begins.
        language: Word behind the fence.
        text: Its lines, without the indentation of the fence.
        mark: slow, needs, exit, file or empty.
        argument: What stands behind the mark's colon.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    argument: str = ""

    @property
    def name(self) -> str:
        """Page and line, for messages."""
        return f"{name_of(self.page)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command that a page shows: its line, and its words without redirections."""

    page: Path
    line: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Page, line and command, for messages."""
        return f"{name_of(self.page)}:{self.line}: {' '.join(self.words)}"


def name_of(page: Path) -> str:
    """Write the path of a page in the checkout."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else str(page)


def pages() -> list[Path]:
    """List the pages whose commands are held to work."""
    return [ROOT / name for name in NAMED if (ROOT / name).is_file()] + sorted((ROOT / "docs").rglob("*.md"))


def blocks_of(page: Path) -> list[Block]:
    """Find the fenced blocks of a page.

    Raises:
        ValueError: A fence is not closed, or a comment before a block that runs is no mark.
    """
    lines = page.read_text().splitlines()
    found: list[Block] = []
    start, indent, fence, language = -1, "", "", ""
    for number, line in enumerate(lines):
        if start < 0:
            if opened := FENCE.match(line):
                start, (indent, fence, language) = number, opened.groups()
        elif line.strip() == fence[0] * max(len(fence), len(line.strip())):
            text = "".join(f"{one.removeprefix(indent)}\n" for one in lines[start + 1 : number])
            before = next((lines[i] for i in (start - 1, start - 2) if i >= 0 and lines[i].strip()), "")
            mark = MARK.match(before)
            if before.strip().startswith("<!--") and not mark and language in RUNS and not WORKSPACE.match(before):
                raise ValueError(f"{name_of(page)}:{start}: {before.strip()!r}: no mark (tests/docs/blocks.py)")
            kind, argument = ((mark[1] or mark[2]), mark[3] or "") if mark else ("", "")
            found.append(Block(page, start + 2, language, text, kind, argument))
            start = -1
    if start >= 0:
        raise ValueError(f"{name_of(page)}:{start + 1}: the block has no end")
    return found


def prose_of(page: Path) -> str:
    """Return the text of a page with its fenced blocks blank, so that line numbers stay."""
    lines = page.read_text().splitlines()
    for block in blocks_of(page):
        for number in range(block.line - 2, block.line + block.text.count("\n")):
            lines[number] = ""
    return "\n".join(lines) + "\n"


def workspaces_of(page: Path) -> list[str]:
    """List the workspaces that a page names."""
    return [name for names in WORKSPACE.findall(page.read_text()) for name in re.split(r"[\s,]+", names)]


def commands_of(block: Block) -> list[Command]:
    """List the commands of a block in `sh`, and those behind a $ in what a terminal shows."""
    if block.language not in ("sh", *OUTPUTS):
        return []
    return [
        Command(block.page, block.line + number, tuple(words))
        for number, text in logical_lines(block)
        for words in simple_commands(text)
    ]


def logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """Yield typed lines, continued ones joined, without here-documents; each with its number in the block."""
    end, joined, first = "", "", 0
    for number, line in enumerate(block.text.splitlines()):
        if end:
            end = "" if line.strip() == end else end
            continue
        if block.language in OUTPUTS:
            continued = bool(joined)
            if not line.startswith("$ ") and not continued:
                continue
            line = line.removeprefix("$ ").removeprefix("> ")
        first = first if joined else number
        if line.endswith("\\"):
            joined += line[:-1] + " "
            continue
        text, joined = joined + line, ""
        if document := re.search(r"<<-?\s*['\"]?(\w+)", text):
            end, text = document[1], text[: document.start()]
        yield first, text


def simple_commands(text: str) -> list[list[str]]:
    """Split a typed line into the words of its commands."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();|&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    try:
        for word in lexer:
            if set(word) <= set("();|&"):
                found.append([])
            elif found[-1] or not (word in KEYWORDS or re.match(r"\w+=", word)):
                found[-1].append(word)
    except ValueError as error:
        raise ValueError(f"{error}: {text}") from error
    return [without_redirections(words) for words in found if words and words[0] not in ("for", "while", "if", "case")]


def operators_of(text: str) -> set[str]:
    """Return the operators between the commands of a typed line."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();|&<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return {word for word in lexer if set(word) <= set("();|&")}


def without_redirections(words: list[str]) -> list[str]:
    """Drop `> file`, `2>&1` and the like."""
    kept, skip = [], False
    for word in words:
        operator = re.match(r"(\d?>>?|<|&>)(.*)", word)
        if not operator and not skip:
            kept.append(word)
        skip = bool(operator) and not operator[2]
    return kept


def verb_and_flags(words: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """Find the verb that a command calls, and the words behind it; None for other programs."""
    for at, word in enumerate(words):
        name = word.rpartition("/")[2]
        if name in SCRIPTS and at:
            return SCRIPTS[name], list(words[at + 1 :])
        called = name == "hyspark" and (at == 0 or words[at - 1] == "-m" or words[0] in STARTERS)
        if called and at + 1 < len(words):
            return words[at + 1], list(words[at + 2 :])
    return None


def summary() -> str:
    """Write how many commands the pages show, and how many are run."""
    counts = {"fast": 0, "slow": 0, "needs": 0, "make": 0}
    reasons: dict[str, int] = {}
    python = 0
    for block in (block for page in pages() for block in blocks_of(page)):
        if block.language == "sh":
            for command in commands_of(block):
                kind = "fast" if block.mark in ("", "exit") else block.mark
                kind = "make" if kind == "fast" and command.words[0] == "make" else kind
                counts[kind] += 1
                if kind == "needs":
                    reasons[block.argument] = reasons.get(block.argument, 0) + 1
        elif block.language in RUNS:
            python += block.mark not in ("needs", "slow")
    text = f"{len(pages())} pages, {sum(counts.values())} commands: {counts['fast']} run by the fast test, "
    text += f"{counts['slow']} by the slow one, {counts['make']} of make alone have their targets checked, "
    text += f"{counts['needs']} not run; {python} blocks of Python run"
    return "\n".join([text, *(f"  needs {reason}: {num}" for reason, num in sorted(reasons.items()))])


if __name__ == "__main__":
    print(summary())
