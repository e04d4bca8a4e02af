"""What an exported segmentation network says of itself: all that predicting needs beside the network, as JSON.

The exports write it (ONNX: the metadata property `KEY`; TorchScript: the extra file `KEY`), and `deployed.py` reads it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hyspark.config.recipes import typed_values
from hyspark.config.segmentation import PREDICTION_SETTINGS, UNREAD_BY_PREDICTIONS, SegmentationConfig
from hyspark.training.initial_weights import INPUT_SETTINGS
from hyspark.utils.version import VERSION

KEY = "hyspark.json"
"""Name of the description in an exported file."""
DESCRIPTION_FORMAT = 1
"""Version of the description; a reader refuses later ones."""


class Description(NamedTuple):
    """An exported network's settings and classes.

    Attributes:
        config: Its settings; those that only training reads have their defaults.
        names: Names of its classes, background first.
        trained_on: Digests of the images that it was trained on; empty if unknown.
    """

    config: SegmentationConfig
    names: list[str]
    trained_on: list[str]


def describe_network(config: SegmentationConfig, names: Sequence[str], trained_on: Sequence[str]) -> str:
    """Write the description of a network as JSON; no path and no name of a case is in it.

    Args:
        config: Its settings.
        names: Names of its classes, background first.
        trained_on: Digests of the images that it was trained on.
    """
    settings = {name: getattr(config, name) for name in (*INPUT_SETTINGS, *PREDICTION_SETTINGS, "fold")}
    settings["crop_size"] = config.crop_shape
    content = {
        "program": "hyspark",
        "version": VERSION,
        "format": DESCRIPTION_FORMAT,
        "task": "segmentation",
        "orientation": "RAS",
        "classes": list(names),
        "settings": settings,
        "trained_on": list(trained_on),
    }
    return json.dumps(content)


def read_description(text: str, path: Path) -> Description:
    """Read the description of an exported network.

    Args:
        text: Its JSON.
        path: The network's file, for messages.

    Raises:
        ValueError: It is no such description, or of a later version.
    """
    try:
        content = json.loads(text)
        if content["program"] != "hyspark" or content["task"] != "segmentation":
            raise ValueError("of another program or task")
        if content["format"] > DESCRIPTION_FORMAT:
            raise ValueError(f"written by hyspark {content['version']}; install that version, or export it again")
        settings: Mapping[str, Any] = content["settings"]
        values = typed_values({**settings, **UNREAD_BY_PREDICTIONS}, SegmentationConfig, str(path))
        names = [str(name) for name in content["classes"]]
        return Description(SegmentationConfig(**values), names, [str(digest) for digest in content["trained_on"]])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: expected the settings that `hyspark export` writes ({KEY}), got {reason}") from error
