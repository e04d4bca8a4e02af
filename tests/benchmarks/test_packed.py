"""benchmarks/packed.py: every side at toy size, what is compared, and what is said where something is missing."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MASKED_LAYERS = """
from torch import nn

_cur_active = None


class Masked(nn.Conv3d):
    def forward(self, x):
        out, mask = super().forward(x), _cur_active
        for axis in (2, 3, 4):
            mask = mask.repeat_interleave(out.shape[axis] // mask.shape[axis], axis)
        return out * mask


def convert_to_spark_cnn(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Conv3d):
            masked = Masked(child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
            masked.load_state_dict(child.state_dict())
            module.add_module(name, masked)
        else:
            convert_to_spark_cnn(child)
    return module
"""
"""Masked convolutions by the interface of nnssl's module."""
FACTORY = """
from torch import nn


def convolutions(in_channels, axes):
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
    return nn.Sequential(conv(in_channels, 4, 3, padding=1), nn.ReLU(), conv(4, 8, 3, 2, 1), nn.ReLU())
"""


@pytest.fixture(autouse=True)
def _modules(monkeypatch, tmp_path) -> None:
    (tmp_path / "toy_network.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    """The command, with everything in this process."""
    module = importlib.import_module("packed")
    monkeypatch.setattr(module, "in_fresh_process", lambda function: (function(), 0))
    monkeypatch.setattr(module.sides, "in_fresh_process", lambda function: (function(), 0))
    return module


@pytest.fixture
def nnssl(tmp_path) -> Path:
    path = tmp_path / "nnssl" / "src" / "nnssl" / "architectures" / "spark_utils.py"
    path.parent.mkdir(parents=True)
    path.write_text(MASKED_LAYERS)
    return tmp_path / "nnssl"


def test_all_sides_of_a_network_at_toy_size(bench, nnssl, tmp_path, capsys):
    words = ["--networks", "toy_network:convolutions", "--edge", "8", "--repeats", "1", "--nnssl", str(nnssl)]
    assert bench.main([*words, "--batch_size", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "packed.json").read_text())["networks"]["toy_network:convolutions"]
    assert set(found["times"]) == set(found["memory"]) == {"packed", "hidden", "dense", "S3D"}
    for side, differences in found["differences"].items():
        assert max(differences.values()) < 1e-12, side
    table = (tmp_path / "packed.md").read_text()
    assert "| toy_network:convolutions | 2 of 8^3 | 0.75 |" in table
    assert table in capsys.readouterr().out + "\n"


def test_differences_are_seen(bench):
    """A side that computes something else is not equal."""
    sides = bench.sides
    case = sides.Case("toy_network:convolutions", 8, 0.75, 2, checked_edge=8)
    assert sides.differences(case, sides.How(), "dense")["values"] > 1e-3
    assert sides.differences(case, sides.How(), "dense")["gradients"] > 1e-3


def test_s3d_only_where_all_layers_are_converted(bench, nnssl):
    sides = bench.sides
    how = sides.How(nnssl=str(nnssl))
    case = sides.Case("monai/segresnet", 16, 0.75, 1, checked_edge=16)
    assert "S3D" not in sides.possible_sides(case, how)
    assert "S3D" in sides.possible_sides(replace(case, network="toy_network:convolutions"), how)
    assert "S3D" not in sides.possible_sides(replace(case, network="toy_network:convolutions", axes=2), how)


def test_what_is_missing_is_one_line(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.planned, "PACKAGE", "package_that_is_missing")
    assert bench.main(["--networks", "resenc_m", "--out", str(tmp_path)]) == 0
    assert "resenc_m: skipped; package_that_is_missing is not installed: pip install" in capsys.readouterr().out
    for words, message in (
        (["--nnssl", str(tmp_path)], "expected a checkout of nnssl with src/nnssl"),
        (["--networks", "timm/none_such", "--axes", "2"], "timm/none_such: timm has no such network"),
    ):
        assert bench.main([*words, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
