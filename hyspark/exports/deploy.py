"""Exports of a fine-tuned run for deployment; each is compared with the run before its file or folder appears."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from hyspark.config.segmentation import SegmentationConfig
from hyspark.evaluation.segmentation.description import describe_network
from hyspark.evaluation.segmentation.inference import TrainedNetwork, load_network
from hyspark.exports.agreement import compare_predictions, compare_scores, predict_by
from hyspark.exports.bundle import import_bundle_packages, predict_by_bundle, write_bundle
from hyspark.exports.check_image import CheckImage, make_check_image
from hyspark.exports.deployable import load_deployable
from hyspark.exports.onnx_export import import_onnx_packages, write_onnx
from hyspark.exports.torchscript_export import write_torchscript
from hyspark.utils.atomic import whole_path
from hyspark.utils.log import LOG, set_up_log
from hyspark.utils.text import format_bytes

OTHER_SIZE = (32, 16, 48)
"""A size beside the crop's on which the scores of an ONNX file are compared."""

Write = Callable[[TrainedNetwork, str, Path], None]
"""Writes a network with its description to a file."""


def export_onnx(source: Path, out: Path, check: str = "") -> str:
    """Write a fine-tuned segmentation network as ONNX, for any batch and size; see `export_network_file`."""
    import_onnx_packages()

    def write(trained: TrainedNetwork, description: str, path: Path) -> None:
        write_onnx(trained.network, trained.config.in_channels, description, path)

    def note(config: SegmentationConfig) -> str:
        return "any batch, any size of multiples of 16 per axis"

    return export_network_file(source, out, ".onnx", write, [(1, OTHER_SIZE)], note, check)


def export_torchscript(source: Path, out: Path, check: str = "") -> str:
    """Write a fine-tuned segmentation network as TorchScript, for its crop size; see `export_network_file`."""

    def write(trained: TrainedNetwork, description: str, path: Path) -> None:
        crop = trained.config.crop_shape
        write_torchscript(trained.network, trained.config.in_channels, crop, description, path)

    def note(config: SegmentationConfig) -> str:
        return f"any batch, crops of {' x '.join(map(str, config.crop_shape))} voxels alone: tracing fixes the size"

    return export_network_file(source, out, ".pt", write, [], note, check)


def export_network_file(
    source: Path,
    out: Path,
    ending: str,
    write: Write,
    others: Sequence[tuple[int, Sequence[int]]],
    note: Callable[[SegmentationConfig], str],
    check: str,
) -> str:
    """Write a network as one file, after comparing scores and label maps with those of the run.

    Args:
        source: best.pth of a fine-tuning run, or the run folder.
        out: The file to write.
        ending: Ending of its name.
        write: Writes the form.
        others: Further batches and sizes on which scores are compared.
        note: Describes which crops the network takes.
        check: A NIfTI file to compare label maps on; empty to choose one, see `make_check_image`.

    Returns:
        The lines to print.

    Raises:
        FileNotFoundError: The source or the image is missing.
        ValueError: The source is no segmentation network, or the export does not compute what the run does.
    """
    set_up_log(keep_level=True)
    trained = load_deployable(source, out, [ending])
    description = describe_network(trained.config, trained.names, trained.trained_on)
    with whole_path(out) as path:
        image = make_check_image(trained.config, check, path.parent / "check" / "images")
        LOG.info("%s: writing the network", out)
        write(trained, description, path)
        shapes = [
            (batch, trained.config.in_channels, *size) for batch, size in [(2, trained.config.crop_shape), *others]
        ]
        scores = compare_scores(trained.network, load_network(path).network, shapes, str(out))
        LOG.info("%s: predicting %s with the run and with the export", out, image.text)
        compared = compare_predictions(source, image.folder, predict_by(path), trained.names, str(out))
    summary = summarise_export(out, trained.network, image, f"{scores}; {compared.text()}")
    return f"{summary}\n{note(trained.config)}"


def export_bundle(source: Path, out: Path, check: str = "") -> str:
    """Write a fine-tuned segmentation network as a MONAI bundle, after comparing label maps with those of the run.

    Args:
        source: best.pth of a fine-tuning run, or the run folder.
        out: The folder to write, new or empty.
        check: As for `export_network_file`.

    Returns:
        The lines to print.

    Raises:
        FileNotFoundError: The source or the image is missing.
        ModuleNotFoundError: A package that runs bundles is not installed.
        ValueError: The source is no segmentation network, or the bundle does not compute what the run does.
    """
    import_bundle_packages()
    set_up_log(keep_level=True)
    trained = load_deployable(source, out)
    with whole_path(out) as folder:
        image = make_check_image(trained.config, check, folder.parent / "check" / "images")
        LOG.info("%s: writing the bundle", out)
        write_bundle(trained, source, folder)
        LOG.info("%s: predicting %s with the run and with the bundle", out, image.text)
        compared = compare_predictions(source, image.folder, predict_by_bundle(folder), trained.names, str(out))
    return (
        f"{summarise_export(out, trained.network, image, compared.text())}\n"
        f"run it: cd {out}; python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES\n"
        "complete authors and copyright in configs/metadata.json, and LICENSE, before you pass it on"
    )


def summarise_export(out: Path, network: nn.Module, image: CheckImage, compared: str) -> str:
    """Write what was exported, and how it agrees with the run."""
    numbers = sum(value.numel() for value in network.state_dict().values()) / 1e6
    size = sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file())
    return f"{out}: {numbers:.2f} M numbers, {format_bytes(size)}\nagrees with the run on {image.text}: {compared}"
