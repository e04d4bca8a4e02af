"""What the search of a folder or list of data found: cases, faults of names and lists, and files that are not used."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hyspark.data.datasets.cases import Case
from hyspark.data.quality.findings import Finding
from hyspark.utils.log import LOG
from hyspark.utils.text import listing

UNREADABLE = "unreadable list"
"""Kind of finding whose text says what is expected."""
MAX_NAMED = 5
"""Files that a line on unused files names."""


@dataclass
class DataSet:
    """One data set of a folder.

    Attributes:
        folder: its folder, which may hold dataset.json and a splits file.
        cases: its cases, by name.
    """

    folder: Path
    cases: list[Case] = field(default_factory=list)


@dataclass
class FoundData:
    """The result of a search for cases.

    Attributes:
        source: the folder or list.
        sets: data sets with their cases; a list is one of them.
        findings: faults of names, folders and lists; those of kind error forbid strict use.
        unused: files that are passed over, by kind of finding and reason.
        classes: label values by class name, where they have been read.
    """

    source: Path
    sets: list[DataSet] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unused: dict[tuple[str, str], list[Path]] = field(default_factory=dict)
    classes: dict[str, int] | None = None

    @property
    def cases(self) -> list[Case]:
        """All cases, by data set and name."""
        return [case for one in self.sets for case in one.cases]

    def pass_over(self, kind: str, reason: str, file: Path) -> None:
        """Add a file that is not used."""
        self.unused.setdefault((kind, reason), []).append(file)

    def unused_findings(self) -> list[Finding]:
        """Return a finding for each reason that files are not used for."""
        return [
            Finding(kind, str(files[0]), f"{reason}; {len(files)} files: {self.named(files)}" if files[1:] else reason)
            for (kind, reason), files in sorted(self.unused.items())
        ]

    def unused_lines(self) -> list[str]:
        """Return a line for the terminal for each reason that files are not used for."""
        return [
            f"{self.source}: {len(files)} file{'s' * (len(files) > 1)} not used, {reason}: {self.named(files)}"
            for (_, reason), files in sorted(self.unused.items())
        ]

    def named(self, files: Collection[Path]) -> str:
        """Name the first few files, by their paths below the source."""
        below = (file.relative_to(self.source) if file.is_relative_to(self.source) else file for file in files)
        return listing(map(str, below), MAX_NAMED)

    def check(self, ignored_kinds: Collection[str] = ()) -> None:
        """Raise ValueError with all errors among the findings, except those of some kinds."""
        errors = [f for f in self.findings if f.severity == "error" and f.kind not in ignored_kinds]
        if errors:
            raise ValueError("\n".join(f"{f.file}: {f.found}" if f.kind == UNREADABLE else str(f) for f in errors))

    def add_unreadable(self, file: Path, error: str | Exception) -> None:
        """Add a finding that a list or dataset.json is no such file, from a text that may begin with its path."""
        self.findings.append(
            Finding(UNREADABLE, str(file), str(error).removeprefix(f"{file}: ").removeprefix(f"{file} "))
        )


def log_unused(lines: Iterable[str]) -> None:
    """Log lines on files that are not used."""
    for line in lines:
        LOG.info("%s", line)
