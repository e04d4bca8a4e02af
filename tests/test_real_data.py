"""The whole path on real CT; runs where HYSPARK_REAL_DATA names a folder with OpenKBP and body CTs in nnU-Net
layout.
"""

import json
import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyspark.data.datasets import build, datalist_json
from hyspark.data.datasets import cases as datasets_cases
from hyspark.data.settings import PictureSettings
from hyspark.data.slices.write_slices import write_slices
from hyspark.evaluation.protocol import read_summary
from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.segmentation import run_segmentation
from hyspark.training.run_folder import encoder_file

REAL = os.environ.get("HYSPARK_REAL_DATA", "")
pytestmark = pytest.mark.skipif(not REAL, reason="HYSPARK_REAL_DATA is not set")


def test_pretraining_and_finetuning_on_real_ct(pretraining, finetuning, tmp_path):
    cases = (
        build.build_datalist(Path(REAL) / "Dataset501_OpenKBP").training[:2]
        + build.build_datalist(Path(REAL) / "Dataset502_BodyCT").training[:2]
    )
    datalist_json.write_datalist(datasets_cases.Datalist(training=cases), tmp_path / "dataset.json")
    config = replace(pretraining, data=str(tmp_path), epochs=1)
    run_pretraining(config)
    values = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(m.get("loss", m.get("val_loss"))) for m in values)
    labelled = build.build_datalist(Path(REAL) / "Dataset501_OpenKBP", labels=True, splits="auto")
    few = replace(labelled, training=labelled.training[:2], validation=labelled.validation[:1])
    datalist_json.write_datalist(few, tmp_path / "labelled.json")
    tuned = replace(
        finetuning,
        data=str(tmp_path),
        json_list="labelled.json",
        store_dir=str(tmp_path / "prepared"),
        weights=str(encoder_file(config)),
        spacing=config.spacing,
        epochs=2,
    )
    run_segmentation(tuned)
    organs = read_summary(tuned.run_folder / "scores")["organs"]
    assert list(organs) == ["Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Mandible"]
    assert all(row["dice"] is None or 0 <= row["dice"] <= 1 for row in organs.values())


def test_slices_of_a_raw_dicom_series(tmp_path):
    settings = PictureSettings(hu_min=-1024.0, size=64)
    record = write_slices(
        [Path(REAL) / "dicom"], tmp_path, settings, keep_patient_id=True, num_workers=1, progress=False
    )
    ((name, entry),) = record["volumes"].items()
    assert (entry["patient"], entry["slices"], entry["notes"]) == ("C3L-00189", 35, [])
    assert (record["failed"], record["skipped"], record["files_of_other_kinds"]) == ([], [], {})
    shown = [np.asarray(Image.open(tmp_path / "train" / "1" / f"{name}_{k:04d}.png")).astype(float) for k in range(35)]
    steps = [np.abs(a - b).mean() for a, b in pairwise(shown)]
    assert max(steps) < np.abs(shown[0] - shown[-1]).mean()  # neighbours are alike: the files are in order
