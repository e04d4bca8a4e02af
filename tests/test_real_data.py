"""The whole path on real CT; runs where HYSPARK_REAL_DATA names a folder with OpenKBP and body CTs in nnU-Net
layout.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from hyspark.data import datalist
from hyspark.engine.evaluate import read_scores
from hyspark.engine.finetune import finetune
from hyspark.engine.pretrain import pretrain
from hyspark.engine.pretraining import encoder_file

REAL = os.environ.get("HYSPARK_REAL_DATA", "")
pytestmark = pytest.mark.skipif(not REAL, reason="HYSPARK_REAL_DATA is not set")


def test_pretraining_and_finetuning_on_real_ct(pretraining, finetuning, tmp_path):
    cases = (
        datalist.build(Path(REAL) / "Dataset501_OpenKBP").training[:2]
        + datalist.build(Path(REAL) / "Dataset502_BodyCT").training[:2]
    )
    datalist.write(datalist.Datalist(training=cases), tmp_path / "dataset.json")
    config = replace(pretraining, data_path=str(tmp_path), ep=1)
    pretrain(config)
    values = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(m.get("loss", m.get("val_loss"))) for m in values)
    labelled = datalist.build(Path(REAL) / "Dataset501_OpenKBP", labels=True, splits="auto")
    few = replace(labelled, training=labelled.training[:2], validation=labelled.validation[:1])
    datalist.write(few, tmp_path / "labelled.json")
    tuned = replace(
        finetuning,
        data_dir=str(tmp_path),
        json_list="labelled.json",
        store_dir=str(tmp_path / "prepared"),
        pretrained=str(encoder_file(config)),
        spacing=config.spacing,
        max_epochs=2,
    )
    finetune(tuned)
    organs = read_scores(tuned.run_folder)["last"]
    assert list(organs) == ["Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Mandible"]
    assert all(math.isnan(v) or 0 <= v <= 1 for v in organs.values())
