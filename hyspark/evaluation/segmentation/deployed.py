"""Exported segmentation networks as modules: ONNX, by ONNX Runtime, and TorchScript.

The description of a file is read first, so that a foreign file is refused before anything of it runs.
"""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hyspark.evaluation.segmentation.description import KEY, Description, read_description
from hyspark.models.weights.formats import zip_names
from hyspark.utils.file_content import HEAD, content_of
from hyspark.utils.install import extra_error
from hyspark.utils.log import LOG
from hyspark.utils.text import first_line

DeployedForm = Literal["onnx", "torchscript"]
INPUT, OUTPUT = "image", "scores"
"""Names of an ONNX network's input (b, c, h, w, d) and output (b, n, h, w, d)."""


class DeployedNetwork(NamedTuple):
    """An exported network.

    Attributes:
        network: Computes class scores.
        description: Its settings and classes.
    """

    network: nn.Module
    description: Description


class OnnxNetwork(nn.Module):
    """A network that ONNX Runtime computes: (b, c, *size) -> class scores (b, n, *size), float32.

    Args:
        path: The ONNX file.
        session: A session of it on the CPU. Another one is made for CUDA where ONNX Runtime has it.
    """

    def __init__(self, path: Path, session: Any) -> None:
        super().__init__()
        self.path, self.sessions = path, {"cpu": session}

    def forward(self, volumes: Tensor) -> Tensor:
        """Compute class scores on the device of the volumes, or on the CPU where ONNX Runtime has no other."""
        kind = volumes.device.type
        if kind not in self.sessions:
            self.sessions[kind] = self.session_for(volumes.device)
        given = {INPUT: np.ascontiguousarray(volumes.float().cpu().numpy())}
        try:
            (scores,) = self.sessions[kind].run([OUTPUT], given)
        except Exception as error:  # of types of its own, also where memory ran out
            raise RuntimeError(f"{self.path}: ONNX Runtime failed ({first_line(error)})") from error
        return torch.from_numpy(scores).to(volumes.device)

    def session_for(self, device: torch.device) -> Any:
        """Make a session for a GPU, or return that of the CPU with a warning."""
        runtime = import_for_onnx("onnxruntime")
        if device.type != "cuda" or "CUDAExecutionProvider" not in runtime.get_available_providers():
            LOG.warning("%s: this ONNX Runtime has no %s and computes on the CPU", self.path, device.type)
            return self.sessions["cpu"]
        return open_session(self.path, [("CUDAExecutionProvider", {"device_id": device.index or 0})])


def deployed_form(path: Path) -> DeployedForm | None:
    """Return the form of an exported network by its file; None for any other file."""
    if path.suffix.lower() == ".onnx":
        return "onnx"
    return "torchscript" if torchscript_folder(path) else None


def torchscript_folder(path: Path) -> str:
    """Return the folder that all files of a TorchScript archive lie in; empty for any other file."""
    names = zip_names(path) if path.is_file() else []
    folder = names[0].partition("/")[0] if names else ""
    has_code = any(name.startswith(f"{folder}/code/") for name in names)
    return folder if has_code and f"{folder}/constants.pkl" in names else ""


def load_deployed(path: Path, form: DeployedForm) -> DeployedNetwork:
    """Load an exported network on the CPU.

    Args:
        path: The file.
        form: Its form, see `deployed_form`.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: ONNX or ONNX Runtime is needed, and not installed.
        ValueError: The file is damaged, or not of `hyspark export`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a network that `hyspark export` wrote")
    return load_onnx(path) if form == "onnx" else load_torchscript(path)


def load_onnx(path: Path) -> DeployedNetwork:
    """Load an ONNX file of `hyspark export --onnx`; errors as for `load_deployed`."""
    description = read_description(known_text(read_onnx_metadata(path).get(KEY, ""), path), path)
    return DeployedNetwork(OnnxNetwork(path, open_session(path, ["CPUExecutionProvider"])), description)


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """Read the metadata properties of an ONNX file, and no weights that it keeps in other files.

    Raises:
        ModuleNotFoundError: ONNX is not installed.
        ValueError: The file is no ONNX, or damaged.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if what := "an empty file" if not head else content_of(head)[1]:
        raise ValueError(f"{path}: expected ONNX, got {what}")
    onnx = import_for_onnx("onnx")
    try:
        entries = onnx.load(path, format="protobuf", load_external_data=False).metadata_props
    except Exception as error:  # of types of Protocol Buffers
        raise ValueError(f"{path}: unreadable ONNX ({first_line(error)}); is it damaged or truncated?") from error
    return {entry.key: entry.value for entry in entries}


def load_torchscript(path: Path) -> DeployedNetwork:
    """Load a TorchScript file of `hyspark export --torchscript`; errors as for `load_deployed`."""
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))  # reads without running anything
        is_own = f"{torchscript_folder(path)}/extra/{KEY}" in zip_names(path)
        text = reader.get_record(f"extra/{KEY}").decode(errors="replace") if is_own else ""
        description = read_description(known_text(text, path), path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises its own successor of TorchScript
            network: nn.Module = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{path}: unreadable TorchScript ({first_line(error)}); export it again") from error
    return DeployedNetwork(network, description)


def known_text(text: str, path: Path) -> str:
    """Return the text of a description.

    Raises:
        ValueError: It is empty, since another program wrote the file.
    """
    if not text:
        raise ValueError(
            f"{path}: expected a network of `hyspark export`, got one of another program: it holds no {KEY} with "
            "spacing, intensities and classes, so its scores cannot be brought onto an image; export a fine-tuned run"
        )
    return text


def open_session(path: Path, providers: list[Any]) -> Any:
    """Open an ONNX file with as many threads as torch uses.

    Raises:
        ModuleNotFoundError: ONNX Runtime is not installed.
        ValueError: ONNX Runtime does not run the file.
    """
    runtime = import_for_onnx("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # of many types, as for operators of a later release
        raise ValueError(
            f"{path}: onnxruntime {runtime.__version__} does not run it ({first_line(error)}); update onnxruntime, or "
            "export it again"
        ) from error


def import_for_onnx(package: str) -> Any:
    """Import a package of the extra onnx, "onnx" or "onnxruntime".

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise extra_error(error, f"ONNX needs {package}", "onnx", package) from error
