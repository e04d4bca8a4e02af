"""Files from others are read, never run; what they say does not reach where it should not."""

import ast
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch

import hyspark
from hyspark.data.datasets import data_folder, datalist_json
from hyspark.data.datasets.cases import Case, Datalist
from hyspark.data.preprocessing.entry_files import is_intact
from hyspark.data.preprocessing.prepare import prepare_missing, stored_volumes
from hyspark.data.preprocessing.store import cumulative_counts, open_array
from hyspark.data.settings import PrepareSettings
from hyspark.evaluation.segmentation.inference import load_network
from hyspark.models.masked_autoencoder import build_hyspark
from hyspark.models.weights.load import load_pretrained
from hyspark.tasks.pretrain import run_pretraining
from hyspark.training import checkpoint
from hyspark.training.run_folder import checkpoint_file

SOURCE = Path(hyspark.__file__).parent
PATIENT = "DOE^JANE"


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """The file that must not appear, and an object that would make it."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()  # the trap works
    path.unlink()
    yield Evil(path)
    assert not path.exists()


def readers():
    """Everything that reads weights or states."""
    small = {"widths": (6, 6, 12, 12, 24), "depths": (1,) * 5, "expansions": (2,) * 5, "vit_depth": 1}
    model = build_hyspark(32, decoder_width=16, **small)
    return [checkpoint.read_checkpoint, lambda path: load_pretrained(model, path), load_network]


@pytest.mark.parametrize("reader", range(3))
@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_no_pickle_in_a_checkpoint_is_executed(tmp_path, trap, reader, form):
    path = tmp_path / "evil.pth"
    content = {"format": 1, "optimizer": {}, "model": {"weight": torch.ones(1)}, "config": trap}
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        readers()[reader](path)


def test_no_pickle_in_a_run_folder_is_executed(pretraining, trap):
    pretraining.run_folder.mkdir(parents=True)
    torch.save({"optimizer": trap}, checkpoint_file(pretraining))
    with pytest.raises(ValueError, match="no checkpoint of this run is intact"):
        run_pretraining(pretraining)


def test_no_pickle_in_the_store_is_executed(tmp_path, trap):
    cases, settings, store = [write_case(tmp_path)], PrepareSettings(), tmp_path / "store"
    assert not prepare_missing(cases, settings, store, 1, progress=False)
    (volume,) = stored_volumes(cases, settings, store)
    np.save(volume.folder / "counts.npy", np.array([trap], dtype=object), allow_pickle=True)
    assert not is_intact(volume.folder)
    with pytest.raises(ValueError, match="allow_pickle"):
        cumulative_counts(volume.folder)


def test_no_program_in_the_store_is_run(tmp_path, monkeypatch):
    """An array of blosc2 that is computed by an expression in its file."""
    operand = blosc2.asarray(np.arange(8.0), urlpath=str(tmp_path / "a.b2nd"))
    lazy = tmp_path / "image.b2nd"
    blosc2.lazyexpr("a + 1", {"a": operand}).save(urlpath=str(lazy))
    monkeypatch.setattr(blosc2, "open", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(ValueError, match="expected an array, got a program"):
        open_array(lazy)


def write_case(folder, name="a", **header):
    voxels = np.random.default_rng(0).normal(0, 80, (40, 40, 40)).astype(np.float32)
    image = nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1]))
    for field, text in header.items():
        image.header[field] = text
    path = folder / "Dataset001_Evil" / "imagesTr" / f"{name}_0000.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return Case(name, "Dataset001_Evil", path)


def below(folder):
    return {path for path in folder.rglob("*")}


def test_a_data_list_cannot_have_files_written_elsewhere(pretraining, tmp_path):
    """Paths that climb out of the folder, and names that look like paths, are for reading alone."""
    outside = tmp_path / "outside"
    data = tmp_path / "data"
    data.mkdir()
    names = ["..", "..nii", "a;rm -rf x", "<script>alert(1)<", "-flag"]
    for name in names:
        write_case(outside, name)
    images = [f"../outside/Dataset001_Evil/imagesTr/{name}_0000.nii.gz" for name in names]
    (data / "dataset.json").write_text(json.dumps({"training": images[3:], "validation": images[:3]}))
    before = below(tmp_path)
    run_pretraining(replace(pretraining, data=str(data), max_steps=1, batch_size=1))
    written = below(tmp_path) - before
    assert written
    assert all({data / "prepared", pretraining.run_folder} & {path, *path.parents} for path in written)


def test_the_report_escapes_names_and_holds_no_header_text(pretraining, tmp_path):
    data = tmp_path / "data"
    for name in ("<b>bold<", "second", "third"):
        write_case(data, name, descrip=PATIENT, aux_file="19510203")
    bad = data / "Dataset001_Evil" / "imagesTr" / "<i>bad<_0000.nii.gz"
    bad.write_bytes(b"no volume")
    found = data_folder.find_cases(data).cases
    listed = Datalist(tuple(c for c in found if c.name != "third"), tuple(c for c in found if c.name == "third"))
    datalist_json.write_datalist(listed, data / "dataset.json")
    config = replace(pretraining, data=str(data), max_steps=1, batch_size=1, on_bad_case="skip", picture_every=1)
    page = (run_pretraining(config) / "report.html").read_text()
    assert "&lt;i&gt;bad&lt;" in page
    assert "<i>bad" not in page
    assert "<b>bold" not in page
    for path in pretraining.run_folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert PATIENT.encode() not in content
            assert b"19510203" not in content


UNSAFE = {"tarfile", "zipfile", "marshal", "shelve", "dill"}
"""Modules that extract archives or execute what they read; pickle is imported for the name of its error."""


def test_no_module_unpickles_extracts_or_evaluates():
    """Archives are nowhere extracted; torch and numpy are never told to unpickle; YAML is loaded safely."""
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & UNSAFE, path
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in ("eval", "exec", "yaml.load", "__import__", "pickle.load", "pickle.loads"), path
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            if name == "np.load":
                assert keywords.get("allow_pickle") == "False", path
    assert not re.search(r"shell\s*=\s*True|os\.system", "".join(p.read_text() for p in SOURCE.rglob("*.py")))
