"""Minutes of a training run to which everything happens; it ends as if nothing had. `pytest -m slow` runs these.

HYSPARK_SOAK_SECONDS sets how long faults are injected (180 by default). The table of faults is printed (`pytest -s`).
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace

import pytest

from hyspark.data.datasets import datalist_json
from hyspark.tasks.pretrain import run_pretraining
from hyspark.tasks.segmentation import run_segmentation
from hyspark.training.checkpoint import list_checkpoints
from hyspark.training.run_folder import checkpoint_file, encoder_file
from hyspark.training.signals import STOPPED
from tests.training.attacks import end, last_step, output, results, same_weights, start, wait_for_step

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("HYSPARK_SOAK_SECONDS", 180))


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_twenty_kills_leave_the_losses_of_none(pretraining, finetuning, tmp_path, task):
    """Killed at random moments, with 0 to 2 loader workers; losses and weights equal bit for bit."""
    if task == "pretrain":
        config, run, file = replace(pretraining, epochs=40, save_every=2), run_pretraining, checkpoint_file
    else:
        config, run, file = (
            replace(finetuning, epochs=120, val_every=10, save_every=2),
            run_segmentation,
            checkpoint_file,
        )
    folder = "exp_dir" if task == "pretrain" else "logdir"
    whole, config = (replace(config, **{folder: str(tmp_path / name)}) for name in ("whole", "killed"))
    run(whole)
    rng = random.Random(0)
    for kill in range(20):
        process = start(config, "--dataloader_workers", str(rng.randrange(3)))
        if kill % 5:  # else while it starts
            wait_for_step(config, process, last_step(config) + rng.randrange(1, 5))
        time.sleep(rng.uniform(0, 1))
        assert end(process) == -signal.SIGKILL, "the run ended before it was killed so often; make it longer"
    print(f"\n20 kills; the last was at step {last_step(config)} of {last_step(whole)}")
    run(config)
    assert results(config) == results(whole)
    assert same_weights(file(config), file(whole))


def test_a_run_to_which_everything_happens_ends_as_an_undisturbed_one(pretraining, phantoms, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantoms, data, ignore=shutil.ignore_patterns("prepared"))
    config = replace(pretraining, data=str(data), epochs=1000, save_every=3, out=str(tmp_path / "run"))
    cases = datalist_json.read_datalist(data / "dataset.json").training
    rng = random.Random(1)
    faults: Counter[str] = Counter()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        fault = rng.choice(["kill", "stop", "corrupt", "truncate", "full disk", "store", "missing"])
        if fault in ("corrupt", "truncate") and len(list_checkpoints(checkpoint_file(config))) < 2:
            continue
        if fault == "full disk" and not list_checkpoints(checkpoint_file(config)):
            continue
        faults[fault] += 1
        inject(fault, config, cases, data, rng)
    reached = last_step(config) + 1
    print(f"\n{reached} steps; faults injected: {dict(faults)}")
    whole = replace(config, out=str(tmp_path / "whole"))
    for run in (config, whole):
        run_pretraining(replace(run, max_steps=reached + 3))
    losses = [[line for line in results(run) if "loss" in line] for run in (config, whole)]
    assert losses[0] == losses[1]
    assert same_weights(checkpoint_file(config), checkpoint_file(whole))
    assert same_weights(encoder_file(config), encoder_file(whole))
    assert [path.name for path in config.run_folder.glob(".*")] == [".lock"]


def inject(fault, config, cases, data, rng):
    """Let the run go on for a while, and do something to it."""
    if fault == "full disk":
        size = list_checkpoints(checkpoint_file(config))[0].stat().st_size
        process = start(config, limit=size // 2)
        assert process.wait(timeout=120) == 2
        assert "what was saved before is as it was" in output(config)[-2000:]
        return
    if fault == "missing":  # a CT is gone: the run says so and does not begin; then it is back
        image = rng.choice(cases).image
        image.rename(image.with_suffix(".away"))
        process = start(config)
        assert process.wait(timeout=120) == 2
        assert image.name in output(config)[-2000:]
        image.with_suffix(".away").rename(image)
        return
    process = start(config, "--dataloader_workers", str(rng.randrange(2)))
    # Of the two checkpoints kept one may be damaged at a time, so a second one is saved before that.
    wait_for_step(config, process, last_step(config) + (7 if fault in ("corrupt", "truncate") else 1))
    time.sleep(rng.uniform(0, 3))
    if fault == "stop":
        assert end(process, rng.choice([signal.SIGTERM, signal.SIGUSR1])) == STOPPED
        return
    assert end(process) == -signal.SIGKILL
    if fault in ("corrupt", "truncate"):
        newest = list_checkpoints(checkpoint_file(config))[0]
        content = bytearray(newest.read_bytes())
        place = rng.randrange(len(content) // 4, len(content) * 3 // 4)
        if fault == "truncate":
            content = content[:place]
        else:
            content[place : place + 64] = bytes(byte ^ 0xFF for byte in content[place : place + 64])
        newest.write_bytes(content)
    if fault == "store":
        entry = rng.choice([path for path in (data / "prepared").iterdir() if not path.name.startswith(".")])
        array = entry / "image.b2nd"
        content = bytearray(array.read_bytes())
        content[len(content) // 2] ^= 0xFF
        array.write_bytes(content)
