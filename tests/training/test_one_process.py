"""One process under torchrun goes the way of several, and computes what a plain start does, bit for bit."""

import copy
import json
import logging
import os
import subprocess
from dataclasses import replace

import pytest
import torch

from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.segmentation import run_segmentation
from hyspark.training.distributed import Processes, find_processes, join_process_group, wrap_model
from hyspark.training.run_folder import checkpoint_file
from tests.training.attacks import command, results, same_weights
from tests.training.launched import launch


def call(**command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(**command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pretraining_begun_plainly_continues_under_torchrun(pretraining, tmp_path):
    """There the process is in a group, and the model averages gradients; validation gathers."""
    whole, parts = (replace(pretraining, out=str(tmp_path / name)) for name in ("whole", "parts"))
    run_pretraining(whole)
    run_pretraining(replace(parts, max_steps=3))
    how, out = launch(parts)
    call(**how)
    assert json.loads(out.read_text()) == {
        "backend": "gloo",
        "size": 1,
        "model": "DistributedDataParallel",
        "norms": ["BatchNorm3d"],
        "device": "cpu",
    }
    assert results(parts) == results(whole)
    assert same_weights(checkpoint_file(parts), checkpoint_file(whole))


def test_finetuning_in_parts_of_a_batch_repeats_a_plain_run(finetuning, tmp_path):
    """Of which only the last has the gradients averaged; with an encoder that first gets none."""
    settings = replace(finetuning, accumulate=2, freeze_epochs=1, epochs=3, val_every=3)
    plain, alone = (replace(settings, out=str(tmp_path / name)) for name in ("plain", "alone"))
    run_segmentation(plain)
    call(args=command(alone, by_torchrun=True))
    assert results(alone) == results(plain)
    assert same_weights(checkpoint_file(alone), checkpoint_file(plain))


def test_a_replay_and_a_plan_join_no_group(pretraining, tmp_path, monkeypatch, caplog):
    config = replace(pretraining, lr=1e18, clip=0.0)
    with pytest.raises(FloatingPointError):
        run_pretraining(config)
    (file,) = config.run_folder.glob("nonfinite_step_*.pth")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: pytest.fail("joined"))
    with caplog.at_level(logging.INFO, "hyspark"):
        run_pretraining(replace(config, replay=str(file)))
        run_pretraining(replace(config, out=str(tmp_path / "plan"), dry_run=True))
    assert "not finite in fp32 either" in caplog.text
    assert "per step of 4 crops" in caplog.text


def test_a_process_that_torchrun_did_not_start_is_left_alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    processes = find_processes("cpu")
    with join_process_group(processes):
        assert not torch.distributed.is_initialized()
        model = torch.nn.Linear(1, 1)
        assert wrap_model(model, processes) is model


@pytest.mark.parametrize(("channels", "stride", "is_last"), [(3, 2, False), (2, 2, False), (3, 1, True), (8, 2, True)])
def test_layers_whose_gradient_torch_writes_beyond_its_memory_stay_as_they_are(channels, stride, is_last):
    """A convolution of one pixel with a stride on an image, as in RepVGG, ended the process if it lay channels last."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 48, 1, stride=stride), torch.nn.ReLU(), torch.nn.Conv2d(48, 8, 3, padding=1)
    )
    plain = copy.deepcopy(model)
    wrapped = wrap_model(model, Processes(torch.device("cpu")))
    assert wrapped[2].weight.is_contiguous(memory_format=torch.channels_last) == is_last
    images = torch.rand(2, channels, 32, 32)
    for _ in range(3):
        for network in (wrapped, plain):
            network.zero_grad()
            network(images).square().sum().backward()
        for one, other in zip(wrapped.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)
