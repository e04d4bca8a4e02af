"""Segmentation as a kind of comparison (see benefit.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hyspark.benefit_page import write_benefit
from hyspark.comparison import Place, compare, read_run
from hyspark.config_finetune import FinetuneConfig, check_decoder
from hyspark.data.cases import cases_digest
from hyspark.data.files import text_digest
from hyspark.data.prepare import is_there
from hyspark.engine.compared import Kind
from hyspark.engine.distributed import Processes
from hyspark.engine.evaluate import find_labelled
from hyspark.engine.finetune import build
from hyspark.engine.held_out import prepare_held_out
from hyspark.engine.labelled import find_cases, label_fault
from hyspark.engine.prepared import usable
from hyspark.engine.starting import load_start


def scores_folder(config: FinetuneConfig) -> Path:
    """Of the cases in test_dir where there is one, else of the validation cases."""
    return config.run_folder / ("scores_test" if config.test_dir else "scores")


def num_training(config: FinetuneConfig) -> int:
    """Labelled training cases."""
    return len(find_cases(config)[0])


def digest(config: FinetuneConfig) -> str:
    """Of the names and files of all cases to train on, to validate on and to score further, in 12 digits."""
    training, validation, _ = find_cases(replace(config, num_labelled=0, label_fraction=1.0))
    further = find_labelled(Path(config.test_dir), "all").cases if config.test_dir else []
    parts = [cases_digest([c for c in part if is_there(c)]) for part in (training, validation, further)]
    return text_digest(parts)


def check_data(configs: Sequence[FinetuneConfig], starts: Mapping[str, str]) -> None:
    """Look at the data and load each start once, and prepare the volumes, which runs side by side would all make.

    Raises ValueError or FileNotFoundError for data or weights that do not fit.
    """
    check_decoder(configs[0])
    largest = {config.seed: config for config in sorted(configs, key=lambda config: config.num_labelled)}
    found = [(config, *find_cases(config)) for config in largest.values()]
    config, _, _, names = found[0]
    for name, weights in starts.items():
        if weights != "none":
            print(f"start {name}: {weights}\n{load_start(build(config, len(names)), weights, config)}")
    here = Processes(torch.device("cpu"))
    for config, training, validation, _ in found:
        usable(config, here, Path(config.data_dir), training, validation, None, partial(label_fault, names=names))
    prepare_held_out(config, here, names)


def report(
    out: Path,
    finished: Mapping[Place, FinetuneConfig],
    planned: Sequence[Place],
    starts: Mapping[str, str],
    more: Mapping[str, Any],
) -> None:
    """Dice, surfaces and missed organs against the number of labelled cases."""
    scored = {
        place: read_run(scores_folder(c), c.run_folder / "metrics.jsonl", c.batch_size * c.crops_per_volume)
        for place, c in finished.items()
    }
    write_benefit(out, compare(scored, planned, starts) | dict(more))


KIND = Kind("finetune", scores_folder, num_training, digest, check_data, report)
