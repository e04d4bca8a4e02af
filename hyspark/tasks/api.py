"""The verbs as Python functions: settings are keyword arguments, the code is that of the command line.

Each function returns paths and tables, for a notebook. Logs go to the error stream, as on the command line.

Work that takes processes imports a script anew in each of them. Calls in a script therefore stand below
`if __name__ == "__main__":`; a notebook or an interactive session needs no such line.
"""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from hyspark.config.checks import one_of
from hyspark.config.classification import ClassificationConfig
from hyspark.config.nnunet import plan_defaults
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import read_yaml, typed_values
from hyspark.config.segmentation import SegmentationConfig
from hyspark.config.shared import RunSettings
from hyspark.evaluation.classification.evaluate import evaluate_classification
from hyspark.evaluation.classification.predict import predict_classification
from hyspark.evaluation.network_kind import NetworkKind, kind_of_network
from hyspark.evaluation.protocol import FAILED, unscored_cases
from hyspark.evaluation.score_table import read_score_table
from hyspark.evaluation.segmentation.evaluate import evaluate_segmentation
from hyspark.evaluation.segmentation.predict import predict_segmentation
from hyspark.evaluation.segmentation.scoring_protocol import Scoring
from hyspark.models.weights.hub_address import local_path
from hyspark.tasks.classification import run_classification
from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.python_words import in_python_words
from hyspark.tasks.segmentation import run_segmentation
from hyspark.training.metrics_log import read_metrics
from hyspark.training.run_folder import encoder_file
from hyspark.utils.text import nearest

StrPath = str | os.PathLike[str]
WINDOWING = ("overlap", "flips", "largest_component", "memory")
"""Options of segmenting a volume, fields of `Scoring`."""
SCORING = (*WINDOWING, "tolerance")
"""Options of scoring, fields of `Scoring`."""
DEVICES = get_args(get_type_hints(RunSettings)["device"])


@dataclass(frozen=True)
class TrainingRun:
    """A finished training run.

    Attributes:
        folder: Run folder.
        weights: Weights to continue with: those of the pre-trained encoder, or of the fine-tuned network (best.pth).
        report: HTML page of the run.
    """

    folder: Path
    weights: Path
    report: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, one per logged step or validation; a table for pandas.DataFrame."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def scores(self) -> list[dict[str, str | float]]:
        """Scores of the validation cases after a fine-tuning, as in `Evaluation.table`; empty after pre-training."""
        path = self.folder / "scores" / "cases.csv"
        return read_score_table(path).rows() if path.is_file() else []

    @property
    def failures(self) -> dict[str, str]:
        """Reasons of validation and test cases that were not scored, as FOLDER/CASE; empty if all were."""
        return unscored_cases(self.folder)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a network on labelled cases.

    Attributes:
        folder: Folder of the scores: cases.csv, summary.json, and tables or pictures.
        summary: Content of summary.json: protocol and means.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def failures(self) -> dict[str, str]:
        """Reasons of the cases that were not scored, by case."""
        return dict(self.summary.get(FAILED, {}))

    @property
    def table(self) -> list[dict[str, str | float]]:
        """Scores, a row each with case, target, metric and value; a table for pandas.DataFrame."""
        return read_score_table(self.folder / "cases.csv").rows()


@dataclass(frozen=True)
class Predictions:
    """Predictions of a network.

    Attributes:
        files: Label maps in the order of the volumes; for a classifier, predictions.csv alone.
        failures: Reason for each volume without a prediction, by case.
    """

    files: list[Path]
    failures: dict[str, str]


@in_python_words
def pretrain(config: StrPath | None = None, **settings: Any) -> TrainingRun:
    """Pre-train a network on unlabelled CT or MR, as `hyspark pretrain` does; the same call continues a run.

    Args:
        config: YAML recipe.
        **settings: Settings over those of the recipe, named as the flags: data="data", out="ckpt/ct", epochs=20.

    Returns:
        The finished run, whose `weights` are the encoder's.

    Raises:
        ValueError: A setting is unknown or does not fit.
        FileNotFoundError: Data or weights are missing.
        FloatingPointError: The loss is not finite.
    """
    check_caller()
    given = merge_settings(PretrainConfig, config, settings)
    values = PretrainConfig(**plan_defaults(given, given) | given)
    folder = run_pretraining(values)
    return TrainingRun(folder, encoder_file(values), folder / "report.html")


@in_python_words
def finetune(
    config: StrPath | None = None,
    *,
    task: Literal["segmentation", "classification"] = "segmentation",
    **settings: Any,
) -> TrainingRun:
    """Fine-tune a network on labelled data, as `hyspark finetune` and `finetune-classifier` do.

    Args:
        config: YAML recipe.
        task: "segmentation" of volumes, or "classification" of images.
        **settings: Settings over those of the recipe, named as the flags.

    Returns:
        The finished run, whose `weights` are those of the best validation.

    Raises:
        ValueError: A setting is unknown or does not fit.
        FileNotFoundError: Data or weights are missing.
        FloatingPointError: The loss is not finite.
    """
    check_caller()
    if task == "segmentation":
        folder = run_segmentation(SegmentationConfig(**merge_settings(SegmentationConfig, config, settings)))
    elif task == "classification":
        folder = run_classification(ClassificationConfig(**merge_settings(ClassificationConfig, config, settings)))
    else:
        raise ValueError(f"task: expected segmentation or classification, got {task!r}")
    return TrainingRun(folder, folder / "best.pth", folder / "report.html")


