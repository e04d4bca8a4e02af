"""A crash costs nothing: runs that are killed, stopped, crowded out and damaged end as undisturbed ones."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from hyspark.cli.main import main
from hyspark.config.recipes import write_yaml
from hyspark.data.datasets import data_folder, datalist_json
from hyspark.data.datasets.cases import Datalist
from hyspark.data.preprocessing import prepare, store_size
from hyspark.tasks.masked_task import MaskedTask
from hyspark.tasks.pretrain import find_pretraining_cases, run_pretraining
from hyspark.tasks.segmentation import run_segmentation
from hyspark.tasks.segmentation_task import SegmentationTask
from hyspark.training import checkpoint
from hyspark.training.checkpoint import list_checkpoints, older_checkpoint
from hyspark.training.run_folder import best_encoder_file, checkpoint_file, encoder_file
from hyspark.training.signals import STOPPED
from hyspark.utils import locks
from tests.conftest import small_pretraining
from tests.training.attacks import end, fork, output, results, same_weights, start, wait_for_step


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory):
    """An undisturbed pre-training of 6 steps with validations after 3 and 6, to compare with."""
    torch.set_num_threads(1)  # as in the tests
    config = small_pretraining(phantoms, tmp_path_factory.mktemp("reliability") / "whole")
    run_pretraining(config)
    return config


def same_pretraining(one, two):
    """Whether two runs measured the same, and wrote the same files."""
    files = (checkpoint_file, encoder_file, best_encoder_file)
    return results(one) == results(two) and all(same_weights(file(one), file(two)) for file in files)


# Processes that end


def test_killed_processes_and_other_numbers_of_loader_workers_change_nothing(pretraining, whole, tmp_path):
    config = replace(pretraining, out=str(tmp_path / "killed"), save_every=1)
    for step, workers in ((1, 2), (3, 0)):
        process = fork(config, "--dataloader_workers", str(workers))
        wait_for_step(config, process, step)
        assert end(process) == -signal.SIGKILL
    run_pretraining(config)
    assert same_pretraining(config, whole)


@pytest.mark.parametrize(("number", "begin"), [(signal.SIGTERM, start), (signal.SIGUSR1, fork)])
def test_signals_save_and_end_with_a_code_of_their_own(finetuning, tmp_path, number, begin):
    whole = replace(finetuning, out=str(tmp_path / "whole"), epochs=6)
    run_segmentation(whole)
    config = replace(whole, out=str(tmp_path / "stopped"), val_every=6)
    process = begin(config, "--dataloader_workers", "1")
    wait_for_step(config, process, 1)
    assert end(process, number) == STOPPED
    assert f"stopped by {number.name} after" in output(config)
    assert "Traceback" not in output(config)
    done = checkpoint.read_checkpoint(checkpoint_file(config))["step"]
    assert 2 <= done < 6
    run_segmentation(replace(config, val_every=2))
    assert [r for r in results(config) if "loss" in r] == [r for r in results(whole) if "loss" in r]
    assert same_weights(checkpoint_file(config), checkpoint_file(whole))


def test_a_killed_process_of_two_is_started_again_by_torchrun(pretraining, tmp_path):
    """And then the run goes on as one process: the same batches, losses equal to rounding."""
    one = replace(pretraining, out=str(tmp_path / "one"), max_steps=5)
    two = replace(one, out=str(tmp_path / "two"), save_every=1, max_steps=4)
    run_pretraining(one)
    process = start(two, processes=2, restarts=1)
    wait_for_step(two, process, 1)
    scripts = subprocess.run(["pgrep", "-f", f"train.py --config {two.run_folder}"], capture_output=True, text=True)
    os.kill(max(pid for pid in map(int, scripts.stdout.split()) if pid != process.pid), signal.SIGKILL)
    assert process.wait(timeout=240) == 0, output(two)[-3000:]
    assert "continuing at step" in output(two)
    run_pretraining(replace(two, max_steps=5))
    found, expected = ([r["loss"] for r in results(c) if "loss" in r] for c in (two, one))
    assert found == pytest.approx(expected, rel=1e-2)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_a_run_whose_loader_processes_outlive_it_for_a_while_continues(pretraining, whole):
    """The main process alone is killed; its loader's processes notice that after seconds."""
    process = fork(pretraining, "--dataloader_workers", "2", "--save_every", "1")
    wait_for_step(pretraining, process, 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run_pretraining(pretraining)
    assert same_pretraining(pretraining, whole)


def test_a_crash_ends_the_process_though_its_loader_processes_leave_signals_alone(pretraining):
    write_yaml(pretraining, pretraining.run_folder.with_suffix(".yaml"))
    code = (
        "import sys; from hyspark.cli import commands, run_verb; from hyspark.training import loop\n"
        "def update(*args): raise RuntimeError('out of something')\n"
        "if __name__ == '__main__': loop.update = update; run_verb.run_verb(commands.pretrain, sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "--dataloader_workers", "2", "--config"]
    done = subprocess.run(
        [*command, str(pretraining.run_folder.with_suffix(".yaml"))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "out of something" in done.stderr


def test_a_validation_that_was_cut_off_is_repeated(pretraining, whole, monkeypatch):
    """Killed after the validation has written its metrics, before the state knows of it; also after the last step."""
    validate = MaskedTask.validate
    for step in (2, 5):

        def cut_off(self, run, log, done, epoch, step=step):
            validate(self, run, log, done, epoch)
            if done == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(MaskedTask, "validate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_pretraining(pretraining)
        assert any(r["step"] == step and "val_loss" in r for r in results(pretraining))
        monkeypatch.undo()
    run_pretraining(pretraining)
    assert same_pretraining(pretraining, whole)


def test_a_validation_of_finetuning_that_was_cut_off_is_repeated(finetuning, tmp_path, monkeypatch):
    whole = replace(finetuning, out=str(tmp_path / "whole"))
    run_segmentation(whole)
    validate = SegmentationTask.validate

    def cut_off(self, *args):
        validate(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(SegmentationTask, "validate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_segmentation(finetuning)
    monkeypatch.undo()
    run_segmentation(finetuning)
    assert results(finetuning) == results(whole)
    for name in ("last.pth", "best.pth"):
        assert same_weights(finetuning.run_folder / name, whole.run_folder / name)
    scores = [(c.run_folder / "scores" / "cases.csv").read_text() for c in (finetuning, whole)]
    assert scores[0] == scores[1]


# Files of a run


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(pretraining, whole, caplog):
    run_pretraining(replace(pretraining, max_steps=4))
    newest = checkpoint_file(pretraining)
    assert [checkpoint.read_checkpoint(path)["step"] for path in list_checkpoints(newest)] == [4, 3]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with caplog.at_level(logging.INFO, "hyspark"):
        run_pretraining(pretraining)
    assert f"{newest} is damaged: its checksum" in caplog.text
    assert "continuing at step 3" in caplog.text
    assert newest.with_name(f"{newest.name}.damaged").read_bytes() == content
    assert same_pretraining(pretraining, whole)


def test_where_all_states_are_damaged_the_run_does_not_begin_anew(pretraining):
    run_pretraining(replace(pretraining, max_steps=4))
    for path in list_checkpoints(checkpoint_file(pretraining)):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no checkpoint of this run is intact") as error:
        run_pretraining(pretraining)
    assert all(str(path) in str(error.value) for path in list_checkpoints(checkpoint_file(pretraining)))


def test_a_read_error_is_not_taken_for_damage(pretraining, monkeypatch):
    run_pretraining(replace(pretraining, max_steps=4))
    before = list_checkpoints(checkpoint_file(pretraining))

    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(OSError, match="Input/output error"):
        run_pretraining(pretraining)
    assert list_checkpoints(checkpoint_file(pretraining)) == before


def test_the_newest_checkpoints_are_kept(pretraining):
    run_pretraining(replace(pretraining, keep_last=3, save_every=1, max_steps=5))
    file = checkpoint_file(pretraining)
    assert [checkpoint.read_checkpoint(path)["step"] for path in list_checkpoints(file)] == [5, 4, 3]
    assert list_checkpoints(file) == [file, older_checkpoint(file, 1), older_checkpoint(file, 2)]


def test_a_folder_that_another_process_writes_to_is_left_to_it(pretraining, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_TIMEOUT", 0.1)
    pretraining.run_folder.mkdir(parents=True)
    with FileLock(pretraining.run_folder / ".lock"), pytest.raises(ValueError, match="another process is writing to"):
        run_pretraining(pretraining)
    assert [path.name for path in pretraining.run_folder.iterdir()] == [".lock"]
    run_pretraining(replace(pretraining, max_steps=1))


def test_a_disk_without_room_for_the_checkpoints_stops_the_run_before_its_data(pretraining, tmp_path, monkeypatch):
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=10**5))
    with pytest.raises(OSError, match=r"checkpoints of this run take .* MB, but .*--keep_last, now 2"):
        run_pretraining(replace(pretraining, store_dir=str(tmp_path / "store")))
    assert not (tmp_path / "store").exists()


def test_a_disk_that_gets_full_keeps_what_was_saved(pretraining, whole):
    """A limit on the size of files stands in for a full disk: writing fails in the middle."""
    run_pretraining(replace(pretraining, max_steps=3))
    before = {path: path.read_bytes() for path in list_checkpoints(checkpoint_file(pretraining))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint_file(pretraining).stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="what was saved before is unchanged") as error:
            run_pretraining(pretraining)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot write" in str(error.value)
    assert {path: path.read_bytes() for path in list_checkpoints(checkpoint_file(pretraining))} == before
    assert not list(pretraining.run_folder.glob(".*.pth-*"))
    run_pretraining(pretraining)
    assert same_pretraining(pretraining, whole)


def test_what_a_killed_writer_left_is_removed(pretraining):
    pretraining.run_folder.mkdir(parents=True)
    files = (
        checkpoint_file(pretraining).name + "-abc",
        best_encoder_file(pretraining).name + "-abc",
        "report.html.123.tmp",
    )
    for name in files:
        (pretraining.run_folder / f".{name}").write_bytes(b"half")
    run_pretraining(replace(pretraining, max_steps=1))
    assert [path.name for path in pretraining.run_folder.glob(".*")] == [".lock"]


# Data


@pytest.fixture
def with_broken(pretraining, tmp_path):
    """A data list of the phantoms and of two files that are none, one to train and one to validate on."""
    folder = tmp_path / "Dataset950_Broken" / "imagesTr"
    folder.mkdir(parents=True)
    for name in ("bad1", "bad2"):
        (folder / f"{name}_0000.nii.gz").write_bytes(b"no volume")
    first, second = data_folder.find_cases(tmp_path).cases
    training, validation = find_pretraining_cases(pretraining)
    path = tmp_path / "list.json"
    datalist_json.write_datalist(Datalist((first, *training), (*validation, second)), path)
    return path


def test_a_disk_that_is_full_is_no_fault_of_a_case(pretraining, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "write_entry", full)
    with pytest.raises(OSError, match=r"prepared volumes are not writable .* make room"):
        run_pretraining(replace(pretraining, store_dir=str(tmp_path / "store"), on_bad_case="skip"))


def test_broken_cases_stop_the_run_with_one_message(pretraining, with_broken, phantoms, capsys):
    config = replace(pretraining, data=str(with_broken), store_dir=str(phantoms / "prepared"))
    write_yaml(config, config.run_folder.with_suffix(".yaml"))
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", "--config", str(config.run_folder.with_suffix(".yaml"))])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    message = printed[printed.index("error: ") :]
    assert message.startswith("error: 2 of 9 volumes are unusable")
    assert all(f"{name}_0000.nii.gz: a file that is not compressed" in message for name in ("bad1", "bad2"))
    assert "--on_bad_case skip" in message
    assert "Traceback" not in printed
    assert not checkpoint_file(config).exists()


def test_broken_cases_are_excluded_if_the_settings_say_so(pretraining, with_broken, phantoms, whole, caplog):
    store = str(phantoms / "prepared")
    config = replace(pretraining, data=str(with_broken), store_dir=store, on_bad_case="skip")
    run_pretraining(replace(config, max_steps=3))
    assert "2 of 9 volumes are unusable and excluded" in caplog.text
    assert "2: bad1, bad2" in (config.run_folder / "report.html").read_text()
    run_pretraining(config)
    assert same_pretraining(config, whole)  # the rest is all that they saw


def test_a_run_does_not_go_on_without_a_case_that_it_began_with(pretraining, phantoms, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    config = replace(pretraining, data=str(data), on_bad_case="skip")
    run_pretraining(replace(config, max_steps=2))
    image = datalist_json.read_datalist(data / "dataset.json").training[0].image
    image.unlink()
    with pytest.raises(ValueError, match=r"the run excluded the cases \[\], but now \['"):
        run_pretraining(config)
    with pytest.raises(ValueError, match=f"1 of 7 volumes are unusable.*\n.*{image.name}: it or its label is missing"):
        run_pretraining(replace(config, on_bad_case="stop"))
    run_pretraining(replace(config, dry_run=True))


def test_labels_beyond_the_classes_are_broken_cases_too(finetuning, phantoms, tmp_path, caplog):
    data = tmp_path / "Dataset900_PhantomLabelled"
    shutil.copytree(phantoms / "Dataset900_PhantomLabelled", data)
    declared = json.loads((data / "dataset.json").read_text())
    declared["labels"] = {name: value for name, value in declared["labels"].items() if value < 8}
    (data / "dataset.json").write_text(json.dumps(declared))
    config = replace(finetuning, data=str(data), store_dir="")
    with pytest.raises(ValueError, match="3 of 3 volumes are unusable") as error:
        run_segmentation(config)
    assert str(error.value).count("its label holds the value 8") == 3
    with pytest.raises(ValueError, match="there are 0 to train on"):
        run_segmentation(replace(config, on_bad_case="skip"))


def test_deterministic_kernels_train_both_tasks(pretraining, finetuning, whole):
    try:
        run_pretraining(replace(pretraining, deterministic=True))
        run_segmentation(replace(finetuning, deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_pretraining(pretraining, whole)


def test_a_disk_without_room_for_the_volumes_is_warned_of(pretraining, tmp_path, monkeypatch, caplog):
    used = shutil.disk_usage(tmp_path)
    config = replace(pretraining, store_dir=str(tmp_path / "store"), max_steps=1)
    small = (
        store_size.estimate_store_size(config, find_pretraining_cases(config)[0], tmp_path / "store").missing_bytes
        // 10
    )
    monkeypatch.setattr(store_size.shutil, "disk_usage", lambda path: used._replace(free=small))
    monkeypatch.setattr(checkpoint, "check_disk_space", lambda *args: None)
    run_pretraining(config)
    assert "the 7 volumes to prepare will take about" in caplog.text
