"""Files of fine-tuned networks: which kind of network they hold, and what is stored beside its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from hyspark.evaluation.segmentation.deployed import deployed_form
from hyspark.models.weights.files import read_contents

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
        path: best.pth of a fine-tuning run, the run folder, or an exported network, which segments.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no best.pth.
        ValueError: The file is damaged, or holds no fine-tuned network.
    """
    return "segmentation" if deployed_form(path) else read_fine_tuned(path).kind


def read_fine_tuned(path: Path, kind: NetworkKind | None = None) -> FineTunedFile:
    """Read the file of a fine-tuned network. Nothing stored in it is executed.

    Args:
        path: best.pth of a fine-tuning run, or the run folder.
        kind: The kind expected; None accepts both.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no best.pth.
        ValueError: The file is damaged, or holds no fine-tuned network of this kind.
    """
    if path.is_dir() and not (path / "best.pth").is_file():
        raise FileNotFoundError(f"{path} holds no best.pth; expected a fine-tuning run that was validated")
    path = path / "best.pth" if path.is_dir() else path
    contents = read_contents(path)
    found = kind_of_contents(contents)
    if found not in get_args(NetworkKind) or (kind and found != kind):
        wanted = f"a fine-tuned network for {kind}" if kind else "a fine-tuned network"
        raise ValueError(
            f"{path}: expected {wanted}, got {found}; give the best.pth that fine-tuning wrote, or its run folder"
        )
    assert isinstance(contents, Mapping)
    return FineTunedFile(path, "classification" if found == "classification" else "segmentation", contents)


def kind_of_contents(contents: object) -> str:
    """Return the `NetworkKind` of what a file holds, or else describe it in words."""
    keys = set(contents) if isinstance(contents, Mapping) else set()
    if {"model", "config", "classes"} <= keys:
        return "classification" if "weights" in keys else "segmentation"
    return "a state to continue training from" if "optimizer" in keys else "weights without settings and class names"
