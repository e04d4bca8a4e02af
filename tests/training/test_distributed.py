"""Two processes with gloo compute what one computes with the same global batch."""

import atexit
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm

from hyspark.config.shared import EncoderSettings
from hyspark.models.classifier import build_classifier
from hyspark.tasks.classification import initialise_classifier as build_classification
from hyspark.tasks.classification import run_classification
from hyspark.tasks.pretrain import initialise_pretraining as build_pretraining
from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.segmentation import initialise_segmentation as build_finetuning
from hyspark.tasks.segmentation import run_segmentation
from hyspark.training.batch_norm import GlobalBatchNorm, global_batch_norm, synchronise_batch_norms
from hyspark.training.distributed import Processes, find_processes, join_process_group, wrap_model
from hyspark.training.run_folder import checkpoint_file
from tests.training.ranks import train_in_ranks


def measured(config, name):
    lines = map(json.loads, (config.run_folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def check_same_training(one, two, fresh, weights, rel=1e-4):
    """The same losses and gradients, and weights that differ by a few per cent of their movement at most.

    Two steps only: Adam amplifies rounding where a gradient is about zero. Unshared gradients would show in the norm.
    """
    assert measured(two, "loss")[0] == pytest.approx(measured(one, "loss")[0], rel=rel / 10)
    assert measured(two, "grad_norm")[0] == pytest.approx(measured(one, "grad_norm")[0], rel=rel)
    assert measured(two, "loss") == pytest.approx(measured(one, "loss"), rel=1e-3)
    a, b = (torch.load(weights(c), weights_only=True)["model"] for c in (one, two))
    assert a.keys() == b.keys()
    moved = sum(float((a[key] - start.detach()).abs().sum()) for key, start in fresh.items())
    apart = sum(float((a[key] - b[key]).abs().sum()) for key in fresh)
    assert moved > 0
    assert apart < 0.05 * moved


def smooth(x, inplace=False):
    """An activation without a kink, in place of ReLU."""
    return F.silu(x, inplace)


def smooth_activations():
    """Replace ReLU in this process."""
    F.relu = smooth


def test_two_processes_equal_one_in_pretraining(pretraining, phantoms, tmp_path):
    probe = {"probe_data": str(phantoms / "Dataset900_PhantomLabelled"), "probe_cases": 2}
    one = replace(pretraining, out=str(tmp_path / "one"), max_steps=2, **probe)
    two = replace(one, out=str(tmp_path / "two"))
    run_pretraining(one)
    train_in_ranks(two)
    check_same_training(one, two, dict(build_pretraining(one).named_parameters()), checkpoint_file)
    assert measured(two, "val_loss") == pytest.approx(measured(one, "val_loss"), rel=1e-3)
    assert measured(two, "probe_dice") == pytest.approx(measured(one, "probe_dice"), abs=0.05)
    assert len(measured(two, "probe_dice")) == 2  # of the main process, the other waits


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("spark/timm/resnet10t", {"mask_ratio": 0.5, "decoder_width": 32}),
        ("spark/timm/resnet10t", {"mask_ratio": 0.5, "decoder_width": 32, "reconstruct_fraction": 0.5}),
        ("moco/timm/resnet10t", {"queue_size": 8}),
        ("swav/timm/resnet10t", {"prototypes": 6, "local_views": 1}),
    ],
)
def test_two_processes_equal_one_around_a_third_party_network(pretraining, tmp_path, monkeypatch, model, options):
    """Its BatchNorms take the statistics of the global batch, of masked ones over visible positions.

    Those of packed patches are torch's own in one process and by sums in two. They differ by rounding, which takes a
    voxel to the other side of a ReLU, and one voxel changes the gradient by half a per cent. So SparK's ReLUs are
    smooth here.
    """
    is_masked = model.startswith("spark")
    plain = asdict(EncoderSettings()) | ({} if is_masked else {"decoder_width": 768, "head_width": 16})
    pretraining = replace(pretraining, **(plain | options), model=model)
    slices = {"slices": "axial", "in_channels": 3, "crop_size": (64,)}
    one = replace(pretraining, out=str(tmp_path / "one"), max_steps=2, **slices)
    two = replace(one, out=str(tmp_path / "two"))
    if is_masked:
        monkeypatch.setattr(F, "relu", smooth)
    run_pretraining(one)
    train_in_ranks(two, prepare=smooth_activations if is_masked else None)
    # Assignments are of exp(20 x), and rounding with them. Four crops that are much alike come apart in MoCo's
    # BatchNorm, and rounding with them: their order alone changes the gradient by 4e-4.
    rel = {"swav": 1e-3, "moco": 2e-3}.get(model.split("/")[0], 1e-4)
    check_same_training(one, two, dict(build_pretraining(one).named_parameters()), checkpoint_file, rel)


