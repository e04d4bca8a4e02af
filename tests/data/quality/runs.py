"""What `check` finds in a data set, and what each run does with it: the real ways up to the first step."""

import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hyspark.cli.run_verb import EXPECTED, raised_here
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.segmentation import SegmentationConfig
from hyspark.data.datasets import build, datalist_json
from hyspark.data.datasets.cases import Case
from hyspark.data.datasets.inputs import read_inputs
from hyspark.data.quality.check import check_dataset
from hyspark.data.quality.findings import Finding
from hyspark.data.readers.find import find_volumes
from hyspark.data.readers.nifti import read_label
from hyspark.data.readers.volumes import read_volume
from hyspark.evaluation.segmentation.labelled_data import find_labelled
from hyspark.evaluation.segmentation.prepare_ahead import prepared_or_reason
from hyspark.reports.data_check_page import data_check_text, data_set_facts
from hyspark.tasks.pretrain import find_pretraining_cases
from hyspark.training.distributed import Processes, find_processes
from hyspark.training.labelled_cases import find_labelled_cases, label_fault
from hyspark.training.run_volumes import prepare_run_volumes
from hyspark.utils.text import first_line
from tests.data.quality.small_data import SPACING, SmallData

REFUSALS = (ValueError, RuntimeError, OSError, EOFError)
OF_LABELS = (
    "label outside 0 to 255",
    "label not whole",
    "label elsewhere",
    "label of another shape",
    "undeclared class",
)
VERBS = ("finetune", "pretrain", "evaluate", "predict", "slices")


@dataclass
class Outcome:
    """What a run does.

    Attributes:
        cases: the cases that it found.
        refused: images of the cases that it refuses by name.
        stopped: the message with which it refuses the data set; empty if it does not.
        crash: the traceback of an error that is not for the user; empty if there is none.
        messages: what it says of each refused image.
    """

    cases: list[Case] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)
    stopped: str = ""
    crash: str = ""
    messages: dict[Path, str] = field(default_factory=dict)


@dataclass
class Checked:
    """What `check` finds.

    Attributes:
        cases: the cases that it examined.
        findings: its findings.
        stopped: the message with which it refuses to begin; empty if it begins.
        crash: the traceback of an error that is not for the user; empty if there is none.
    """

    cases: list[Case] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    stopped: str = ""
    crash: str = ""

    def errors_of(self, case: Case) -> list[Finding]:
        """Its errors at the files of a case; one image may be another's label."""
        files = {str(path) for path in case.files}
        found = [f for f in self.findings if f.severity == "error" and f.file in files]
        return [f for f in found if case.label or f.kind not in OF_LABELS]

    @property
    def set_errors(self) -> list[Finding]:
        """Its errors that are not at a file of an examined case."""
        files = {str(path) for case in self.cases for path in case.files}
        return [f for f in self.findings if f.severity == "error" and f.file not in files]


def guarded(outcome: Outcome | Checked, function: Callable[[], object]) -> None:
    """Call a function; note errors as the command line treats them."""
    try:
        function()
    except EXPECTED as error:
        if isinstance(error, OSError) or raised_here(error):
            outcome.stopped = str(error) or repr(error)
        else:
            outcome.crash = traceback.format_exc()
    except Exception:
        outcome.crash = traceback.format_exc()


def run_check(data: SmallData, path: Path | None = None, **settings: object) -> Checked:
    """Check as the verb does, without its page."""
    seen = Checked()

    def look() -> None:
        examined, found = check_dataset(path or data.folder, spacing=SPACING, num_workers=1, progress=False, **settings)
        seen.cases = [case.case for case in examined]
        seen.findings = [*(finding for case in examined for finding in case.findings), *found.findings]
        data_check_text(examined, found.findings, data_set_facts(examined, None, SPACING))

    guarded(seen, look)
    return seen


def attribute(outcome: Outcome) -> None:
    """Turn a message that lists broken cases into these cases; a message without such a list refuses the data set."""
    found = re.match(r"(\d+) of \d+ volumes are unusable", outcome.stopped)
    if not found:
        return
    for line in outcome.stopped.splitlines()[1:]:
        for case in outcome.cases:
            if any(str(path) in line for path in case.files):
                outcome.refused.add(case.image)
                outcome.messages[case.image] = f"{outcome.messages.get(case.image, '')}\n{line.strip()}".strip()
    if len(outcome.refused) == int(found[1]):
        outcome.stopped = ""


