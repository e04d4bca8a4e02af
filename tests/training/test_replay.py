"""A step that is not finite is kept, and can be repeated."""

import json
import logging
import math
from dataclasses import asdict, replace

import pytest
import torch

from hyspark.config.shared import EncoderSettings
from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.segmentation import run_segmentation
from hyspark.training import checkpoint, loop
from hyspark.training.checkpoint import read_checkpoint


def stop_at_overflow(config, run):
    """Let a run go until its weights overflow; the file of the step that stopped it."""
    with pytest.raises(FloatingPointError, match="--replay") as error:
        run(config)
    (file,) = config.run_folder.glob("nonfinite_step_*.pth")
    assert str(file) in str(error.value)
    return file


def test_a_step_of_pretraining_is_repeated(pretraining, tmp_path, caplog):
    file = stop_at_overflow(replace(pretraining, lr=1e18, clip=0.0), run_pretraining)
    step = int(file.stem.rpartition("_")[2])
    assert step > 0
    lines = (pretraining.run_folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step - 1
    before = file.read_bytes()
    with caplog.at_level(logging.INFO, "hyspark"):
        run_pretraining(replace(pretraining, out=str(tmp_path / "elsewhere"), replay=str(file)))
    assert f"step {step} stopped the run: the " in caplog.text
    assert "not finite in fp32 either, first in the output of " in caplog.text
    assert caplog.text.count("values 0 to ") == pretraining.batch_size * pretraining.crops_per_volume
    assert file.read_bytes() == before
    assert not (tmp_path / "elsewhere").exists()
    assert len((pretraining.run_folder / "metrics.jsonl").read_text().splitlines()) == len(lines)


def test_a_step_of_finetuning_is_repeated(finetuning, caplog, monkeypatch):
    """Sound weights, and a precision that is to blame: here, losses that are made infinite."""
    found = loop.compute_gradient

    def overflowing(run, task, batch):
        loss = found(run, task, batch)
        for buffer in run.network.buffers():
            buffer.fill_(0).add_(math.inf if buffer.is_floating_point() else 0)  # as batch statistics are left
        return loss * math.inf

    monkeypatch.setattr(loop, "compute_gradient", overflowing)
    file = stop_at_overflow(finetuning, run_segmentation)
    assert read_checkpoint(file)["step"] == 0
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, "hyspark"):
        run_segmentation(replace(finetuning, replay=str(file)))
    assert "both are finite, so the precision was to blame" in caplog.text


def test_another_file_is_no_step_to_repeat(pretraining, tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(checkpoint.add_checksum({"optimizer": {}, "format": checkpoint.CHECKPOINT_FORMAT}), path)
    with pytest.raises(ValueError, match="of a run that stopped"):
        run_pretraining(replace(pretraining, replay=str(path)))


def test_a_file_does_not_choose_what_is_run(pretraining, tmp_path, monkeypatch):
    """A function to build the network by is called where the user names it, not where a file does."""
    (tmp_path / "planted.py").write_text("def make(in_channels, axes):\n    raise RuntimeError('called')\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = stop_at_overflow(replace(pretraining, lr=1e18, clip=0.0), run_pretraining)
    state = torch.load(file, weights_only=True)
    del state["checksum"]
    state["config"] |= {"model": "spark/planted:make", **asdict(EncoderSettings())}
    checkpoint.save(checkpoint.add_checksum(state), file)
    asked = replace(pretraining, replay=str(file))
    with pytest.raises(ValueError, match="builds its network by 'spark/planted:make'; if you trust it"):
        run_pretraining(asked)
    with pytest.raises(RuntimeError, match="called"):
        run_pretraining(replace(asked, **asdict(EncoderSettings()), model="spark/planted:make"))


def test_the_scale_of_fp16_has_a_floor(pretraining, monkeypatch):
    """A gradient that is never finite halves the scale 16 times, to 1, and then stops the run."""
    norms = []

    def nowhere_finite(run):
        run.scaler.unscale_(run.optimizer)
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
        for state in run.scaler._per_optimizer_states.values():
            state["found_inf_per_device"] = {torch.device("cpu"): torch.ones(())}
        norms.append(run.scaler.get_scale())
        return math.nan

    monkeypatch.setattr(loop, "clip_gradient", nowhere_finite)
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 16"):
        run_pretraining(replace(pretraining, precision="fp16", batch_size=1, crops_per_volume=1, epochs=3))
    assert norms == [2.0**k for k in range(16, -1, -1)]


def test_gradients_are_clipped_at_their_true_size_under_a_loss_scale(pretraining, monkeypatch):
    """Clipped weights move as in fp32 although the loss was multiplied by 65536."""
    clipped = []
    found = loop.clip_gradient

    def note(run):
        norm = found(run)
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        clipped.append((norm, float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])))))
        return norm

    monkeypatch.setattr(loop, "clip_gradient", note)
    run_pretraining(replace(pretraining, clip=1e-3, max_steps=1))
    run_pretraining(replace(pretraining, clip=1e-3, max_steps=1, precision="fp16", out=pretraining.out + "16"))
    (norm, size), (norm16, size16) = clipped
    assert norm > 2e-3
    assert norm16 == pytest.approx(norm, rel=0.05)
    assert size == pytest.approx(1e-3, rel=1e-3)
    assert size16 == pytest.approx(1e-3, rel=1e-3)
