"""A run is a folder: resolved settings, metrics, checkpoints, exported weights; the same command on it continues."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from hyspark.config.pretrain import PretrainConfig
from hyspark.config.recipes import Config, as_plain, differences
from hyspark.models.nnunet_plans import without_plan_folder
from hyspark.training import checkpoint, distributed
from hyspark.training.distributed import Processes
from hyspark.training.signals import StopRequests, catch_stop_signals
from hyspark.utils.locks import lock_folder


def checkpoint_file(config: Config) -> Path:
    """Return the file of the newest checkpoint; of pre-training, the file that was published."""
    if isinstance(config, PretrainConfig):
        return config.run_folder / f"{model_file_stem(config)}_withdecoder_1kpretrained_hyspark_style.pth"
    return config.run_folder / "last.pth"


def encoder_file(config: PretrainConfig) -> Path:
    """Return the file of the encoder's weights alone, in the published format."""
    return config.run_folder / f"{model_file_stem(config)}_1kpretrained_timm_style.pth"


def best_encoder_file(config: PretrainConfig) -> Path:
    """Return the file of the encoder's weights of the lowest validation loss, in the published format."""
    return config.run_folder / f"{model_file_stem(config)}_best_timm_style.pth"


def model_file_stem(config: PretrainConfig) -> str:
    """Return the model's name for file names: spark/timm/resnet50 becomes spark_timm_resnet50.

    Of a plan of nnU-Net the configuration counts: spark_nnunet_3d_fullres.
    """
    return re.sub(r"\W+", "_", without_plan_folder(config.model))


def steps_per_epoch(config: Config, num_training: int) -> int:
    """Return the steps that the settings name, or those in which every training case comes at least once."""
    set_number = 0 if isinstance(config, PretrainConfig) else config.steps_per_epoch
    return set_number or math.ceil(num_training / config.batch_size)


def describe_settings(config: Config, processes: Processes, lines: dict[str, str]) -> str:
    """Format the resolved settings for the terminal, then lines by title, device and run folder."""
    settings = [f"  {name}: {value}" for name, value in as_plain(config).items()]
    last = {"device": processes.describe(config.precision), "run": str(config.run_folder)}
    return "\n".join([*settings, *(f"{title:8s} {text}" for title, text in (lines | last).items())])


def read_state(config: Config) -> dict[str, Any] | None:
    """Read the state that a run continues from: its newest intact checkpoint, else that of resume_from, else None.

    Raises:
        ValueError: The checkpoint is of other settings; and as `read_newest_checkpoint`.
    """
    path = checkpoint_file(config)
    state, _ = checkpoint.read_newest_checkpoint(path)
    if state is None and isinstance(config, PretrainConfig) and config.resume_from:
        path = Path(config.resume_from)
        state = checkpoint.read_checkpoint(path)
    if state and (changed := differences(state["config"], config)):
        raise ValueError(
            f"{path} holds a run with other settings; name another run folder, or use the same settings to continue "
            "it:\n  " + "\n  ".join(changed)
        )
    return state


def check_same_data(state: Mapping[str, Any], data: str) -> None:
    """Check that a checkpoint is of the data of a run.

    Raises:
        ValueError: It is not.
    """
    if state["data"] != data:
        raise ValueError(
            "the run was begun on other data; name another run folder, or use the same data to continue it:\n"
            f"  data: was {state['data']}, is {data}"
        )


@contextmanager
def open_run_folder(config: Config, processes: Processes, model: nn.Module) -> Iterator[StopRequests]:
    """Lock the run folder, check the disk, join the other processes and catch signals. A replay catches signals only.

    Yields:
        Requests to stop.

    Raises:
        ValueError: Another process holds the folder.
        OSError: The disk has no room for the checkpoints.
    """
    with catch_stop_signals() as requests:
        if config.replay:
            yield requests
            return
        locked = lock_folder(config.run_folder, "run folder") if processes.is_main else nullcontext()
        with locked, distributed.join_process_group(processes):
            if processes.is_main:
                path = checkpoint_file(config)
                checkpoint.remove_temporary_files(config.run_folder)
                checkpoint.rename_damaged(path)
                checkpoint.check_disk_space(path, model.parameters(), config.keep_last)
            distributed.barrier(processes)
            yield requests