@in_python_words
def evaluate(weights: StrPath, data: StrPath, out: StrPath, *, device: str = "auto", **options: Any) -> Evaluation:
    """Score a fine-tuned network on labelled cases, as `hyspark evaluate` does.

    Args:
        weights: best.pth of a fine-tuning run, or its run folder, which knows whether it segments or classifies; a
            folder of `hyspark export --hf`, or hf://OWNER/NAME[@REVISION] on the Hugging Face Hub; or an ONNX or
            TorchScript file of `hyspark export`.
        data: Labelled volumes: an nnU-Net data set, or a decathlon JSON. For a classifier, a folder CLASS/IMAGE.
        out: Folder to write to.
        device: "auto", "cpu" or "cuda".
        **options: For segmentation: part, overlap, flips, largest_component, memory, tolerance, store_dir,
            prepare_workers.

    Returns:
        The scores. Cases that could not be scored are in its `failures`.

    Raises:
        ValueError: An option is unknown, or is not read for a classifier; the data does not fit the network.
        FileNotFoundError: Weights or data are missing.
        OSError: The download of weights failed.
    """
    check_caller(device)
    path = local_path(os.fspath(weights))
    kind = kind_of_network(path)
    check_options(options, (*SCORING, "part", "store_dir", "prepare_workers"), kind)
    if kind == "classification":
        return Evaluation(Path(out), evaluate_classification(path, Path(data), Path(out), device))
    scoring = Scoring(**{name: options.pop(name) for name in SCORING if name in options})
    summary = evaluate_segmentation(path, Path(data), Path(out), scoring=scoring, device=device, **options)
    return Evaluation(Path(out), summary)


@in_python_words
def predict(
    weights: StrPath, inputs: StrPath | Sequence[StrPath], out: StrPath, *, device: str = "auto", **options: Any
) -> Predictions:
    """Predict with a fine-tuned network, as `hyspark predict` does.

    Args:
        weights: best.pth of a fine-tuning run, or its run folder, which knows whether it segments or classifies; a
            folder of `hyspark export --hf`, or hf://OWNER/NAME[@REVISION] on the Hugging Face Hub; or an ONNX or
            TorchScript file of `hyspark export`.
        inputs: NIfTI files, and folders that hold some or DICOM series. For a classifier, one folder of images.
        out: Folder to write to.
        device: "auto", "cpu" or "cuda".
        **options: For segmentation: overlap, flips, largest_component, memory, prepare_workers, overwrite, format
            ("nifti", "dicom-seg" or "rtstruct"), min_slices.

    Returns:
        The files written. Volumes without a prediction are in its `failures`.

    Raises:
        ValueError: An option is unknown, or is not read for a classifier; the inputs do not fit the network.
        FileNotFoundError: Weights or inputs are missing.
        ModuleNotFoundError: The format needs a package that is not installed.
    """
    check_caller(device)
    sources = [Path(source) for source in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    if not sources:
        raise ValueError("inputs: expected one path or more, got none")
    path = local_path(os.fspath(weights))
    kind = kind_of_network(path)
    check_options(options, (*WINDOWING, "prepare_workers", "overwrite", "format", "min_slices"), kind)
    if kind == "classification":
        if len(sources) != 1:
            raise ValueError(f"inputs: a classifier takes one folder of images, got {len(sources)} paths")
        written, failures = predict_classification(path, sources[0], Path(out), device)
        return Predictions([written], failures)
    scoring = Scoring(**{name: options.pop(name) for name in WINDOWING if name in options})
    options["num_workers"] = options.pop("prepare_workers", 0)
    if "format" in options:
        options["file_format"] = options.pop("format")
    made = predict_segmentation(path, sources, Path(out), scoring=scoring, device=device, **options)
    return Predictions(*made)


def check_caller(device: str = "auto") -> None:
    """Raise RuntimeError in a process that a script started by importing itself, ValueError for an unknown device."""
    one_of("device", device, DEVICES)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this script started processes, each of which imports it: put its calls of hyspark below "
            'the line `if __name__ == "__main__":`'
        )


def merge_settings(config_class: type, config: StrPath | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put settings over those of a recipe, in the types of their fields."""
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    recipe = read_yaml(os.fspath(config), config_class) if config else {}
    return recipe | typed_values(plain, config_class, "settings", base=recipe)


def check_options(options: Mapping[str, Any], known: Sequence[str], kind: NetworkKind) -> None:
    """Raise ValueError for options that are unknown, or that this kind of network does not read."""
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; options are {', '.join(known)}{nearest(name, known)}")
        if kind == "classification":
            raise ValueError(f"{name}: an option of segmentation, but the network is a classifier; drop it")
