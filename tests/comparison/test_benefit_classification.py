"""The comparison of starts for classification: planned by shares, made run by run, complete after an interruption."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hyspark.cli import main
from hyspark.comparison import benefit, report
from hyspark.comparison.classification import ClassificationRuns
from hyspark.config.classification import ClassificationConfig
from hyspark.config.recipes import write_yaml
from hyspark.tasks.classification import initialise_classifier


@pytest.fixture
def base(classifying, monkeypatch):
    """What all runs share; no pictures."""
    monkeypatch.setattr(report, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(report, "benefit_figure", lambda *args: None)
    return replace(classifying, out=ClassificationConfig.out, epochs=1)


@pytest.fixture
def starts(base, tmp_path):
    """From scratch, and from weights that fit."""
    path = tmp_path / "own.pth"
    torch.save(initialise_classifier(replace(base, seed=9), 2).state_dict(), path)
    return {"scratch": "none", "own": str(path)}


digest_of = ClassificationRuns().data_digest


class Stopper:
    """Runs jobs in this process, without the seconds that a process takes to begin, and stops after so many."""

    def __init__(self, most):
        self.most = most
        self.ran = []

    def __call__(self, todo, num_at_once, after_each):
        for job in todo[: self.most]:
            main.main(job.command[job.command.index("finetune-classifier") :])
            assert job.is_done()
            self.ran.append(job.name)
            after_each()
        return [job.name for job in todo[self.most :]]


def test_shares_become_numbers(base):
    assert benefit.labelled_numbers(base, [], [1.0, 0.5, 0.25]) == [16, 8, 4]
    assert benefit.labelled_numbers(base, [4, 2], []) == [4, 2]
    for numbers, fractions in (([], []), ([4], [0.5])):
        with pytest.raises(ValueError, match="one of --num_labelled and --label_fractions"):
            benefit.labelled_numbers(base, numbers, fractions)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        benefit.labelled_numbers(base, [], [1.5])
    with pytest.raises(ValueError, match=r"of 16 training cases, \[0.25, 0.24\] are \[4, 4\]"):
        benefit.labelled_numbers(base, [], [0.25, 0.24])


def test_shares_of_segmentation_cases(finetuning):
    assert benefit.labelled_numbers(finetuning, [], [1.0, 0.5]) == [2, 1]


def test_from_command_to_report_and_what_is_missing_is_made_later(base, starts, tmp_path, monkeypatch, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    write_yaml(base, recipe)
    words = ["benefit", "--task", "classify", "--config", str(recipe), "--out", str(out), "--seeds", "0", "1"]
    words += ["--initial_weights", *(f"{name}={path}" for name, path in starts.items()), "--label_fractions", "0.25"]
    first, second = Stopper(3), Stopper(9)
    monkeypatch.setattr(benefit, "run_jobs", first)
    with pytest.raises(SystemExit):
        main.main(words)
    numbers = json.loads((out / "benefit.json").read_text())
    assert (numbers["finished"], numbers["missing"]) == (3, ["own_4_seed1"])
    monkeypatch.setattr(benefit, "run_jobs", second)
    main.main(words)
    assert first.ran == ["scratch_4_seed0", "own_4_seed0", "scratch_4_seed1"]
    assert second.ran == ["own_4_seed1"]
    numbers = json.loads((out / "benefit.json").read_text())
    assert (numbers["finished"], numbers["scored_on"], len(numbers["images"])) == (4, "test", 6)
    for cell, start in zip(numbers["cells"], starts, strict=True):
        paths = [out / "runs" / f"{start}_4_seed{seed}" / "scores_test" / "summary.json" for seed in (0, 1)]
        values = [json.loads(path.read_text())["metrics"]["auc"] for path in paths]
        assert cell["auc"]["mean"] == pytest.approx(sum(values) / 2)
    assert "scored on 6 test images" in (out / "benefit.md").read_text()
    capsys.readouterr()
    main.main(words)
    assert "4 runs, 4 of them finished" in capsys.readouterr().out


def test_a_run_that_is_not_scored_yet_is_not_finished(base, tmp_path):
    (run,) = benefit.plan_runs(base, tmp_path, {"scratch": "none"}, [4], [0], 1)
    benefit.job_of(run)
    main.main(["finetune-classifier", "--config", str(run.config.run_folder / "config.yaml")])
    assert run.is_finished
    (run.scores / "cases.csv").unlink()
    assert not run.is_finished
    assert run.scores.name == "scores_test"


def test_the_data_is_known_by_what_it_holds(base, tmp_path):
    """Wherever it lies and however few of it a run takes; a changed image, or one on another side, is another."""
    moved = shutil.copytree(base.data, tmp_path / "moved")
    known = digest_of(base)
    assert digest_of(replace(base, data=str(moved), seed=5, num_labelled=4)) == known
    files = sorted(path for path in moved.rglob("*.png") if path.parent.parent.name == "train")
    pixels = np.asarray(Image.open(files[0]))
    Image.fromarray(np.roll(pixels, 1, 0)).save(files[0])
    changed = digest_of(replace(base, data=str(moved)))
    assert changed != known
    val = next(path for path in moved.rglob(files[0].parent.name) if path.parent.name == "val")
    files[0].rename(val / "moved.png")
    assert digest_of(replace(base, data=str(moved))) not in (known, changed)


def test_weights_and_data_that_do_not_fit_stop_before_the_first_run(base, tmp_path):
    with pytest.raises(ValueError, match=r"num_labelled: expected .* 16 training images, got 17"):
        benefit.run_comparison(base, tmp_path / "out", {"scratch": "none"}, [4, 17], [0])
    with pytest.raises(ValueError, match=r"num_labelled: expected at least one image of each .*, got 1$"):
        benefit.run_comparison(base, tmp_path / "out", {"scratch": "none"}, [4, 1], [0])
    torch.save({"something.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth"):
        benefit.run_comparison(base, tmp_path / "out", {"scratch": "none", "x": str(tmp_path / "x.pth")}, [4], [0])
    assert not (tmp_path / "out").exists()
