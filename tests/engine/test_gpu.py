"""The same contracts on CUDA."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hyspark
from hyspark.engine.inference import Windows, class_scores
from hyspark.engine.pretrain import pretrain
from hyspark.recipes import write_yaml

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def losses(folder):
    return [
        m["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (m := json.loads(line))
    ]


def test_cuda_repeats_the_cpu_run(pretraining, tmp_path):
    cpu = replace(pretraining, exp_dir=str(tmp_path / "cpu"))
    cuda = replace(pretraining, exp_dir=str(tmp_path / "cuda"), device="cuda", dataloader_workers=2)
    assert losses(pretrain(cuda)) == pytest.approx(losses(pretrain(cpu)), rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(pretraining, precision):
    config = replace(pretraining, device="cuda", precision=precision)
    assert all(math.isfinite(v) for v in losses(pretrain(config)))


def test_windows_go_through_the_gpu_and_scores_lie_in_main_memory():
    model = hyspark.build_hybird(1, 3, 32, widths=(6, 6, 12, 12, 24)).eval()
    image, windows = torch.rand(40, 33, 32), Windows((32, 32, 32), per_pass=2, flips=(1,))
    wanted = class_scores(model, image, windows, torch.device("cpu"))
    scores = class_scores(model.cuda(), image, windows, torch.device("cuda"))
    assert scores.device.type == "cpu"
    assert torch.allclose(scores, wanted, atol=1e-2 * float(wanted.abs().max()))


def test_hidden_voxels_never_change_features_under_autocast():
    net = hyspark.build_hyspark(32, widths=(6, 6, 12, 12, 24), decoder_width=16).cuda()
    volumes = torch.rand(2, 1, 32, 32, 32, device="cuda")
    visible = net.draw_visible(2, (32, 32, 32)).cuda()
    seen = visible.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    other = torch.where(seen, volumes, torch.rand_like(volumes))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for a, b in zip(net.encoder(volumes, visible), net.encoder(other, visible), strict=True):
            assert torch.equal(a, b)


def loss_and_gradients(compute, precision):
    torch.manual_seed(0)
    net = hyspark.build_hyspark(32, compute=compute, widths=(6, 6, 12, 12, 24), decoder_width=16)
    net = net.to("cuda", memory_format=torch.channels_last_3d)
    volumes = torch.rand(2, 1, 32, 32, 32).cuda()
    visible = torch.ones(2, 1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 0] = visible[1, 0, :, 0, 1] = visible[1, 0, 1] = False
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        loss = net(volumes, visible).loss
    return [loss, *torch.autograd.grad(loss, tuple(net.parameters()))]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_packed_equals_masked(monkeypatch, precision, bound):
    """Loss and the gradients of all parameters, for samples that keep different numbers of patches."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for one, other in zip(
        loss_and_gradients("masked", precision), loss_and_gradients("packed", precision), strict=True
    ):
        assert (one - other).abs().max() <= bound * max(one.abs().max().item(), 1e-3)


def test_the_convolutional_part_compiles():
    net = hyspark.build_hyspark(32, widths=(6, 6, 12, 12, 24), decoder_width=16).encoder.cuda()
    volumes = torch.rand(2, 1, 32, 32, 32, device="cuda")
    patches = net.patches(volumes, torch.ones(2, 1, 2, 2, 2, dtype=torch.bool))
    packed = patches.pack(volumes)
    compiled = torch.compile(net.embeddings, fullgraph=True)
    for one, other in zip(compiled(packed, patches), net.embeddings(packed, patches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_packed_needs_less_memory_than_masked():
    peaks = []
    for compute in ("packed", "masked"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        net = hyspark.build_hyspark(96, compute=compute, widths=(12, 24, 24, 24, 24), decoder_width=16).cuda()
        net(torch.rand(2, 1, 96, 96, 96, device="cuda")).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < peaks[1]


def test_nccl_with_synchronised_statistics(pretraining, tmp_path):
    count = torch.cuda.device_count()
    config = replace(pretraining, exp_dir=str(tmp_path / "ddp"), device="cuda", bs=2 * count)
    write_yaml(config, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    subprocess.run(
        [*command, str(ROOT / "train.py"), "--config", str(tmp_path / "recipe.yaml")],
        env=dict(os.environ),
        check=True,
        timeout=300,
    )
    assert all(math.isfinite(v) for v in losses(config.run_folder))
