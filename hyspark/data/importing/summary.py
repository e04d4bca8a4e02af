"""What an import did, for the terminal: counts, reasons, notes, and the commands to type next."""

import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hyspark.data.importing.imported import Imported
from hyspark.data.importing.record import LABEL_FOLDER, SERIES_FILE
from hyspark.utils.text import count_of

MAX_LINES = 5
"""Lines of a kind that the terminal shows."""
INTENSITY = {"CT": "", "PT": " --intensity none"}
"""Flag for images of a channel; the flag of MR for all others."""


def summarise_import(result: Imported, salt_file: Path) -> str:
    """Summarise an import in a few lines."""
    patients = {case.entry["patient"] for case in result.cases}
    lines = [
        f"{count_of(len(result.cases), 'scan')} of {count_of(len(patients), 'patient')} in {result.out}, channel "
        f"{result.channel!r}; excluded: {len(result.excluded)}; failed: {len(result.failed)}; every series: "
        f"{result.out / SERIES_FILE}"
    ]
    lines += grouped("excluded", result.excluded)
    lines += grouped("notes", result.notes)
    if others := result.found.others:
        kinds = [f"{num} {kind} (e.g. {result.found.other_files[kind][0]})" for kind, num in sorted(others.items())]
        lines.append("files of other kinds: " + ", ".join(kinds))
    if not re.fullmatch(r"Dataset\d{3}_\w+", result.out.name, re.ASCII):
        lines.append(f"{result.out.name}: nnU-Net expects a name like Dataset042_Mine")
    lines += [
        f"ids are hashed with the salt in {salt_file}: keep it to continue, and keep it to yourself",
        "scans of a head may show a face, and pixels may hold text: look before you pass them on",
    ]
    return "\n".join(lines)


def grouped(title: str, items: Sequence[tuple[str, str]]) -> list[str]:
    """List reasons, each with the number of sources and an example; reasons that differ in numbers alone are one."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for source, why in items:
        groups["".join("#" if c.isdigit() else c for c in why.split(" (")[0].split(", e.g.")[0])].append((source, why))
    ranked = sorted(groups.values(), key=len, reverse=True)
    lines = [
        f"  {len(group)} x {group[0][1]}: {group[0][0]}" if group[1:] else f"  {group[0][0]}: {group[0][1]}"
        for group in ranked[:MAX_LINES]
    ]
    more = [f"  and {len(ranked) - MAX_LINES} more reasons"] if len(ranked) > MAX_LINES else []
    return [f"{title}:", *lines, *more] if lines else []


def next_commands(result: Imported) -> list[str]:
    """Return the commands to type after an import."""
    out = shlex.quote(os_path(result.out))
    flag = INTENSITY.get(result.channel, " --intensity mr")
    name = result.out.name.lower()
    commands = [
        f"hyspark check {out} --out {shlex.quote(f'check/{name}')}{flag}",
        f"hyspark pretrain --data {out} --out {shlex.quote(f'ckpt/{name}')}{flag}",
    ]
    if any((result.out / LABEL_FOLDER).glob("*.nii.gz")):
        commands.append(f"hyspark finetune --data {out} --out {shlex.quote(f'ckpt/{name}_labels')}{flag}")
    return commands


def os_path(path: Path) -> str:
    """Return a path relative to the working folder if it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
