"""The README's picture can be drawn again from any data set, with the shipped weights."""

import importlib
from pathlib import Path

from matplotlib.image import imread

ROOT = Path(__file__).parents[2]


def test_the_median_case_is_drawn(phantoms, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    reconstruction = importlib.import_module("reconstruction")
    (labelled,) = phantoms.glob("*Labelled")
    weights, out = str(ROOT / "ckpt" / "hyspark_openkbp.safetensors"), tmp_path / "picture.png"
    arguments = ["--data", str(labelled), "--weights", weights, "--out", str(out), "--size", "32", "32", "32"]
    reconstruction.main(reconstruction.Arguments().parse_args(arguments))
    assert imread(out).shape[2] == 4
    assert "matched     230 keys" in capsys.readouterr().out
