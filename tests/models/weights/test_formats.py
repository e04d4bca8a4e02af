"""Every kind of file is read, or named for what it is with advice that works when it is typed; nothing is executed."""

import argparse
import collections
import contextlib
import datetime
import enum
import functools
import gzip
import json
import os
import pickle
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from hyspark import load_pretrained
from hyspark.models.weights.files import read_contents
from tests.models.weights.tiny import Tiny, has_loaded, numbers

OWN = numbers(1)


class Colour(enum.Enum):
    RED = 1


class Settings:
    def __init__(self):
        self.lr = 0.1


class Slots:
    __slots__ = ("lr",)

    def __init__(self):
        self.lr = 0.1


class Options(dict):
    pass


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


OBJECTS = {
    "namespace": argparse.Namespace(lr=0.1),
    "numpy numbers": [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True), np.str_("x")],
    "numpy arrays": [np.zeros(3), np.array([None, {}], dtype=object), np.dtype("f4"), np.random.get_state()],
    "numpy's generator": np.random.default_rng(0),
    "a path": Path("x"),
    "a date": datetime.datetime.now(),
    "collections": [collections.defaultdict(list, {1: [2]}), collections.deque([1]), frozenset([1])],
    "a class": torch.optim.AdamW,
    "a function": functools.partial(torch.add, 1),
    "an enumeration": Colour.RED,
    "objects": [Settings(), Slots(), Options(a=1)],
    "types": [dict[str, int], typing.Dict[str, int]],  # noqa: UP006 - as OmegaConf stores them
    "a module": nn.CrossEntropyLoss(weight=torch.ones(2)),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, so that advice is typed as printed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(contents, name="w.pth", form="zip"):
    if form.startswith("pickle"):
        Path(name).write_bytes(pickle.dumps(contents, protocol=int(form[-1])))
    else:
        torch.save(contents, name, _use_new_zipfile_serialization=form == "zip")
    return name


def message(path):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(path))) as error:
        load_pretrained(Tiny(), path)
    assert "\n" not in str(error.value)
    return str(error.value)


def advice(path):
    """The command or line of Python in a message."""
    return message(path).split("`")[1]


@pytest.mark.parametrize("form", ["zip", "old", "pickle2", "pickle4"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_the_weights_are_no_obstacle(folder, kind, form):
    if kind == "a module" and form == "old":
        pytest.skip("see the test of whole modules")
    write({"network_weights": OWN, "extra": OBJECTS[kind]}, form=form)
    model = Tiny()
    load_pretrained(model, "w.pth")
    assert has_loaded(model, OWN)


def test_plain_data_of_objects_is_read(folder):
    contents = read_contents(write({"model": OWN, "args": argparse.Namespace(lr=0.5), "loss": np.float64(0.25)}))
    assert contents["args"]["lr"] == 0.5
    assert contents["loss"] == 0.25


@pytest.mark.parametrize("form", ["zip", "pickle2", "pickle4"])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"epoch": 3, "model": net}])
def test_whole_modules_are_read_without_their_classes(folder, form, wrap):
    source = Tiny()
    source.register_buffer("passing", torch.ones(1), persistent=False)
    model = Tiny()
    assert load_pretrained(model, write(wrap(source), form=form)).missing == ()
    assert has_loaded(model, source.state_dict())


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_of_an_old_file_is_written_anew_as_advised(folder):
    source = Tiny()
    line = advice(write({"model": source}, form="old"))
    exec(line, {"torch": torch})
    model = Tiny()
    load_pretrained(model, "plain.pth")
    assert has_loaded(model, source.state_dict())


@pytest.mark.parametrize("form", ["zip", "old", "pickle2", "pickle4"])
@pytest.mark.parametrize("function", [os.system, Path.touch, eval, exec, subprocess.run])
def test_what_would_run_code_is_refused_and_does_not_run(folder, function, form):
    args = {Path.touch: Path("ran"), exec: "open('ran', 'w')", eval: "open('ran', 'w')"}.get(function, "touch ran")
    said = message(write({"model": OWN, "extra": Calls(function, args)}, form=form))
    assert "Python objects other than tensors, which could run code" in said
    assert not Path("ran").exists()
    if function in (os.system, Path.touch):
        assert "`" not in said  # no way to run it is printed


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"a": [weights]}])
def test_the_advice_for_a_trusted_file_works(folder, wrap):
    line = advice(write({"extra": Calls(eval, "1")} | wrap(OWN)))
    exec(line, {"torch": torch})
    model = Tiny()
    load_pretrained(model, "plain.pth")
    assert has_loaded(model, OWN)