def test_two_processes_equal_one_in_finetuning(finetuning, tmp_path):
    """Of which one sees more of the background than the other, which counts less."""
    one = replace(finetuning, out=str(tmp_path / "one"), max_steps=2, background_weight=0.2)
    two = replace(one, out=str(tmp_path / "two"))
    run_segmentation(one)
    train_in_ranks(two)
    check_same_training(one, two, dict(build_finetuning(one, 9).named_parameters()), checkpoint_file)


def test_two_processes_equal_one_in_classification(classifying, tmp_path):
    """With a frozen backbone in the first step, activations inside norms, and a last batch that begins the images anew;
    7 images to validate on do not divide between two.
    """
    (tmp_path / "data" / "val" / "light").mkdir(parents=True)
    for source in ("train", "val/dark", *(f"val/light/{i:02d}.png" for i in range(3))):
        (tmp_path / "data" / source).symlink_to(Path(classifying.data) / source)
    given = {
        "model": "timm/test_efficientnet",
        "freeze_epochs": 1,
        "num_labelled": 6,
        "data": str(tmp_path / "data"),
    }
    one = replace(classifying, out=str(tmp_path / "one"), ema_decay=0.9, **given)
    two = replace(one, out=str(tmp_path / "two"))
    run_classification(one)
    train_in_ranks(two)
    check_same_training(one, two, dict(build_classification(one, 2).named_parameters()), checkpoint_file)
    assert measured(two, "val_loss") == pytest.approx(measured(one, "val_loss"), rel=1e-3)
    assert (tmp_path / "two" / "scores" / "cases.csv").read_text().count("\n") == 8


