"""The report of a probe: its scores as Markdown and JSON, and a picture of the vectors."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from hyspark.evaluation.embedding.probe import HEADS, PROBE_METRICS
from hyspark.evaluation.embedding.probe_data import Picture, ProbeData, ProbeOptions
from hyspark.evaluation.protocol import protocol_text
from hyspark.figures.panels import save_figure
from hyspark.figures.projection import projection_figure
from hyspark.utils.atomic import write_json, write_whole
from hyspark.utils.install import extra_error
from hyspark.utils.tables import markdown_table

PROBE_STEM = "probe"


def write_probe(
    out: Path, options: ProbeOptions, data: ProbeData, vectors: np.ndarray, found: Mapping[str, Any], settings: Any
) -> dict[str, Any]:
    """Write probe.json, probe.png and probe.md.

    Args:
        out: Folder to write to.
        options: The probe.
        data: The labelled vectors.
        vectors: Rows of the table of vectors.
        found: The scores of `probe_vectors`.
        settings: What the vectors were made with.

    Returns:
        The content of probe.json.
    """
    counts = {name: int((data.truth == number).sum()) for number, name in enumerate(data.classes)}
    content = {
        "target": options.target,
        "classes": counts,
        "protocol": data.protocol,
        "num_scored": len(data.scored),
        "num_scored_patients": len(set(data.patients[data.scored])),
        "features": list(options.features),
        "picture": options.picture,
        **found,
        "settings": settings,
    }
    write_json(out / f"{PROBE_STEM}.json", content)
    points = projected(vectors[data.positions], options.picture)
    title, axes = options.target, {"pca": "principal component", "umap": "UMAP"}[options.picture]
    save_figure(projection_figure(points, data.truth, data.classes, title, axes), out / f"{PROBE_STEM}.png")
    write_whole(out / f"{PROBE_STEM}.md", probe_page(content).encode("utf-8", "surrogateescape"))
    return content


def probe_page(content: Mapping[str, Any]) -> str:
    """Write the report in Markdown."""
    counts = ", ".join(f"{name} ({num})" for name, num in content["classes"].items())
    parts = [
        f"# Probe of {content['target']}",
        f"Classes: {counts}. Scored are {content['num_scored']} vectors of {content['num_scored_patients']} patients, "
        f"by {content['protocol']}.",
        f"![Vectors, coloured by {content['target']}](probe.png)",
        "## Scores",
        markdown_table(score_rows(content["rows"])),
    ]
    if content["differences"]:
        parts += ["## Differences", markdown_table(difference_rows(content["differences"]))]
    parts += [
        "In brackets is the 95 % bootstrap interval over patients, pairs kept, and over the seeds of random weights; "
        "bold where that of a difference excludes 0. Classifiers are not fitted anew in a resample. Standardisation "
        "and regularisation (or the number of neighbours) are of the training part alone; no patient is on both sides.",
        *([f"Features are the columns {', '.join(content['features'])}."] if content["features"] else []),
        f"Vectors: {protocol_text(content['settings'])}.",
    ]
    return "\n\n".join(parts) + "\n"


def score_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Format the scores, a row for each head and input."""
    heading = ["input", "classifier", *PROBE_METRICS.values()]
    body = [
        [input_text(row), HEADS[row["head"]].title, *(estimate_text(row[metric]) for metric in PROBE_METRICS)]
        for row in rows
    ]
    return [heading, *body]


def difference_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Format the differences, a row for each head and pair of inputs."""
    heading = ["difference", "classifier", *PROBE_METRICS.values()]
    body = [
        [
            f"{row['input']} minus {row['minus']}",
            HEADS[row["head"]].title,
            *(estimate_text(row[metric], is_difference=True) for metric in PROBE_METRICS),
        ]
        for row in rows
    ]
    return [heading, *body]


def input_text(row: Mapping[str, Any]) -> str:
    """Name the input of a classifier, with the number of seeds if there are several."""
    return f"{row['input']} ({row['seeds']} seeds)" if row["seeds"] > 1 else str(row["input"])


def estimate_text(estimate: Mapping[str, float], *, is_difference: bool = False) -> str:
    """Write a mean with its interval, a difference with signs and in bold if the interval excludes 0."""
    mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
    if not np.isfinite([mean, low, high]).all():
        return f"{mean:{'+' if is_difference else ''}.3f}" if np.isfinite(mean) else "-"
    if not is_difference:
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    text = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def projected(vectors: np.ndarray, picture: Picture) -> np.ndarray:
    """Project standardised vectors to two dimensions, (n, 2).

    Raises:
        ModuleNotFoundError: UMAP is asked for, and not installed.
    """
    x = StandardScaler().fit_transform(vectors.astype(float))
    if picture == "umap":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its threads, where a seed is set
            found: np.ndarray = import_umap().UMAP(random_state=0).fit_transform(x)
            return found
    points: np.ndarray = PCA(min(2, *x.shape), random_state=0).fit_transform(x)
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def import_umap() -> Any:
    """Import umap-learn; raise ModuleNotFoundError with the command that installs it."""
    try:
        import umap
    except ImportError as error:
        raise extra_error(error, "--picture umap needs umap-learn", "umap", "umap") from error
    return umap