# --- other formats


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.npz", "a.bin"])
@pytest.mark.parametrize("form", ["torch", "safetensors", "npz"])
def test_the_content_decides_the_format_not_the_name(folder, name, form):
    if form == "npz":
        with open(name, "wb") as file:
            np.savez(file, **{key: value.numpy() for key, value in OWN.items()})
    else:
        (torch.save if form == "torch" else save_file)(OWN, name)
    model = Tiny()
    load_pretrained(model, name)
    assert has_loaded(model, OWN)


def test_detectron2s_pickle_of_arrays(folder):
    arrays = {key: value.numpy() for key, value in OWN.items()}
    write({"model": arrays, "__author__": "me", "matching_heuristics": True}, "a.pkl", "pickle4")
    model = Tiny()
    load_pretrained(model, "a.pkl")
    assert has_loaded(model, OWN)


@pytest.fixture
def parts(folder):
    names = list(OWN)
    by_name = {}
    for part, chosen in enumerate((names[:9], names[9:]), start=1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: OWN[name] for name in chosen}, file)
        by_name |= dict.fromkeys(chosen, file)
    Path("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": by_name}))
    return "model.safetensors.index.json"


def test_parts_are_read_by_their_index(parts):
    model = Tiny()
    assert load_pretrained(model, parts).missing == ()
    assert has_loaded(model, OWN)
    assert f"one of 2 files of one state dict; give their index, {parts}" in message("model-00001-of-00002.safetensors")
    Path("model-00002-of-00002.safetensors").unlink()
    assert "1 of its 2 files are missing (model-00002-of-00002.safetensors)" in message(parts)


def test_an_index_cannot_name_files_elsewhere(folder):
    Path("a.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.pth"}}))
    assert "expected names of files in its folder, got '../secret.pth'" in message("a.index.json")


CONTENT = {
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
    "page.pth": (b"\n<!DOCTYPE html><html><title>Quota exceeded</title>", "a web page or an error message"),
    "error.pth": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "(AccessDenied)"),
    "empty.pth": (b"", "the file is empty"),
    "text.pth": (b"hello\n", "a text, no weights (it begins 'hello')"),
    "log.csv": ("Mühe, Ärger\n" * 999, "a text, no weights"),
    "noise.pth": (bytes(range(1, 256)) * 9, "of no format of weights known here; is it damaged or truncated"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "Keras and TensorFlow"),
    "net.onnx": (b"\x08\x08\x12\x07pytorch" + bytes(99), "an ONNX model"),
    "tf.ckpt.data-00000-of-00001": (bytes(99), "part of a TensorFlow checkpoint"),
    "lite.pth": (b"\x1c\0\0\0TFL3" + bytes(99), "TensorFlow Lite"),
    "llm.gguf": (b"GGUF\3" + bytes(99), "quantised model in GGUF"),
    "scan.nii": (b"\x5c\1\0\0" + bytes(340) + b"n+1\0", "a NIfTI volume"),
    "cut.pth": (b"PK\3\4" + bytes(99), "damaged or truncated"),
    "array.npy": (None, "one tensor (3,) without a name"),
    "objects.npy": (None, "contains Python objects"),
}


@pytest.mark.parametrize("name", CONTENT)
def test_other_files_are_named(folder, name):
    content, says = CONTENT[name]
    if name == "array.npy":
        np.save(name, np.zeros(3))
    elif name == "objects.npy":
        np.save(name, {key: value.numpy() for key, value in OWN.items()}, allow_pickle=True)
    else:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert says in message(name)


def test_the_advice_for_objects_of_numpy_works(folder):
    np.save("a.npy", {key: value.numpy() for key, value in OWN.items()}, allow_pickle=True)
    exec(advice("a.npy"), {"torch": torch, "numpy": np})
    model = Tiny()
    load_pretrained(model, "plain.pth")
    assert has_loaded(model, OWN)


