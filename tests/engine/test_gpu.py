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


def test_hidden_voxels_never_change_features_under_autocast():
    net = hyspark.build_hyspark(32, widths=(6, 6, 12, 12, 24), decoder_width=16).cuda()
    volumes = torch.rand(2, 1, 32, 32, 32, device="cuda")
    visible = net.draw_visible(2, (32, 32, 32)).cuda()
    seen = visible.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    other = torch.where(seen, volumes, torch.rand_like(volumes))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for a, b in zip(net.encoder(volumes, visible), net.encoder(other, visible), strict=True):
            assert torch.equal(a, b)


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
