"""Folder of a model as on the Hugging Face Hub: config.json and a file of weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from hyspark.models.weights.hub_address import local_path
from hyspark.utils.atomic import write_json, write_whole

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
USUAL_NAMES = (
    *(WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
)
"""Usual names of the weights, the first that is present."""
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
LIBRARY = {"library_name": "hyspark"}
"""Entry of config.json by which a folder is known."""
NESTED = ("preprocessing", "prediction")
"""Entries of config.json that hold settings; most of the others are settings themselves."""
DESCRIBED = (*LIBRARY, *NESTED, "network", "classes")


def weights_file(source: str | Path) -> Path:
    """Return the file of weights that a path, a folder or an address means; errors as for `local_path`."""
    path = local_path(source)
    return (find_weights(path) if path.is_dir() else None) or path


def find_weights(folder: Path) -> Path | None:
    """Find the file of weights in a folder: one of the usual names, or the only one; None if that is undecided."""
    for name in USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = [path for path in folder.iterdir() if path.suffix in WEIGHT_ENDINGS and path.is_file()]
    return found[0] if len(found) == 1 else None


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder; empty if there is none.

    Raises:
        ValueError: it is damaged, or no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged; expected JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object of settings, got {type(config).__name__}")
    return config


def is_own_config(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of this package."""
    return LIBRARY.items() <= config.items()


def read_own_config(folder: Path, network: str) -> dict[str, Any]:
    """Read config.json of a folder that holds a certain network of this package.

    Args:
        folder: the folder.
        network: "Segmenter" or "Encoder".

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is damaged, or of another network.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: holds no {CONFIG}; expected a folder of `hyspark export --hf`")
    config = read_model_config(folder)
    if not is_own_config(config) or config.get("network") != network:
        raise ValueError(
            f"{folder / CONFIG}: expected the settings of a hyspark.{network}, got {describe_config(config)}"
        )
    return config


def describe_config(config: Mapping[str, Any]) -> str:
    """Describe what a config.json is of."""
    if is_own_config(config):
        name = config.get("network")
        return f"those of a hyspark.{name}" if name in ("Encoder", "Segmenter") else f"those of the network {name!r}"
    if "model_type" in config or "architectures" in config:
        name = config.get("model_type") or config["architectures"]
        return f"those of a model of transformers ({name})"
    if "_diffusers_version" in config:
        return f"those of a model of diffusers ({config.get('_class_name')})"
    if "architecture" in config:
        return f"those of a model of timm ({config['architecture']})"
    return f"others (keys {', '.join(list(config)[:5])})" if config else "none"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a config.json of this package, by the names of flags.

    Args:
        config: content of config.json.
    """
    plain = {name: value for name, value in config.items() if name not in DESCRIBED}
    for name in NESTED:
        part = config.get(name)
        plain |= part if isinstance(part, Mapping) else {}
    return plain


def write_model(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write config.json and model.safetensors.

    Tensors that share memory, as in networks of nnU-Net, are written once. The metadata names the others, as
    safetensors.torch.save_model does.

    Args:
        folder: folder to write to, made if it is missing.
        weights: the state dict.
        config: content of config.json, in plain values.
        metadata: metadata of the file of weights.
    """
    kept, same = without_copies(weights)
    content = save({name: own_memory(value) for name, value in kept.items()}, dict(metadata) | same)
    write_whole(folder / WEIGHTS, content)
    write_json(folder / CONFIG, config)


def own_memory(value: Tensor) -> Tensor:
    """Return a tensor whose memory holds nothing else; safetensors refuses others."""
    return value.contiguous() if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def without_copies(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Separate tensors that are the same memory under several names.

    Returns:
        The tensors, each under its first name, in sorted order; and by further names the first one.
    """
    kept: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for name in sorted(weights):
        value = weights[name]
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if memory in first:
            same[name] = first[memory]
        else:
            first[memory] = name
            kept[name] = value
    return kept, same


def with_copies(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Add the names of tensors that a .safetensors file holds once for several, as its metadata names them."""
    return tensors | {name: tensors[first] for name, first in metadata.items() if first in tensors}
