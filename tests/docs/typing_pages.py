"""A page's blocks in order, in one folder: commands in a shell, Python in one namespace."""

import contextlib
import doctest
import io
import re
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.docs.blocks import RUNS, Block, blocks_of, workspaces_of
from tests.docs.page_form import faults_of
from tests.docs.shortened import in_folder, one_step
from tests.docs.typing_shell import Shell
from tests.docs.workspaces import fill


def type_page(page: Path, folder: Path, cache: Path, *, as_typed: bool = False) -> None:
    """Type a page's blocks.

    Args:
        page: The page.
        folder: New folder, which is filled with the page's workspaces.
        cache: Folder of the workspaces.
        as_typed: Run slow blocks too, and shorten no training.

    Raises:
        AssertionError: A command fails, or the page has a form in which it would be passed over.
    """
    assert not (faults := faults_of(page)), "\n".join(faults)
    here = folder / "checkout"
    with FileLock(f"{cache}.lock"):
        fill(here, workspaces_of(page), cache)
    shell = Shell(here, folder / "shell", as_typed)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in blocks_of(page):
            if block.mark == "file":
                (here / block.argument).parent.mkdir(parents=True, exist_ok=True)
                (here / block.argument).write_text(block.text)
            elif block.language not in RUNS or block.mark == "needs" or (block.mark == "slow" and not as_typed):
                continue
            elif block.language == "sh":
                shell.type_block(block)
            else:
                run_python(block, here, names, as_typed)
    finally:
        shell.close()


def run_python(block: Block, folder: Path, names: dict[str, Any], as_typed: bool) -> None:
    """Run a block of Python in the namespace of its page; crops of 96 voxels become 32 where trainings are shortened.

    Raises:
        AssertionError: It fails, or an example in `pycon` prints something else.
    """
    text = block.text if as_typed else re.sub(r"\b96\b", "32", block.text)
    parts = [(0, text, "")]
    if block.language == "pycon":
        examples = doctest.DocTestParser().get_examples(text)
        parts = [(example.lineno, example.source, example.want) for example in examples]
    mode = "single" if block.language == "pycon" else "exec"
    printed = io.StringIO()
    quiet = contextlib.nullcontext() if as_typed else one_step()
    with in_folder(folder), quiet, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        sys.path.insert(0, str(folder))
        for line, source, want in parts:
            begun = len(printed.getvalue())
            code = "\n" * (block.line + line - 1) + source
            try:
                exec(compile(code, str(block.page), mode), names)
            except (Exception, SystemExit) as error:
                tail = "\n".join(printed.getvalue().splitlines()[-25:])
                raise AssertionError(f"{block.name}: {type(error).__name__}: {error}\n{tail}") from error
            got = printed.getvalue()[begun:]
            same = doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            if block.language == "pycon" and not same:
                raise AssertionError(
                    f"{block.name.rpartition(':')[0]}:{block.line + line}: printed {got!r}, not {want!r}"
                )
