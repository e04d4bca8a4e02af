"""A shell in which a page's blocks are typed; programs of this project are answered by the test's own process."""

import os
import select
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.docs.blocks import ROOT, Block
from tests.docs.shortened import Reply, in_folder, typed_here

ANSWERED = ("hyspark", "python", "python3")
REFUSED = ("pip", "pip3", "git", "curl", "wget", "conda", "torchrun", "docker", "sudo", "sbatch", "srun")
ASK = """#!/bin/bash
id=$BASHPID
printf '%s\\0' "$(basename "$0")" "$@" >"$ASKED/$id.words"
env -0 >"$ASKED/$id.env"
[ "$1" = - ] && cat >"$ASKED/$id.in"
mkfifo "$ASKED/$id.reply"
echo "asked $id $PWD" >"$ASKED/events"
read -r code <"$ASKED/$id.reply"
cat "$ASKED/$id.out" || true
cat "$ASKED/$id.err" >&2 || true
exit "$code"
"""
"""A program that hands its words, variables and input to the test, and prints its reply."""
REFUSE = """#!/bin/bash
echo "$(basename "$0"): not run by this test; mark the block, <!-- needs: ... --> or <!-- slow -->" >&2
exit 97
"""
MAKE = """#!/bin/bash
if [ "$TYPED_SLOW" ]; then exec /usr/bin/make "$@"; fi
for word in "$@"; do
  case "$word" in *=*) ;; *) grep -q "^$word:" Makefile || { echo "make: no target $word" >&2; exit 2; } ;; esac
done
"""
"""make, which runs in slow blocks alone; elsewhere its targets have to exist."""
LOOP = """
set -o pipefail
caught() { echo "failed $1 $2" >"$ASKED/events"; exit 1; }
while read -r file expected slow <"$ASKED/go"; do
  if [ "$expected" = 0 ]; then set -E; trap 'caught $LINENO $?' ERR; else set +E; trap - ERR; fi
  TYPED_SLOW=$slow
  source "$file"
  code=$?
  trap - ERR
  if [ "$code" = "$expected" ]; then echo done >"$ASKED/events"; else caught 0 "$code"; fi
done
"""


class Shell:
    """A shell in a page's folder, which keeps variables and its folder from block to block.

    Args:
        folder: Folder to begin in.
        own: Folder for the files of the shell itself.
        as_typed: Run the programs themselves, in processes of their own, and nothing shortened.
    """

    def __init__(self, folder: Path, own: Path, as_typed: bool = False) -> None:
        self.own = own
        programs = own / "bin"
        programs.mkdir(parents=True)
        home = own / "home"
        home.mkdir()
        texts = dict.fromkeys(REFUSED, REFUSE) | {"make": MAKE}
        if as_typed:
            del texts["torchrun"]
        else:
            texts |= dict.fromkeys(ANSWERED, ASK)
        for name, text in texts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        for name in ("events", "go"):
            os.mkfifo(own / name)
        path = [str(programs), *([str(Path(sys.executable).parent)] if as_typed else []), "/usr/bin", "/bin"]
        variables = {**os.environ, "PATH": os.pathsep.join(path), "HOME": str(home), "ASKED": str(own)}
        variables |= {
            "PYTHONPATH": str(ROOT),
            "MAKEFLAGS": f"BIN={Path(sys.executable).parent} INSTALLED=pyproject.toml",
        }
        self.log = own / "log.txt"
        self.failed: list[str] = []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "--norc", "-c", LOOP],
                cwd=folder,
                env={name: value for name, value in variables.items() if name != "XDG_CONFIG_HOME"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.events = os.open(own / "events", os.O_RDWR)
        self.go = os.open(own / "go", os.O_RDWR)

    def type_block(self, block: Block) -> None:
        """Type a block.

        Raises:
            AssertionError: A command fails; the message names page, line and output.
        """
        expected = int(block.argument) if block.mark == "exit" else 0
        file = self.own / f"block_{block.line}.sh"
        file.write_text("\n" * (block.line - 1) + block.text)
        begun = self.log.stat().st_size
        self.failed.clear()
        os.write(self.go, f"{shlex.quote(str(file))} {expected} {'1' if block.mark == 'slow' else ''}\n".encode())
        while (event := self.next_event()) != "done" or (self.failed and not expected):
            kind, _, rest = event.partition(" ")
            if kind == "asked":
                self.answer(*rest.split(" ", 1))
                continue
            line, code = rest.split() if rest else ("0", "0, though it failed: " + "; ".join(self.failed))
            printed = self.log.read_text(errors="replace")[begun:].splitlines()
            where = block.page.name if line == "0" else f"{block.name.rpartition(':')[0]}:{line}"
            raise AssertionError(f"{where}: exit code {code}, expected {expected}\n" + "\n".join(printed[-25:]))

    def next_event(self) -> str:
        """Wait for what the shell, or a program in it, says next."""
        while True:
            if select.select([self.events], [], [], 0.5)[0]:
                line = b""
                while not line.endswith(b"\n"):
                    line += os.read(self.events, 1)
                return line.decode().rstrip("\n")
            if self.process.poll() is not None:
                return f"failed 0 {self.process.returncode}"

    def answer(self, number: str, folder: str, run: Callable[..., Reply] = typed_here) -> None:
        """Run a program in this process and hand its output to the shell."""
        files = self.own / number
        words = files.with_suffix(".words").read_text().split("\0")[:-1]
        pairs = files.with_suffix(".env").read_text().split("\0")[:-1]
        variables = dict(pair.partition("=")[::2] for pair in pairs)
        given = files.with_suffix(".in")
        with in_folder(Path(folder), variables):
            reply = run(words, given.read_text() if given.exists() else "")
        if reply.code:
            self.failed.append(" ".join(words))
        files.with_suffix(".out").write_text(reply.out)
        files.with_suffix(".err").write_text(reply.err)
        files.with_suffix(".reply").write_text(f"{reply.code}\n")

    def close(self) -> None:
        """End the shell."""
        self.process.kill()
        self.process.wait()
        os.close(self.events)
        os.close(self.go)