class Runs:
    """The runs, with one store for all data sets, so that a sound case is prepared once.

    Attributes:
        store: folder of the store.
        intensity: settings of intensities and channels.
    """

    def __init__(self, store: Path, **intensity: object) -> None:
        self.store = store
        self.intensity = intensity
        self.channels: tuple[int, ...] = intensity.get("image_channels", (0,))
        self.processes: Processes = find_processes("cpu")
        self.predicted: set[bytes] = set()

    @property
    def settings(self) -> dict[str, object]:
        return {
            "store_dir": str(self.store),
            "spacing": SPACING,
            "prepare_workers": 1,
            "device": "cpu",
        } | self.intensity

    def finetune(self, data: SmallData) -> Outcome:
        outcome = Outcome()
        config = SegmentationConfig(data=str(data.folder), **self.settings)

        def run() -> None:
            training, validation, names = find_labelled_cases(config)
            outcome.cases = [*training, *validation]
            fault = partial(label_fault, names=names)
            prepare_run_volumes(config, self.processes, data.folder, training, validation, fault)

        guarded(outcome, run)
        attribute(outcome)
        return outcome

    def pretrain(self, data: SmallData) -> Outcome:
        outcome = Outcome()

        def run() -> None:
            path = data.folder
            if not (data.names.is_file() and is_list(data.names)):
                path = data.folder.parent / "list.json"
                datalist_json.write_datalist(build.build_datalist(data.folder, channels=self.channels), path)
            config = PretrainConfig(data=str(path), **self.settings)
            training, validation = find_pretraining_cases(config)
            outcome.cases = [*training, *validation]
            prepare_run_volumes(config, self.processes, path, training, validation)

        guarded(outcome, run)
        attribute(outcome)
        return outcome

    def evaluate(self, data: SmallData) -> Outcome:
        outcome = Outcome()
        config = SegmentationConfig(**self.settings)

        def run() -> None:
            path = data.names if data.names.is_file() and is_list(data.names) else data.folder
            cases, labels, _ = find_labelled(path, "all" if path == data.names else "", channels=self.channels)
            outcome.cases = cases
            values = labels or {f"class_{value}": value for value in range(3)}
            names = [f"class_{value}" for value in range(max(values.values()) + 1)]
            fault = partial(label_fault, names=names)
            prepare_run_volumes(replace(config, data=str(path)), self.processes, path, cases, [], fault)
            for case in cases:
                assert case.label
                read_label(case.label, case.image, len(names), case.ignore)

        guarded(outcome, run)
        attribute(outcome)
        return outcome

    def predict(self, data: SmallData) -> Outcome:
        outcome = Outcome()
        config = SegmentationConfig(**self.settings)

        def run() -> None:
            outcome.cases = read_inputs([data.folder / "imagesTr"], self.channels).cases
            for case in outcome.cases:
                content = case.image.suffix.encode()
                content += b"".join(path.read_bytes() if path.is_file() else b"" for path in case.images)
                if content in self.predicted:
                    continue
                prepared = prepared_or_reason(case, config)
                if isinstance(prepared, str):
                    outcome.refused.add(case.image)
                    outcome.messages[case.image] = prepared
                else:
                    self.predicted.add(content)

        guarded(outcome, run)
        return outcome

    def slices(self, data: SmallData) -> Outcome:
        """The verb `slices` takes volumes of any values, so it refuses fewer of them."""
        outcome = Outcome()

        def run() -> None:
            found = find_volumes([data.folder], min_slices=1, skip=self.store, num_workers=1, progress=False)
            for volume in found.volumes:
                outcome.cases.append(Case(volume.name, "", volume.source))
                try:
                    read_volume(volume)
                except REFUSALS as error:
                    outcome.refused.add(volume.source)
                    outcome.messages[volume.source] = first_line(error)

        guarded(outcome, run)
        return outcome

    def outcomes(self, data: SmallData, verbs: Sequence[str] = VERBS) -> dict[str, Outcome]:
        """The outcome of each verb."""
        return {verb: getattr(self, verb)(data) for verb in verbs}


def is_list(path: Path) -> bool:
    """Whether a JSON is a data list; one that cannot be read is none."""
    try:
        return datalist_json.is_datalist(path)
    except ValueError:
        return False
