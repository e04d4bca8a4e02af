"""The trained segmentation network: from its file, with the windows that its settings describe."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from hyspark.config.recipes import typed_values
from hyspark.config.segmentation import SegmentationConfig, network_options
from hyspark.evaluation.network_kind import read_fine_tuned
from hyspark.evaluation.segmentation.deployed import deployed_form, load_deployed
from hyspark.evaluation.segmentation.windows import Windows
from hyspark.models.segmentation import Hybird, build_hybird
from hyspark.models.weights.hub_address import local_path
from hyspark.training.labelled_cases import left_right_pairs, unpaired_sides


class TrainedNetwork(NamedTuple):
    """A network fine-tuned for segmentation, on the CPU, in evaluation mode.

    Attributes:
        network: The network; a `Hybird` if its file is of fine-tuning.
        config: Its settings.
        names: Names of its classes, background first.
        trained_on: Digests (`content_digest`) of the images that it was trained on; empty if its file names none.
    """

    network: nn.Module
    config: SegmentationConfig
    names: list[str]
    trained_on: list[str]


def load_network(path: Path) -> TrainedNetwork:
    """Load a segmentation network from the file of a fine-tuning run, or from an exported one.

    Args:
        path: best.pth of a fine-tuning run, the run folder, a folder of `hyspark export --hf`, an ONNX or TorchScript
            file of `hyspark export`; or an address hf://OWNER/NAME[@REVISION][/FILE] of one of these.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no best.pth.
        ModuleNotFoundError: The file needs a package that is not installed.
        ValueError: The file is damaged, or holds no network fine-tuned for segmentation.
    """
    path = local_path(path)
    if form := deployed_form(path):
        network, description = load_deployed(path, form)
        return TrainedNetwork(network, *description)
    return load_fine_tuned(path)


def load_fine_tuned(path: Path) -> TrainedNetwork:
    """Load the segmentation network that fine-tuning left in a file. Nothing stored in it is executed.

    Args:
        path: The network's file or folder, see `fine_tuned_file`.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no best.pth.
        ValueError: The file is damaged, or holds no network fine-tuned for segmentation.
    """
    file = read_fine_tuned(path, "segmentation")
    config = SegmentationConfig(**typed_values(file.contents["config"], SegmentationConfig, str(file.path)))
    names = [str(name) for name in file.contents["classes"]]
    model = hybird_from_config(config, len(names))
    file.load_weights(model)
    return TrainedNetwork(model.eval(), config, names, list(file.contents.get("trained_on", [])))


def hybird_from_config(config: SegmentationConfig, num_classes: int) -> Hybird:
    """Build the network that the settings describe, randomly initialised by torch's generator."""
    return build_hybird(config.in_channels, num_classes, config.crop_shape, **network_options(config))


def windows_from_config(
    config: SegmentationConfig, names: Sequence[str], overlap: float, flips: tuple[int, ...] = ()
) -> Windows:
    """Return the windows of a network with these settings and classes.

    Args:
        config: Settings of the network.
        names: Its classes, background first.
        overlap: Fraction of a window that its neighbour covers.
        flips: Axes of the flips to average over.

    Raises:
        ValueError: There are no such overlap or axes, or a flip of axis 0 would mix up classes.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, but it is {overlap}")
    if len(set(flips)) < len(flips) or not set(flips) <= {0, 1, 2}:
        raise ValueError(f"flips: expected axes 0 (left-right), 1 (back-front), 2 (foot-head), got {list(flips)}")
    swaps = left_right_pairs(config, names)
    deliberate = swaps and config.flip_prob[0]  # trained with flips that leave these classes as they are
    if 0 in flips and not deliberate and (unpaired := unpaired_sides(names, swaps)):
        raise ValueError(
            f"flips: a flip of axis 0 would mix up {', '.join(unpaired)}, since left_right of the network's training "
            "does not pair them; omit axis 0"
        )
    return Windows(config.crop_shape, overlap, config.sw_batch_size, flips, swaps)
