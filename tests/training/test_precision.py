"""Precision and kernels: what `auto` means, what a continued run keeps, which switches of torch a setting moves."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import yaml

from hyspark.config.pretrain import PretrainConfig
from hyspark.tasks.pretrain import run_pretraining
from hyspark.training import precision
from hyspark.training.distributed import Processes
from hyspark.training.precision import configure_kernels, cpu_has_bf16, fastest_precision, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def switches() -> list[bool]:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return [cudnn.allow_tf32, cuda.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()]


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    configure_kernels(PretrainConfig())


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_cuda_asks_the_gpu(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    assert fastest_precision(CUDA) == ("bf16" if has_bf16 else "fp32")


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "wanted"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32"), (None, None, "fp32")],
)
def test_auto_on_a_cpu_asks_for_its_arithmetic(monkeypatch, avx512_bf16, amx, wanted):
    for name, value in (("_is_avx512_bf16_supported", avx512_bf16), ("_is_amx_tile_supported", amx)):
        if value is None:  # a torch that cannot tell
            monkeypatch.delattr(torch.cpu, name)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value)
    assert fastest_precision(CPU) == wanted


def test_what_torch_says_of_this_processor_can_be_asked():
    assert cpu_has_bf16() in (True, False)
    assert hasattr(torch.cpu, "_is_avx512_bf16_supported")
    assert hasattr(torch.cpu, "_is_amx_tile_supported")


def test_a_named_precision_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    config = PretrainConfig(precision="fp32")
    assert resolve_precision(config, Processes(CPU)) is config


def test_a_run_keeps_the_precision_that_auto_chose(pretraining, monkeypatch):
    """Begun where bf16 is slow, continued where it is fast: in fp32, as all of its steps."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    whole = run_pretraining(replace(pretraining, out=f"{pretraining.out}_whole", max_steps=3))
    begun = replace(pretraining, precision="auto", max_steps=2)
    folder = run_pretraining(begun)
    assert yaml.safe_load((folder / "config.yaml").read_text())["precision"] == "fp32"
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    run_pretraining(replace(begun, max_steps=3))
    assert yaml.safe_load((folder / "config.yaml").read_text())["precision"] == "fp32"
    assert losses(folder) == losses(whole)


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("text", ["", "- a", "precision: fp7", "{", "precision: auto"])
def test_a_damaged_config_yaml_does_not_choose(pretraining, monkeypatch, text):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    pretraining.run_folder.mkdir()
    (pretraining.run_folder / "config.yaml").write_text(text)
    assert resolve_precision(replace(pretraining, precision="auto"), Processes(CPU)).precision == "bf16"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [True, False, False, False]),  # as torch is by itself
        ({"tf32": "none"}, [False, False, False, False]),
        ({"tf32": "all"}, [True, True, False, False]),
        ({"cudnn_benchmark": True}, [True, False, True, False]),
        ({"deterministic": True}, [True, False, False, True]),
    ],
)
def test_kernels_are_chosen_by_the_settings(settings, wanted):
    configure_kernels(PretrainConfig(tf32="all", cudnn_benchmark=True))
    configure_kernels(PretrainConfig(**settings))
    assert switches() == wanted


@pytest.mark.parametrize("settings", [{"cudnn_benchmark": True}, {"compile": "blocks"}])
def test_deterministic_keeps_what_it_promises(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PretrainConfig(deterministic=True, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"compute": "masked"}, "compute=packed"), ({"model": "moco/timm/resnet18"}, "not read by moco")],
)
def test_compile_is_refused_where_it_would_do_nothing(settings, match):
    with pytest.raises(ValueError, match=match):
        PretrainConfig(compile="blocks", **settings)
