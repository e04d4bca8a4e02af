"""The losses of ten steps of each kind of training are what they were: moving code changes no number.

On the machine that the fixture was recorded on they are the same to the bit, elsewhere to rounding.
"""

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyspark.tasks.classification import run_classification
from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.segmentation import run_segmentation
from tests.tasks.kinds import PRETRAININGS

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "losses.json").read_text())
STEPS = 10


def environment() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else "",
    }


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def assert_recorded(kind: str, folder: Path) -> None:
    found = losses(folder)
    assert len(found) == STEPS
    if RECORDED["environment"] == environment():
        assert found == RECORDED["losses"][kind]
    else:
        assert found == pytest.approx(RECORDED["losses"][kind], rel=1e-3)


@pytest.mark.slow
def test_masked_pretraining(pretraining):
    assert_recorded("masked", run_pretraining(replace(pretraining, epochs=4, max_steps=STEPS)))


@pytest.mark.slow
def test_contrastive_pretraining(pretraining):
    config = replace(pretraining, **PRETRAININGS["moco"], epochs=4, max_steps=STEPS)
    assert_recorded("contrastive", run_pretraining(config))


@pytest.mark.slow
def test_segmentation(finetuning):
    assert_recorded("segmentation", run_segmentation(replace(finetuning, epochs=STEPS, val_every=STEPS)))


@pytest.mark.slow
def test_classification(classifying):
    assert_recorded("classification", run_classification(replace(classifying, epochs=5, val_every=5)))
