"""Further labelled cases (`test_dir`) that a fine-tuning run is scored on once, with its last weights."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from hyspark.config_finetune import FinetuneConfig
from hyspark.data.cases import Case
from hyspark.data.store import StoredVolume
from hyspark.engine import scorebook
from hyspark.engine.distributed import Processes
from hyspark.engine.evaluate import check_classes, find_labelled, score_cases
from hyspark.engine.labelled import check_labels
from hyspark.engine.prepared import prepared


def prepare_held_out(
    config: FinetuneConfig, processes: Processes, names: Sequence[str]
) -> tuple[list[StoredVolume], list[Case]]:
    """The cases of test_dir, prepared; none where the settings name no folder.

    Raises ValueError or FileNotFoundError where there are none, or their classes are others than the run's.
    """
    if not config.test_dir:
        return [], []
    folder = Path(config.test_dir)
    cases, labels = find_labelled(folder)
    check_classes(names, labels, folder)
    volumes = prepared(config, processes, folder, cases)
    check_labels(volumes, names)
    return volumes, cases


def score_held_out(
    network: nn.Module,
    config: FinetuneConfig,
    names: Sequence[str],
    volumes: Sequence[StoredVolume],
    cases: Sequence[Case],
    processes: Processes,
    weights: str,
) -> None:
    """Write scores_test in the run's folder, unless it holds the scores of these weights already.

    weights: what the protocol calls them; the rest as in `score_cases`.
    """
    out = config.run_folder / "scores_test"
    known = scorebook.read_summary(out)["protocol"] if (out / "summary.json").is_file() else {}
    if cases and (known.get("weights"), known.get("num_cases")) != (weights, len(cases)):
        score_cases(network, config, names, volumes, cases, out, processes, weights=weights)