def leave_a_model_behind(rank, folder):
    """One of two processes: a model that averages gradients is left in a reference cycle when the group ends, and in
    the second in the frames of an error.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.rendezvous = lambda where: iter([(torch.distributed.FileStore(f"{folder}/store", 2), rank, 2)])
    processes = Processes(torch.device("cpu"), rank, rank, 2)
    with join_process_group(processes):
        model = wrap_model(torch.nn.Linear(2, 2), processes)
        model(torch.ones(1, 2)).sum().backward()
    model.circle = model
    if rank == 1:  # as after an error that nothing caught
        try:
            fail(model)
        except RuntimeError as error:
            sys.last_value = error
    del model
    before = threads()
    atexit._run_exitfuncs()
    Path(folder, f"{rank}.json").write_text(json.dumps([before, threads()]))


def fail(model):
    raise RuntimeError(type(model))


def threads():
    return [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch before 2.14 gives the threads no name")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are named in Linux's /proc")
def test_no_thread_of_a_group_is_left_when_python_ends(tmp_path):
    """Such a thread aborted a process that had done its work."""
    torch.multiprocessing.start_processes(leave_a_model_behind, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for rank in (0, 1):
        before, after = json.loads((tmp_path / f"{rank}.json").read_text())
        assert before
        assert not after


KINDS_OF_NORM = ({"affine": False}, {"track_running_stats": False}, {"momentum": None})


def run_ranks(rank, folder):
    """One of two processes: a shard of a batch through GlobalBatchNorm, forward and backward, then twice through other
    kinds of it.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, target = torch.randn(6, 3, 4, 4, 4) * 3 + 1, torch.randn(6, 3, 4, 4, 4)
    part = slice(0, 4) if rank == 0 else slice(4, 6)  # unequal shards
    mine = x[part].clone().requires_grad_()
    norm = global_batch_norm(BatchNormAct2d(3))
    out = norm(mine)
    ((out - target[part]) ** 2).sum().backward()
    others = [global_batch_norm(torch.nn.BatchNorm3d(3, **kind)) for kind in KINDS_OF_NORM]
    outs = [[other(scale * x[part]).detach() for scale in (1, 2)] for other in others]
    states = [other.state_dict() for other in others]
    found = {"out": out, "grad": mine.grad, "state": norm.state_dict(), "others": list(zip(outs, states, strict=True))}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_global_batch_norm_is_the_batch_norm_of_the_whole_batch(tmp_path):
    torch.multiprocessing.start_processes(run_ranks, (str(tmp_path),), nprocs=2, start_method="forkserver")
    torch.manual_seed(0)
    x, target = torch.randn(6, 3, 4, 4, 4) * 3 + 1, torch.randn(6, 3, 4, 4, 4)
    x.requires_grad_()
    norm = torch.nn.BatchNorm3d(3)
    out = norm(x).relu()
    ((out - target) ** 2).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([p["out"] for p in parts]), out.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([p["grad"] for p in parts]), x.grad, rtol=1e-4, atol=1e-4)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(parts[1]["state"][key], value, rtol=1e-5, atol=1e-6)
    for i, kind in enumerate(KINDS_OF_NORM):
        other, mine = torch.nn.BatchNorm3d(3, **kind), [part["others"][i] for part in parts]
        for number, scale in enumerate((1, 2)):
            expected = other(scale * x).detach()
            together = torch.cat([outs[number] for outs, _ in mine])
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5, msg=str(kind))
        assert mine[0][1].keys() == other.state_dict().keys()
        for key, value in other.state_dict().items():
            torch.testing.assert_close(mine[0][1][key], value, rtol=1e-5, atol=1e-6, msg=f"{kind} {key}")


def test_share_statistics_keeps_weights_and_names():
    model = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.Sequential(torch.nn.BatchNorm3d(2)))
    model[1][0].running_mean.fill_(3.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    synchronise_batch_norms(model, global_batch_norm)
    assert isinstance(model[1][0], GlobalBatchNorm)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("shared", [global_batch_norm, convert_sync_batchnorm])
def test_share_statistics_keeps_activations_inside_norms(shared):
    """As in timm's BatchNormAct2d; the second kind computes on the CPU in evaluation mode alone."""
    network = build_classifier("timm/test_efficientnet", 3, 2).eval()
    images = torch.rand(2, 3, 64, 64)
    before, keys = network(images), network.state_dict().keys()
    synchronise_batch_norms(network, shared)
    torch.testing.assert_close(network.eval()(images), before)
    assert network.state_dict().keys() == keys


@pytest.mark.parametrize(
    ("device", "machine", "capability", "precision", "warns"),
    [
        ("cpu", "x86_64", "AVX2", "bf16", True),
        ("cpu", "x86_64", "AVX2", "fp32", False),
        ("cpu", "x86_64", "AVX512", "bf16", False),
        ("cpu", "aarch64", "DEFAULT", "bf16", False),
        ("cuda:0", "x86_64", "AVX2", "bf16", False),
    ],
)
def test_a_precision_that_the_processor_emulates_is_warned_of(
    monkeypatch, device, machine, capability, precision, warns
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert ("WARNING" in Processes(torch.device(device)).describe(precision)) == warns


def test_cuda_that_is_not_there_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device cpu"):
        find_processes("cuda")


def test_a_batch_that_does_not_divide_is_refused(pretraining, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="batch size: expected a multiple of the 2 processes"):
        run_pretraining(replace(pretraining, batch_size=3))
