"""Precision of a run, and the kernels that torch may choose on a GPU."""

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import yaml

from hyspark.config.recipes import Config, ConfigT
from hyspark.config.segmentation import SegmentationConfig
from hyspark.config.shared import Precision, RunSettings
from hyspark.training.distributed import Processes
from hyspark.utils.log import LOG

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(config: ConfigT, processes: Processes) -> ConfigT:
    """Replace the precision `auto` by that of the run so far, or by the fastest of the device.

    So a run that is continued on another machine keeps its precision.
    """
    if config.precision != "auto":
        return config
    saved = saved_precision(config)
    precision = saved or fastest_precision(processes.device)
    LOG.info("precision auto: %s, %s", precision, "as the run was begun" if saved else f"for {processes.device.type}")
    return replace(config, precision=precision)


def saved_precision(config: Config) -> Precision | None:
    """Read the precision of a run from its config.yaml; None without a readable one."""
    path = config.run_folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        written = yaml.safe_load(path.read_text())["precision"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return next((precision for precision in AUTOCAST_DTYPES if precision == written), None)


def fastest_precision(device: torch.device) -> Precision:
    """Return bf16 if the device has arithmetic for it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Return whether this processor has AVX-512 BF16 or AMX; False if torch cannot say."""
    checks: list[Any] = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(check() for check in checks if check)


def inference_precision(processes: Processes, config: SegmentationConfig) -> Precision:
    """Return the precision that the network was trained in; on a CPU, where the others may be slow, fp32."""
    return "fp32" if processes.device.type == "cpu" else config.precision


def configure_kernels(config: RunSettings) -> None:
    """Set torch's switches for TF32, cuDNN's search and deterministic kernels, before the first kernel runs."""
    torch.backends.cudnn.allow_tf32 = config.tf32 != "none"
    torch.set_float32_matmul_precision("high" if config.tf32 == "all" else "highest")
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(processes: Processes, precision: Precision) -> AbstractContextManager[Any]:
    """Open the context of a forward pass in a precision."""
    return torch.autocast(processes.device.type, AUTOCAST_DTYPES[precision], enabled=precision != "fp32")


def make_loss_scaler(processes: Processes, precision: Precision) -> torch.amp.GradScaler:
    """Make the scaler of fp16's losses; for other precisions it does nothing."""
    return torch.amp.GradScaler(processes.device.type, enabled=precision == "fp16")
