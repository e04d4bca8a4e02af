"""Runs on CUDA: all tasks train, repeat themselves, and continue what the CPU began.

Comparisons allow for rounding, which differs between kernels; in fp32 without TF32.
"""

import json
import math
import os
import subprocess
from dataclasses import replace

import pytest
import torch

from hyspark.models.defaults import CONTRASTIVE_METHODS
from hyspark.tasks.classification import run_classification
from hyspark.tasks.masked_task import MaskedTask
from hyspark.tasks.pretrain import initialise_pretraining, run_pretraining, task_class
from hyspark.tasks.segmentation import run_segmentation
from hyspark.training.distributed import find_processes
from hyspark.training.loop import update
from hyspark.training.run import make_run
from hyspark.training.run_folder import checkpoint_file
from tests.tasks.kinds import PRETRAININGS
from tests.training.attacks import command, lines, results, same_weights
from tests.training.launched import launch

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture
def full_precision(monkeypatch):
    """Convolutions without TF32; matrix products are, unless something asks for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def losses(config):
    return [line["loss"] for line in lines(config) if "loss" in line]


def is_finite(config):
    """Whether a run has losses and all of them are numbers."""
    found = losses(config)
    return len(found) > 0 and all(map(math.isfinite, found))


def call_all(*commands):
    """Run commands at the same time; what each wrote to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(**how, **pipes) for how in commands]
    written = [process.communicate(timeout=300)[1] for process in processes]
    for process, text in zip(processes, written, strict=True):
        assert process.returncode == 0, text[-3000:]
    return written


# Every task trains


@pytest.mark.parametrize("kind", PRETRAININGS)
def test_every_kind_of_pretraining_trains_in_bf16(pretraining, kind):
    if kind in CONTRASTIVE_METHODS:
        pytest.importorskip("lightly")
    config = replace(pretraining, **PRETRAININGS[kind], device=DEVICE, precision="bf16", max_steps=3)
    run_pretraining(config)
    assert is_finite(config)


def test_pretraining_trains_in_fp16_and_is_probed(pretraining, phantoms):
    """Its loss scale may skip steps; none of them may end the run."""
    probe = {"probe_data": str(phantoms / "Dataset900_PhantomLabelled"), "probe_cases": 2}
    config = replace(pretraining, device=DEVICE, precision="fp16", dataloader_workers=2, **probe)
    run_pretraining(config)
    assert is_finite(config)
    assert [line for line in lines(config) if "probe_dice" in line]


@pytest.mark.parametrize("decoder", ["released", "light"])
def test_finetuning_trains_in_bf16(finetuning, decoder):
    width = 16 if decoder == "light" else finetuning.decoder_width
    config = replace(finetuning, device=DEVICE, precision="bf16", decoder=decoder, decoder_width=width, epochs=2)
    run_segmentation(config)
    assert is_finite(config)
    assert (config.run_folder / "scores" / "summary.json").is_file()


def test_classification_trains_in_bf16(classifying):
    """With all that draws random numbers on the device, and the average of the weights."""
    config = replace(classifying, device=DEVICE, precision="bf16", mixup=0.2, cutmix=1.0, ema_decay=0.9)
    run_classification(config)
    assert is_finite(config)


# The same numbers as elsewhere


def test_cuda_repeats_the_cpu_run(pretraining, tmp_path, full_precision):
    cpu, cuda = (replace(pretraining, out=str(tmp_path / name)) for name in ("cpu", "cuda"))
    run_pretraining(cpu)
    run_pretraining(replace(cuda, device=DEVICE))
    assert losses(cuda) == pytest.approx(losses(cpu), rel=1e-2)


def test_batches_come_pinned_and_loader_processes_change_nothing(pretraining, tmp_path, monkeypatch, full_precision):
    """The loss of the first step is of the same batch and the same weights."""
    pinned = []
    loss = MaskedTask.loss

    def noted(task, run, batch):
        pinned.append(batch["volumes"].is_pinned())
        return loss(task, run, batch)

    monkeypatch.setattr(MaskedTask, "loss", noted)
    runs = [replace(pretraining, device=DEVICE, max_steps=3, out=str(tmp_path / name)) for name in ("own", "two")]
    run_pretraining(runs[0])
    run_pretraining(replace(runs[1], dataloader_workers=2))
    assert len(pinned) == 6
    assert all(pinned)
    own, two = map(losses, runs)
    assert two[0] == pytest.approx(own[0], rel=1e-5)
    assert two == pytest.approx(own, rel=1e-2)


