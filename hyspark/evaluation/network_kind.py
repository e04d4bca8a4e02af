"""Files of fine-tuned networks: which kind of network they hold, and what is stored beside its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from hyspark.config.segmentation import PREDICTION_SETTINGS, UNREAD_BY_PREDICTIONS, SegmentationConfig
from hyspark.data.intensity import reads_window
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.deployed import deployed_form
from hyspark.models.weights.files import read_contents
from hyspark.models.weights.hub_address import local_path
from hyspark.models.weights.model_folder import CONFIG, find_weights, read_own_config, settings_of
from hyspark.models.weights.search import choose_state_dict
from hyspark.utils.settings import field_info

NetworkKind = Literal["segmentation", "classification"]


class FineTunedFile(NamedTuple):
    """The content of a file that fine-tuning wrote.

    Attributes:
        path: The file, best.pth where a run folder was given.
        kind: What the network was fine-tuned for.
        contents: "model", "config", "classes", and further entries by kind.
    """

    path: Path
    kind: NetworkKind
    contents: Mapping[str, Any]

    def load_weights(self, network: nn.Module) -> None:
        """Load the weights into a network.

        Raises:
            ValueError: They do not fit.
        """
        try:
            network.load_state_dict(self.contents["model"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.path}: its weights do not fit the network that its settings describe ({error})"
            ) from error


def kind_of_network(path: Path) -> NetworkKind:
    """Return what a fine-tuned network is for.

    Args:
        path: See `fine_tuned_file`, or an exported network, which segments; errors as for `read_fine_tuned`.
    """
    path = local_path(path)
    return "segmentation" if deployed_form(path) else read_fine_tuned(path).kind


def fine_tuned_file(path: Path) -> Path:
    """Return the file of a fine-tuned network's weights.

    Args:
        path: best.pth of a fine-tuning run, or the run folder, or a folder of `hyspark export --hf`, or its address
            hf://OWNER/NAME[@REVISION].

    Raises:
        FileNotFoundError: There is no such file or repository, or the folder holds no network.
        OSError: A download failed.
    """
    path = local_path(path)
    if not path.is_dir() or (path / "best.pth").is_file():
        return path / "best.pth" if path.is_dir() else path
    if (path / CONFIG).is_file() and (file := find_weights(path)):
        return file
    raise FileNotFoundError(
        f"{path} holds no best.pth; expected a fine-tuning run that was validated, or a folder of `hyspark export --hf`"
    )


def read_fine_tuned(path: Path, kind: NetworkKind | None = None) -> FineTunedFile:
    """Read the file of a fine-tuned network. Nothing stored in it is executed.

    Args:
        path: See `fine_tuned_file`.
        kind: The kind expected; None accepts both.

    Raises:
        FileNotFoundError, OSError: As `fine_tuned_file`.
        ValueError: The file is damaged, or holds no fine-tuned network of this kind.
    """
    path = local_path(path)
    file = fine_tuned_file(path)
    if path.is_dir() and file.name != "best.pth":
        contents: object = read_model_folder(path, file)
    else:
        contents = read_contents(file)
    found = kind_of_contents(contents)
    if found not in get_args(NetworkKind) or (kind and found != kind):
        wanted = f"a fine-tuned network for {kind}" if kind else "a fine-tuned network"
        raise ValueError(
            f"{file}: expected {wanted}, got {found}; give the best.pth that fine-tuning wrote, or its run folder"
        )
    assert isinstance(contents, Mapping)
    return FineTunedFile(file, "classification" if found == "classification" else "segmentation", contents)


def read_model_folder(folder: Path, file: Path) -> Mapping[str, Any]:
    """Read a folder of `hyspark export --hf` as the content of best.pth, see `FineTunedFile`.

    Raises:
        ValueError: config.json is damaged, of another network, or without a setting that predictions need.
    """
    config = read_own_config(folder, "Segmenter")
    settings = settings_of(config)
    needed = ["spacing", "intensity", "image_channels"]
    needed += ["hu_min", "hu_max"] if "ct" in str(settings.get("intensity")) else []
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(
            f"{folder / CONFIG}: expected {', '.join(needed)} in preprocessing, which predictions need; "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    classes = config.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{folder / CONFIG}: expected a list of names as classes, got {classes!r}")
    weights, _ = choose_state_dict(read_contents(file), str(file))
    return {"model": weights.tensors, "config": {**settings, **UNREAD_BY_PREDICTIONS}, "classes": classes}


def prediction_settings(config: SegmentationConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of a network beside its shape, as config.json of a folder nests them.

    The window is omitted where the intensities do not read it.
    """
    unread = () if reads_window(config) else ("hu_min", "hu_max")
    return {
        "preprocessing": {name: getattr(config, name) for name in field_info(PrepareSettings) if name not in unread},
        "prediction": {name: getattr(config, name) for name in PREDICTION_SETTINGS},
    }


def kind_of_contents(contents: object) -> str:
    """Return the `NetworkKind` of what a file holds, or else describe it in words."""
    keys = set(contents) if isinstance(contents, Mapping) else set()
    if {"model", "config", "classes"} <= keys:
        return "classification" if "weights" in keys else "segmentation"
    return "a state to continue training from" if "optimizer" in keys else "weights without settings and class names"