@pytest.mark.parametrize("kind", ["gzip", "gzip by its name", "tar", "zip"])
def test_the_advice_for_compressed_files_works(folder, kind):
    content = Path(write(OWN, "w x.pth")).read_bytes()
    name = {"gzip by its name": "w x.pth.gz", "zip": "w.zip"}.get(kind, "packed")
    if kind.startswith("gzip"):
        Path(name).write_bytes(gzip.compress(content, 1))
    elif kind == "tar":
        with tarfile.open(name, "w") as archive:
            archive.add("w x.pth")
    else:
        with zipfile.ZipFile(name, "w") as archive:
            archive.write("w x.pth")
    Path("w x.pth").unlink()
    line = advice(name).replace("python ", f"{sys.executable} ")
    subprocess.run(line, shell=True, check=True)
    (file,) = (path for path in Path().rglob("*.pth"))
    model = Tiny()
    load_pretrained(model, file)
    assert has_loaded(model, OWN)


def test_the_advice_for_programs_works(folder):
    net = nn.Sequential(collections.OrderedDict(conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 3, 8, 8)), "script.pt")
        torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 8, 8),)), "exported.pt2")
        for name, says in (("script.pt", "TorchScript"), ("exported.pt2", "torch.export")):
            assert says in message(name)
            exec(advice(name), {"torch": torch})
            other = nn.Sequential(collections.OrderedDict(conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4)))
            assert load_pretrained(other, "plain.pth").missing == ()
            assert has_loaded(other, net.state_dict())


FOLDERS = {
    "hf": (("README.md", "model.safetensors"), "hf/model.safetensors: unreadable as weights; the file is empty"),
    "several": (("best.pth", "last.pth"), "a folder; give one of its files: best.pth, last.pth"),
    "unpacked": (("data.pkl", "data"), "an unpacked file of torch.save"),
    "distributed": ((".metadata", "__0_0.distcp"), "format_utils dcp_to_torch distributed plain.pth"),
    "deepspeed": (("zero_to_fp32.py", "latest"), "python zero_to_fp32.py"),
    "tensorflow": (("saved_model.pb",), "a TensorFlow graph"),
    "nothing": ((), "a folder without files of weights"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_named(folder, name):
    files, says = FOLDERS[name]
    Path(name).mkdir()
    for file in files:
        Path(name, file).touch()
    assert says in message(name)


HUB_FOLDERS = {
    "usual name": ("pytorch_model.bin", "training_args.bin", "optimizer.pt"),
    "the safer one of two": ("model.safetensors", "pytorch_model.bin"),
    "the only one": ("checkpoint_final.pth", "adaptation_plan.json", "vocab.txt"),
}


@pytest.mark.parametrize("name", HUB_FOLDERS)
def test_a_folder_as_on_the_hub_is_read(folder, name):
    used, *others = HUB_FOLDERS[name]
    Path("net").mkdir()
    for other in others:
        Path("net", other).write_bytes(b"no weights")
    Path("net/config.json").write_text('{"model_type": "resnet"}')
    save_file(OWN, f"net/{used}") if used.endswith("safetensors") else torch.save(OWN, f"net/{used}")
    model = Tiny()
    load_pretrained(model, "net")
    assert has_loaded(model, OWN)
    Path("net/config.json").write_text('{"model_type": ')
    assert "net/config.json: damaged; expected JSON" in message("net")


def test_a_tensor_that_save_model_writes_once_is_found_under_all_names(folder):
    """By safetensors' own writer."""
    network = nn.ModuleDict({"first": nn.Linear(2, 3), "second": nn.Linear(2, 3)})
    network["second"].weight = network["first"].weight
    save_model(network, "tied.safetensors")
    stored = load_file("tied.safetensors")
    read = read_contents("tied.safetensors")["model"]
    assert len(stored) == 3
    assert read.keys() == network.state_dict().keys()
    assert torch.equal(read["first.weight"], read["second.weight"])


def test_the_advice_for_a_folder_of_parts_works(folder, monkeypatch):
    with contextlib.redirect_stderr(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save({"model": OWN}, checkpoint_id="parts")
    python, m, module, *words = shlex.split(advice("parts"))
    assert (python, m) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *words])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module is imported already
        runpy.run_module(module, run_name="__main__")
    model = Tiny()
    load_pretrained(model, "plain.pth")
    assert has_loaded(model, OWN)


def test_an_address_is_no_file():
    assert "https://x.org/a.pth: no such file; download it first" in message("https://x.org/a.pth")
