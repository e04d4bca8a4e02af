"""Finished or running fine-tuning runs side by side, by the scores of their best validation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hyspark.evaluation.protocol import DATA_DIGEST, RUN_SCORES, has_score_files, read_summary
from hyspark.evaluation.score_table import read_score_table
from hyspark.evaluation.validations import Validations, read_validations
from hyspark.reports.run_page import dice_table
from hyspark.utils.tables import aligned_table


def runs_text(folders: Sequence[Path]) -> str:
    """Write the scores of runs side by side, and where their reports lie.

    Args:
        folders: Run folders, of segmentation or of classification.

    Raises:
        FileNotFoundError: A folder holds no validation.
        ValueError: The runs are of both kinds.
    """
    are_unique = len({folder.name for folder in folders}) == len(folders)
    found: dict[str, Validations] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected the folder of a fine-tuning run")
        validations = read_validations(folder)
        if not validations:
            raise FileNotFoundError(f"{folder}: expected a fine-tuning run that was validated, got no scores")
        found[folder.name if are_unique else str(folder)] = validations
    kinds = {name: validations.kind for name, validations in found.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"expected runs of one kind, got {', '.join(f'{n}: {kind}' for n, kind in kinds.items())}")
    columns = {name: validations.best for name, validations in found.items()}
    if set(kinds.values()) == {"segmentation"}:
        lines = [
            "Dice, best weights of each run, chosen by the mean Dice on these same cases, which is optimistic",
            dice_table(columns, difference=True),
        ]
    else:
        lines = [
            "Validation images, best weights of each run, chosen by the accuracy on these same images, which is "
            "optimistic",
            aligned_table(metric_columns(columns)),
        ]
    if not have_same_cases(folders):
        lines.append("WARNING: the runs were validated on different cases, so that these numbers cannot be compared")
    pairs = zip(found, folders, strict=True)
    for name, folder in pairs:
        pictures = f", pictures {folder / 'pictures'}" if (folder / "pictures").is_dir() else ""
        lines.append(f"{name}: report {folder / 'report.html'}{pictures}{other_scores(folder)}")
    return "\n".join(lines)


def other_scores(folder: Path) -> str:
    """Name the scores of a finished run with their weights, as its protocols describe them; empty without scores."""
    found = [name for name in RUN_SCORES if has_score_files(folder / name)]
    described = [(name, read_summary(folder / name)["protocol"].get("weights", "unknown")) for name in found]
    return "".join(f"; scores of {weights}: {folder / name}" for name, weights in described)


def metric_columns(columns: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Format a row per metric with a column per run, a heading first; "-" where there is no value."""
    metrics = dict.fromkeys(metric for column in columns.values() for metric in column)
    rows = [[m, *(f"{c[m]:.3f}" if m in c else "-" for c in columns.values())] for m in metrics]
    return [["metric", *columns], *rows]


def have_same_cases(folders: Sequence[Path]) -> bool:
    """Check that runs were validated on cases of the same names and content, as far as their scores name them.

    A run writes its scores at its end.
    """
    scores = [folder / "scores" for folder in folders if has_score_files(folder / "scores")]
    cases = {tuple(sorted(read_score_table(folder / "cases.csv").cases)) for folder in scores}
    digests = {read_summary(folder)["protocol"].get(DATA_DIGEST) for folder in scores}
    return len(cases) <= 1 and len(digests - {None}) <= 1
