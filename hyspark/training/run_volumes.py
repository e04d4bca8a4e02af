"""The data of a run: prepared volumes of its cases, and what becomes of cases that cannot be used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyspark.config.shared import VolumeSettings
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import failure_message, files_exist, prepare_missing, stored_volumes
from hyspark.data.preprocessing.store import StoredVolume, is_complete
from hyspark.data.preprocessing.store_size import estimate_store_size
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.utils.digests import text_digest
from hyspark.utils.log import LOG

GB = 10**9
SKIP = "or leave them out with --on_bad_case skip"


def data_text(training: Sequence[Case], validation: Sequence[Case]) -> str:
    """The data of a run in a few words, with a digest of the names: the order of batches is a function of them."""
    digest = text_digest([*(c.name for c in training), "", *(c.name for c in validation)])
    return f"{len(training)} training and {len(validation)} validation cases ({digest})"


def store_folder(config: VolumeSettings, data: Path) -> Path:
    """Where prepared volumes lie: in the data's folder, or beside its JSON, unless the settings name another place."""
    return Path(config.store_dir) if config.store_dir else (data if data.is_dir() else data.parent) / "prepared"


def prepared(config: VolumeSettings, processes: Processes, data: Path, cases: Sequence[Case]) -> list[StoredVolume]:
    """Volumes of the cases in the store; one process of each machine makes what is missing.

    data: folder of the data, or its JSON. Raises ValueError that lists all cases that cannot be used.
    """
    failed = prepare_once(config, processes, data, cases)
    if failed:
        raise ValueError(failure_message(failed, len(cases)))
    return stored_volumes(cases, config, store_folder(config, data))


def prepare_once(
    config: VolumeSettings, processes: Processes, data: Path, cases: Sequence[Case]
) -> dict[str, tuple[str, ...]]:
    """Make what is missing in each machine's store; why cases cannot be used, by image, on any machine."""
    store = store_folder(config, data)

    def work() -> dict[str, tuple[str, ...]]:
        whole = [case for case in cases if files_exist(case)]
        if not all(is_complete(volume.folder) for volume in stored_volumes(whole, config, store)):
            warn_of_full_disk(config, store, cases)
        return prepare_missing(cases, config, store, config.prepare_workers, processes.is_main)

    return {image: why for failed in distributed.once_per_machine(work, processes) for image, why in failed.items()}


def warn_of_full_disk(config: VolumeSettings, store: Path, cases: Sequence[Case]) -> None:
    """Say so where the volumes that are to be prepared will probably not fit the disk."""
    found = estimate_store_size(config, cases, store)
    if found.missing_bytes > found.free:
        LOG.warning(
            "the %d volumes to prepare will take about %.1f GB, but the disk of %s has %.1f GB free; "
            "--store_dir names another folder",
            found.missing,
            found.missing_bytes / GB,
            store,
            found.free / GB,
        )


@dataclass(frozen=True)
class Usable:
    """The cases of a run that can be used, with their volumes, and the names of those that were left out."""

    training: list[StoredVolume]
    training_cases: list[Case]
    validation: list[StoredVolume]
    validation_cases: list[Case]
    left_out: list[str]


def left_out_text(names: Sequence[str]) -> str:
    """The cases left out, for reports."""
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def usable(
    config: VolumeSettings,
    processes: Processes,
    data: Path,
    training: Sequence[Case],
    validation: Sequence[Case],
    state: dict[str, Any] | None,
    fault: Callable[[StoredVolume], str] = lambda volume: "",
) -> Usable:
    """Prepare the data of a run, and treat broken cases as on_bad_case says.

    state: that the run continues from. fault: what is wrong with a prepared volume, or nothing. Raises ValueError that
    lists all broken cases; where nothing is left to train on, or to validate on where there was something; where a
    continued run was begun with other cases, or had left out others.
    """
    cases = [*training, *validation]
    if state and state["data"] != data_text(training, validation):
        raise ValueError(
            f"the run was begun on other data; name another run folder, or use the same to continue it:\n"
            f"  data: was {state['data']}, is {data_text(training, validation)}"
        )
    failed = prepare_once(config, processes, data, cases)
    whole = [case for case in cases if str(case.image) not in failed]
    volumes = dict(zip(whole, stored_volumes(whole, config, store_folder(config, data)), strict=True))
    failed |= {str(c.image): (f"{c.image}: {why}",) for c in whole if (why := fault(volumes[c]))}
    if failed and config.on_bad_case == "stop":
        raise ValueError(failure_message(failed, len(cases), SKIP))
    train_on, validate_on = ([c for c in part if str(c.image) not in failed] for part in (training, validation))
    left_out = [case.name for case in cases if str(case.image) in failed]
    if failed:
        lines = "\n  ".join(line for lines in failed.values() for line in lines)
        LOG.warning("%d of %d volumes cannot be used and are left out:\n  %s", len(failed), len(cases), lines)
    if not train_on or (validation and not validate_on):
        raise ValueError(f"what is left out leaves {len(train_on)} to train on and {len(validate_on)} to validate on")
    if state and state["left_out"] != left_out:
        raise ValueError(
            f"this run was begun without the cases {state['left_out']}, now those that cannot be used are {left_out}; "
            "the batches would be others. Restore the files as they were, or name another run folder"
        )
    return Usable([volumes[c] for c in train_on], train_on, [volumes[c] for c in validate_on], validate_on, left_out)