@pytest.mark.parametrize(("first", "then"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_a_run_continues_on_another_device(pretraining, tmp_path, full_precision, first, then):
    whole, parts = (replace(pretraining, out=str(tmp_path / name)) for name in ("whole", "parts"))
    run_pretraining(whole)
    run_pretraining(replace(parts, device=first, max_steps=3))
    run_pretraining(replace(parts, device=then))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-2)
    state = torch.load(checkpoint_file(parts), map_location="cpu", weights_only=True)
    assert state["step"] == len(losses(whole))


def steps(config, device):
    """Two steps on noise: losses, norms before clipping, the norm that is left after the last, and the weights."""
    config = replace(config, device=device, clip=0.01)
    task = task_class(config)(config, None, [], [])
    run = make_run(config, "", find_processes(device), initialise_pretraining(config), 1, None)
    run.model.train()
    torch.manual_seed(0)
    found = [update(run, task, task.random_batch(2), step) for step in range(2)]
    left = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in run.model.parameters()])).item()
    return (
        [loss for loss, _ in found],
        [norm for _, norm in found],
        left,
        [p.detach().cpu() for p in run.model.parameters()],
    )


def test_fused_adamw_after_clipping_moves_weights_as_on_the_cpu(pretraining, full_precision):
    """By the optimizer's default rates. Where a gradient is about zero, Adam's step has the sign of its rounding."""
    wanted, found = steps(pretraining, "cpu"), steps(pretraining, DEVICE)
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)
    assert found[1] == pytest.approx(wanted[1], rel=1e-2)
    assert min(found[1]) > 0.01
    assert found[2] == pytest.approx(0.01, rel=1e-3)
    fresh = [p.detach() for p in initialise_pretraining(pretraining).parameters()]
    moved = sum(float((a - b).abs().sum()) for a, b in zip(wanted[3], fresh, strict=True))
    apart = sum(float((a - b).abs().sum()) for a, b in zip(wanted[3], found[3], strict=True))
    assert moved > 0
    assert apart < 0.05 * moved


# The same numbers again, with deterministic kernels; in processes of their own, since the choice holds for all of one


def test_a_resumed_run_repeats_bit_for_bit_on_cuda(pretraining, tmp_path):
    config = replace(pretraining, device=DEVICE, deterministic=True, precision="bf16")
    whole, parts = (replace(config, out=str(tmp_path / name)) for name in ("whole", "parts"))
    call_all({"args": command(whole)}, {"args": command(replace(parts, max_steps=3))})
    call_all({"args": command(parts)})
    assert len(losses(parts)) == 6
    assert results(parts) == results(whole)
    assert same_weights(checkpoint_file(parts), checkpoint_file(whole))


@pytest.mark.parametrize("decoder", ["released", "light"])
def test_finetuning_repeats_bit_for_bit_on_cuda(finetuning, tmp_path, decoder):
    width = 16 if decoder == "light" else finetuning.decoder_width
    config = replace(finetuning, device=DEVICE, deterministic=True, decoder=decoder, decoder_width=width, epochs=2)
    one, two = (replace(config, out=str(tmp_path / name)) for name in ("one", "two"))
    call_all({"args": command(one)}, {"args": command(two)})
    assert is_finite(one)
    assert results(two) == results(one)
    assert same_weights(checkpoint_file(two), checkpoint_file(one))


# One process for each GPU


@pytest.mark.parametrize(
    ("kind", "norms"), [("packed", ["SyncBatchNorm"]), ("spark timm", ["BatchNorm2d", "SyncBatchNorm"])]
)
def test_nccl_with_synchronised_statistics(pretraining, tmp_path, kind, norms):
    """Under torchrun, also on one GPU. A third-party network keeps its BatchNorms; the mask's context computes them."""
    count = torch.cuda.device_count()
    config = replace(pretraining, **PRETRAININGS[kind], device=DEVICE, batch_size=2 * count, max_steps=3)
    plain, shared = (replace(config, out=str(tmp_path / name)) for name in ("plain", "shared"))
    how, out = launch(shared, processes=count)
    (written,) = call_all(how)
    assert json.loads(out.read_text()) == {
        "backend": "nccl",
        "size": count,
        "model": "DistributedDataParallel",
        "norms": norms,
        "device": "cuda:0",
    }
    assert "barrier" not in written  # torch warns where one has to guess its device
    run_pretraining(plain)
    assert is_finite(shared)
    assert losses(shared) == pytest.approx(losses(plain), rel=2e-2)


def test_a_step_that_is_not_finite_is_repeated_on_the_cpu(pretraining, caplog):
    config = replace(pretraining, device=DEVICE, lr=1e18, clip=0.0)
    with pytest.raises(FloatingPointError, match="--replay"):
        run_pretraining(config)
    (file,) = config.run_folder.glob("nonfinite_step_*.pth")
    with caplog.at_level("INFO", "hyspark"):
        run_pretraining(replace(config, replay=str(file)))
    assert "not finite in fp32 either" in caplog.text


def test_a_plan_takes_trial_steps_on_the_gpu(pretraining, caplog):
    with caplog.at_level("INFO", "hyspark"):
        run_pretraining(replace(pretraining, device=DEVICE, dry_run=True))
    assert "per step of 4 crops" in caplog.text
