"""The volumes of a run: its cases prepared in the store, and what happens to unreadable cases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hyspark.config.shared import VolumeSettings
from hyspark.data.datasets.cases import Case
from hyspark.data.preprocessing.prepare import failure_message, prepare_missing, stored_volumes
from hyspark.data.preprocessing.store import StoredVolume
from hyspark.data.preprocessing.store_size import estimate_store_size
from hyspark.training import distributed
from hyspark.training.distributed import Processes
from hyspark.utils.digests import text_digest
from hyspark.utils.log import LOG

GB = 10**9
SKIP_ADVICE = "or exclude them with --on_bad_case skip"


def describe_cases(training: Sequence[Case], validation: Sequence[Case]) -> str:
    """Describe the data of a run in a few words, with a digest of the names, which determine the order of batches."""
    digest = text_digest([*(c.name for c in training), "", *(c.name for c in validation)])
    return f"{len(training)} training and {len(validation)} validation cases ({digest})"


def check_files_exist(config: VolumeSettings, cases: Sequence[Case]) -> None:
    """Report missing files of cases, as preparation would; on_bad_case says whether they stop the run.

    Raises:
        ValueError: Files are missing.
    """
    files = {str(case.image): case.files for case in cases}
    missing = {image: tuple(f"{file}: missing" for file in of if not file.is_file()) for image, of in files.items()}
    if failed := {image: lines for image, lines in missing.items() if lines}:
        message = failure_message(failed, len(cases), SKIP_ADVICE)
        if config.on_bad_case == "stop":
            raise ValueError(message)
        LOG.warning("%s", message)


def store_folder(config: VolumeSettings, data: Path) -> Path:
    """Return the folder of prepared volumes: store_dir, or `prepared` in the data's folder or beside its JSON."""
    return Path(config.store_dir) if config.store_dir else (data if data.is_dir() else data.parent) / "prepared"


def prepare_on_each_machine(
    config: VolumeSettings, processes: Processes, data: Path, cases: Sequence[Case]
) -> dict[str, tuple[str, ...]]:
    """Prepare the volumes that each machine's store lacks; return why cases are unreadable on any, by image."""
    store = store_folder(config, data)

    def prepare() -> dict[str, tuple[str, ...]]:
        warn = partial(warn_of_full_disk, config, store, cases)
        return prepare_missing(cases, config, store, config.prepare_workers, processes.is_main, warn)

    failures = distributed.run_once_per_machine(prepare, processes)
    return {image: why for failed in failures for image, why in failed.items()}


def warn_of_full_disk(config: VolumeSettings, store: Path, cases: Sequence[Case]) -> None:
    """Warn if the volumes to prepare will probably not fit the disk."""
    estimate = estimate_store_size(config, cases, store)
    if estimate.exceeds_disk:
        LOG.warning(
            "the %d volumes to prepare will take about %.1f GB, but the disk of %s has %.1f GB free; "
            "--store_dir names another folder",
            estimate.missing,
            estimate.missing_bytes / GB,
            store,
            estimate.free / GB,
        )


@dataclass(frozen=True)
class RunVolumes:
    """The readable cases of a run with their volumes.

    Attributes:
        training: Volumes to train on.
        training_cases: Their cases.
        validation: Volumes to validate on.
        validation_cases: Their cases.
        excluded: Names of the unreadable cases.
    """

    training: list[StoredVolume]
    training_cases: list[Case]
    validation: list[StoredVolume]
    validation_cases: list[Case]
    excluded: list[str]


@dataclass(frozen=True)
class ReadableCases:
    """The readable ones among some cases.

    Attributes:
        cases: The readable cases, in their order.
        volumes: Their volumes.
        unreadable: The other cases.
        failed: Why those are unreadable, by image.
    """

    cases: list[Case]
    volumes: list[StoredVolume]
    unreadable: list[Case]
    failed: dict[str, tuple[str, ...]]

    @property
    def reasons(self) -> dict[str, str]:
        """Why the other cases are unreadable, a line each, by name."""
        return {case.name: "; ".join(self.failed[str(case.image)]) for case in self.unreadable}


def prepare_readable(
    config: VolumeSettings,
    processes: Processes,
    data: Path,
    cases: Sequence[Case],
    find_fault: Callable[[StoredVolume], str] = lambda volume: "",
) -> ReadableCases:
    """Prepare volumes; unreadable ones are set apart. The arguments are those of `prepare_run_volumes`."""
    failed = prepare_on_each_machine(config, processes, data, cases)
    whole = [case for case in cases if str(case.image) not in failed]
    volumes = dict(zip(whole, stored_volumes(whole, config, store_folder(config, data)), strict=True))
    failed |= {str(c.image): (f"{c.image}: {fault}",) for c in whole if (fault := find_fault(volumes[c]))}
    readable = [case for case in cases if str(case.image) not in failed]
    unreadable = [case for case in cases if str(case.image) in failed]
    return ReadableCases(readable, [volumes[case] for case in readable], unreadable, failed)


def format_excluded(names: Sequence[str]) -> str:
    """Format the number and the names of excluded cases for reports."""
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def prepare_run_volumes(
    config: VolumeSettings,
    processes: Processes,
    data: Path,
    training: Sequence[Case],
    validation: Sequence[Case],
    find_fault: Callable[[StoredVolume], str] = lambda volume: "",
) -> RunVolumes:
    """Prepare the volumes of a run; unreadable cases stop it or are excluded, as on_bad_case says.

    Args:
        config: Settings.
        processes: This process among the others.
        data: Folder of the data, or its JSON.
        training: Cases to train on.
        validation: Cases to validate on, if any.
        find_fault: Returns what is wrong with a prepared volume; empty if nothing.

    Raises:
        ValueError: Cases are unreadable; or none is readable to train on, or of some to validate on.
    """
    cases = [*training, *validation]
    readable = prepare_readable(config, processes, data, cases, find_fault)
    failed, volumes = readable.failed, dict(zip(readable.cases, readable.volumes, strict=True))
    if failed and config.on_bad_case == "stop":
        raise ValueError(failure_message(failed, len(cases), SKIP_ADVICE))
    train_on, validate_on = ([c for c in part if str(c.image) not in failed] for part in (training, validation))
    excluded = [case.name for case in cases if str(case.image) in failed]
    if failed:
        lines = "\n  ".join(line for lines in failed.values() for line in lines)
        LOG.warning("%d of %d volumes are unusable and excluded:\n  %s", len(failed), len(cases), lines)
    if not train_on or (validation and not validate_on):
        raise ValueError(
            f"{data}: without unreadable cases there are {len(train_on)} to train on and {len(validate_on)} to "
            "validate on; at least one of each is needed"
        )
    return RunVolumes(
        [volumes[c] for c in train_on], train_on, [volumes[c] for c in validate_on], validate_on, excluded
    )
