"""The comparison's runs: which, in what order, with which settings; what is finished stays, what is missing is made.

Fine-tuning itself is a stand-in here, a script that leaves scores, but for the last test.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from hyspark.cli import main, parsing
from hyspark.comparison import benefit, jobs, records, report
from hyspark.config.recipes import read_yaml, write_yaml
from hyspark.config.segmentation import SegmentationConfig
from hyspark.tasks.segmentation import initialise_segmentation

STAND_IN = """
import json, pathlib, sys
config = dict(line.split(": ", 1) for line in open(sys.argv[-1]).read().splitlines() if ": " in line)
folder = pathlib.Path(config["out"])
out = folder.parent.parent
with open(out / "ran", "a") as file:
    file.write(folder.name + chr(10))
if (out / "broken").exists() and folder.name in (out / "broken").read_text():
    sys.exit("no luck with " + folder.name)
dice = 0.5 + 0.125 * (config["weights"] != "none") + 0.01 * int(config["num_labelled"]) + 0.02 * int(config["seed"])
scores = folder / ("scores_test" if config["test_dir"].strip("'") else "scores")
scores.mkdir(parents=True, exist_ok=True)
lines = ["case,organ,dice,hd95_mm,nsd,truth_voxels,predicted_voxels"]
lines += [f"case{i},liver,{dice + 0.01 * i},5.0,0.5,100,90" for i in range(4)]
(scores / "cases.csv").write_text(chr(10).join(lines) + chr(10))
(scores / "summary.json").write_text(json.dumps({"protocol": {"grid": "label"}}))
lines = [json.dumps({"step": i, "samples_per_second": 1.0}) for i in range(3)]
(folder / "metrics.jsonl").write_text(chr(10).join(lines) + chr(10))
"""


@pytest.fixture
def _stand_in(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(benefit, "COMMAND", (sys.executable, "-I", "-S", str(tmp_path / "stand_in.py")))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(report, "save_figure", lambda figure, path: None)  # drawn after each run: slow


@pytest.fixture
def base(finetuning):
    """What all runs share."""
    given = {"out": SegmentationConfig.out, "store_dir": str(Path(finetuning.data) / "store")}
    return replace(finetuning, **given, epochs=1, val_every=1)


@pytest.fixture
def starts(base, tmp_path):
    """From scratch, and from weights that fit."""
    path = tmp_path / "own.pth"
    torch.save(initialise_segmentation(base, 9).state_dict(), path)
    return {"scratch": "none", "own": str(path)}


def ran(out):
    path = out / "ran"
    return path.read_text().split() if path.exists() else []


# The plan


def test_the_order_is_seed_by_seed_few_labels_first_starts_side_by_side(base, tmp_path):
    runs = benefit.plan_runs(base, tmp_path, {"scratch": "none", "own": "x"}, [10, 5], [1, 0], 1)
    assert [run.config.run_folder.name for run in runs] == [
        *("scratch_5_seed1", "own_5_seed1", "scratch_10_seed1", "own_10_seed1"),
        *("scratch_5_seed0", "own_5_seed0", "scratch_10_seed0", "own_10_seed0"),
    ]


def test_runs_differ_in_start_labels_and_seed_alone(base, tmp_path):
    runs = benefit.plan_runs(base, tmp_path, {"scratch": "none", "own": "x"}, [5, 10], [0, 1], 1)
    shared = [replace(run.config, out=base.out, weights="none", seed=0, num_labelled=base.num_labelled) for run in runs]
    assert set(shared) == {base}
    assert [(r.config.weights, r.config.num_labelled, r.config.seed) for r in runs[1:3]] == [
        ("x", 5, 0),
        ("none", 10, 0),
    ]


def test_jobs_divide_the_loader_processes(base, tmp_path, monkeypatch):
    monkeypatch.setattr(benefit, "available_cores", lambda: 6)
    automatic = replace(base, dataloader_workers=-1)
    for at_once, expected in ((1, -1), (2, 3), (9, 1)):
        (run,) = benefit.plan_runs(automatic, tmp_path, {"scratch": "none"}, [5], [0], at_once)
        assert run.config.dataloader_workers == expected


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": 3}, "seed: set for each run of a comparison by --seeds"),
        ({"weights": "x.pth"}, "weights: set for each run of a comparison by --initial_weights"),
        ({"out": "x"}, "by --out"),
        ({"num_labelled": 4}, "by --num_labelled"),
        ({"dry_run": True}, "by --plan"),
        ({"label_fraction": 0.5}, "drop label_fraction"),
    ],
)
def test_what_the_comparison_gives_is_not_taken_from_the_recipe(base, tmp_path, changed, expected):
    with pytest.raises(ValueError, match=expected):
        benefit.plan_runs(replace(base, **changed), tmp_path, {"scratch": "none"}, [5], [0], 1)


@pytest.mark.parametrize(
    ("counts", "seeds", "at_once"), [([5, 5], [0], 1), ([5], [1, 1], 1), ([0], [0], 1), ([5], [0], 0)]
)
def test_values_that_make_no_plan(base, tmp_path, counts, seeds, at_once):
    with pytest.raises(ValueError, match="--"):
        benefit.plan_runs(base, tmp_path, {"scratch": "none"}, counts, seeds, at_once)


def test_starts_are_read_and_wrong_ones_refused():
    assert benefit.read_initial_weights(["scratch=none", "a.b-c_1=x=y.pth"]) == {
        "scratch": "none",
        "a.b-c_1": "x=y.pth",
    }
    for words in (["scratch"], ["=x"], ["a="], ["a/b=x"], ["..=x"]):
        with pytest.raises(ValueError, match="NAME=FILE"):
            benefit.read_initial_weights(words)
    with pytest.raises(ValueError, match="expected each name once"):
        benefit.read_initial_weights(["a=x", "a=y"])


# Running


@pytest.mark.usefixtures("_stand_in")
def test_a_caller_hears_of_every_report_when_it_is_written(base, starts, tmp_path):
    out, finished = tmp_path / "out", []

    def listen():
        finished.append(json.loads((out / "benefit.json").read_text())["finished"])

    benefit.run_comparison(base, out, starts, [1], [0], after_report=listen)
    assert finished == [1, 2, 2]


@pytest.mark.usefixtures("_stand_in")
def test_the_report_of_all_runs_and_nothing_is_run_twice(base, starts, tmp_path):
    out = tmp_path / "out"
    assert benefit.run_comparison(base, out, starts, [2, 1], [0, 1]) == []
    assert ran(out)[:4] == ["scratch_1_seed0", "own_1_seed0", "scratch_2_seed0", "own_2_seed0"]
    numbers = json.loads((out / "benefit.json").read_text())
    assert (numbers["planned"], numbers["finished"], numbers["scored_on"]) == (8, 8, "validation")
    for cell in numbers["cells"][1::2]:
        assert cell["difference"]["dice"]["mean"] == pytest.approx(0.125)
        assert cell["steps"] == [3]
    scratch = numbers["cells"][0]
    assert scratch["dice"]["mean"] == pytest.approx(0.5 + 0.01 + 0.01 + 0.015)
    assert (scratch["num_labelled"], scratch["minutes"]) == (1, [0.1, 0.1])  # 3 steps of 2 crops
    assert numbers["recipe"]["epochs"] == 1
    assert "store_dir" not in numbers["recipe"]
    assert (out / "benefit.md").exists()
    (out / "benefit.md").unlink()
    assert benefit.run_comparison(base, out, starts, [2, 1], [0, 1]) == []
    assert len(ran(out)) == 8
    assert (out / "benefit.md").exists()


@pytest.mark.usefixtures("_stand_in")
def test_what_is_missing_and_only_that_is_run(base, starts, tmp_path):
    out = tmp_path / "out"
    benefit.run_comparison(base, out, starts, [1], [0, 1])
    (out / "runs" / "own_1_seed1" / "scores" / "cases.csv").unlink()
    benefit.run_comparison(base, out, starts, [1], [0, 1])
    assert ran(out)[4:] == ["own_1_seed1"]
    benefit.run_comparison(base, out, starts, [1, 2], [0])
    assert ran(out)[5:] == ["scratch_2_seed0", "own_2_seed0"]


@pytest.mark.usefixtures("_stand_in")
def test_a_failed_run_is_told_and_the_report_says_what_is_missing(base, starts, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "broken").write_text("scratch_1_seed0")
    assert benefit.run_comparison(base, out, starts, [1], [0, 1], num_at_once=2) == ["scratch_1_seed0"]
    assert "no luck with scratch_1_seed0" in capsys.readouterr().out
    numbers = json.loads((out / "benefit.json").read_text())
    assert numbers["missing"] == ["scratch_1_seed0"]
    assert numbers["cells"][1]["pairs"] == [1]
    assert numbers["cells"][1]["left_out"] == [0]
    (out / "broken").unlink()
    assert benefit.run_comparison(base, out, starts, [1], [0, 1]) == []
    assert sorted(ran(out)) == sorted(["scratch_1_seed0"] * 2 + ["own_1_seed0", "own_1_seed1", "scratch_1_seed1"])
    assert json.loads((out / "benefit.json").read_text())["missing"] == []


@pytest.mark.usefixtures("_stand_in")
def test_scores_of_the_test_cases_where_there_are_some(base, starts, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="no: no such file or folder"):
        benefit.run_comparison(replace(base, test_dir=str(tmp_path / "no")), tmp_path / "out", starts, [1], [0])
    assert benefit.run_comparison(replace(base, test_dir=base.data), tmp_path / "out", starts, [1], [0]) == []
    assert (tmp_path / "out" / "runs" / "own_1_seed0" / "scores_test" / "cases.csv").exists()
    assert "scored on 4 test cases" in (tmp_path / "out" / "benefit.md").read_text()


@pytest.mark.usefixtures("_stand_in")
def test_the_plan_runs_and_writes_nothing(base, starts, tmp_path, capsys):
    out = tmp_path / "out"
    benefit.run_comparison(base, out, starts, [1], [0], plan_only=True)
    assert not out.exists()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["scratch_1_seed0", "to", "do"],
        ["own_1_seed0", "to", "do"],
    ]
    benefit.run_comparison(base, out, starts, [1], [0])
    (out / "runs" / "own_1_seed0" / "scores" / "summary.json").unlink()
    capsys.readouterr()
    benefit.run_comparison(base, out, starts, [1], [0], plan_only=True)
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "finished",
        "begun, at step 3",
    ]
    assert len(ran(out)) == 2


# Runs and files of an earlier call


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("changed", [{"lr": 1e-2}, {"max_steps": 7}, {"test_dir": "."}, {"data": "."}])
def test_runs_with_other_settings_are_refused(base, starts, tmp_path, changed):
    """Some may change in a single run, but then its scores are of another budget."""
    out = tmp_path / "out"
    benefit.run_comparison(base, out, {"scratch": "none"}, [1], [0])
    (out / "runs" / "scratch_1_seed0" / "last.pth").write_bytes(b"weights")
    (name,) = changed
    with pytest.raises(ValueError, match=rf"scratch_1_seed0 holds a run with other settings(.|\n)*{name}: was"):
        benefit.run_comparison(replace(base, **changed), out, {"scratch": "none"}, [1], [0])
    assert len(ran(out)) == 1


@pytest.fixture
def copied(base, tmp_path):
    """Settings with data that may be changed."""
    shutil.copytree(base.data, tmp_path / "copy" / "Dataset900_PhantomLabelled")
    return replace(base, data=str(tmp_path / "copy" / "Dataset900_PhantomLabelled"))


@pytest.mark.usefixtures("_stand_in")
def test_data_that_changed_is_refused_for_further_runs(copied, tmp_path):
    out, folder = tmp_path / "out", Path(copied.data)
    benefit.run_comparison(copied, out, {"scratch": "none"}, [1], [0])
    label = sorted((folder / "labelsTr").iterdir())[0]
    image = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), label)
    with pytest.raises(ValueError, match="the data is not that of the runs in"):
        benefit.run_comparison(copied, out, {"scratch": "none"}, [1, 2], [0])
    assert len(ran(out)) == 1
    shutil.rmtree(folder)  # the report of what is finished needs no data
    (out / "benefit.md").unlink()
    assert benefit.run_comparison(copied, out, {"scratch": "none"}, [1], [0]) == []
    assert (out / "benefit.md").is_file()


@pytest.mark.usefixtures("_stand_in")
def test_runs_that_do_not_go_together_stop_before_the_first_run(base, starts, tmp_path):
    out = tmp_path / "out"
    benefit.run_comparison(base, out, starts, [1], [0])
    path = out / "runs" / "own_1_seed0" / "scores" / "cases.csv"
    header, first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([header, "another" + first[first.index(",") :], *rest]))
    with pytest.raises(ValueError, match="own_1_seed0 was scored on other cases"):
        benefit.run_comparison(base, out, starts, [1], [0, 1])
    assert len(ran(out)) == 2


@pytest.mark.usefixtures("_stand_in")
def test_settings_that_change_no_result_may_change(base, tmp_path):
    out = tmp_path / "out"
    benefit.run_comparison(base, out, {"scratch": "none"}, [1], [0])
    benefit.run_comparison(replace(base, dataloader_workers=2, save_every=5), out, {"scratch": "none"}, [1], [0])
    assert len(ran(out)) == 1


@pytest.mark.usefixtures("_stand_in")
def test_scores_without_the_settings_they_were_made_with_do_not_count(base, tmp_path):
    out = tmp_path / "out"
    benefit.run_comparison(base, out, {"scratch": "none"}, [1], [0])
    (out / "runs" / "scratch_1_seed0" / "config.yaml").unlink()
    benefit.run_comparison(base, out, {"scratch": "none"}, [1], [0])
    assert len(ran(out)) == 2


@pytest.mark.usefixtures("_stand_in")
def test_weights_that_changed_between_calls_are_refused(base, starts, tmp_path):
    """Else some runs would start from one file and some from another, under one name."""
    out = tmp_path / "out"
    benefit.run_comparison(base, out, starts, [1], [0])
    torch.save(initialise_segmentation(replace(base, seed=5), 9).state_dict(), starts["own"])
    with pytest.raises(ValueError, match="content has changed"):
        benefit.run_comparison(base, out, starts, [1], [0, 1])
    assert len(ran(out)) == 2


@pytest.mark.usefixtures("_stand_in")
def test_weights_and_data_that_do_not_fit_stop_before_the_first_run(base, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"--initial_weights own=none\.pth: no such file"):
        benefit.run_comparison(base, out, {"scratch": "none", "own": "none.pth"}, [1], [0])
    torch.save({"something.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth"):
        benefit.run_comparison(base, out, {"scratch": "none", "own": str(tmp_path / "x.pth")}, [1], [0])
    with pytest.raises(ValueError, match="num_labelled: expected at most the 2 labelled training cases, got 50"):
        benefit.run_comparison(base, out, {"scratch": "none"}, [1, 50], [0])
    assert not out.exists()


def test_weights_may_be_a_folder_as_on_the_hub(tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert records.check_weights(tmp_path, {"own": str(folder), "scratch": "none"}) == {"own": digest}


# The command


@pytest.mark.usefixtures("_stand_in")
def test_a_comparison_does_with_broken_cases_what_its_runs_do(base, tmp_path):
    data = tmp_path / "Dataset900_PhantomLabelled"
    shutil.copytree(base.data, data)
    for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        (data / folder / f"bad{ending}.nii.gz").write_bytes(b"no volume")
    base = replace(base, data=str(data), store_dir="")
    with pytest.raises(ValueError, match=r"1 of 4 volumes are unusable; .*--on_bad_case skip"):
        benefit.run_comparison(base, tmp_path, {"scratch": "none"}, [3], [0])
    assert benefit.run_comparison(replace(base, on_bad_case="skip"), tmp_path, {"scratch": "none"}, [3], [0]) == []


def test_the_command_line_reaches_the_engine(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(benefit, "run_comparison", lambda *args, **options: calls.append((args, options)) or [])
    words = "benefit --out o --starts scratch=none own=x.pth --max_steps 7 --num_labelled 5 10 --seeds 3 4 --jobs 2"
    main.main(
        [*words.split(), "--config", "configs/finetune_openkbp.yaml", "--data", "d", "--flip_prob", "0", "0", ".1"]
    )
    recipe = read_yaml("configs/finetune_openkbp.yaml", SegmentationConfig)
    expected = SegmentationConfig(**recipe | {"max_steps": 7, "data": "d", "flip_prob": (0.0, 0.0, 0.1)})
    (((base, out, starts, counts, seeds), options),) = calls
    assert (base, out, starts) == (expected, Path("o"), {"scratch": "none", "own": "x.pth"})
    assert (counts, tuple(seeds)) == ([5, 10], (3, 4))
    assert options == {"num_at_once": 2, "plan_only": False}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--max_step 7", "unknown argument '--max_step'; did you mean --max_steps?"),
        ("--initial a=none", "unknown argument '--initial'; did you mean --initial_weights?"),
        ("--seed 3", "by --seeds"),
        ("--lr 0", "lr must be above 0"),
        ("--initial_weights a", "NAME=FILE"),
    ],
)
def test_wrong_command_lines_run_nothing(words, expected, tmp_path, capsys):
    command = ["benefit", "--out", str(tmp_path / "o"), "--initial_weights", "scratch=none", "--num_labelled", "5"]
    with pytest.raises(SystemExit) as exit_:
        main.main([*command, *words.split()])
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_failed_runs_and_interruptions_are_exit_codes(monkeypatch, capsys):
    command = ["benefit", "--out", "o", "--initial_weights", "scratch=none", "--num_labelled", "5"]

    def interrupted(*args: object, **options: object) -> list[str]:
        raise KeyboardInterrupt

    for outcome, code in ((lambda *args, **options: ["scratch_5_seed0"], 1), (interrupted, 130)):
        monkeypatch.setattr(benefit, "run_comparison", outcome)
        with pytest.raises(SystemExit) as exit_:
            main.main(command)
        assert exit_.value.code == code
    assert "the same command continues" in capsys.readouterr().err


def test_the_recipe_left_in_a_run_is_its_settings(base, tmp_path):
    (run,) = benefit.plan_runs(base, tmp_path, {"scratch": "none"}, [5], [3], 1)
    job = benefit.job_of(run)
    assert list(job.command[-3:-1]) == ["finetune", "--config"]
    assert parsing.read_config(SegmentationConfig, "hyspark finetune", job.command[-2:]) == run.config
    write_yaml(replace(run.config, lr=1.0), Path(job.command[-1]))
    assert run.changes() == ["lr: was 1.0, is 0.001"]


def in_this_process(todo, num_at_once, after_each):
    """In place of `run_jobs`: the jobs' commands without their processes, which import torch for seconds."""
    for one in todo:
        main.main(one.command[one.command.index("finetune") :])
        assert one.is_done()
        after_each()
    return []


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_starts_from_command_to_report(finetuning, processes, monkeypatch, tmp_path, capsys):
    """Fine-tuning itself."""
    path = tmp_path / "own.pth"
    torch.save(initialise_segmentation(finetuning, 9).state_dict(), path)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    shared = replace(finetuning, out=SegmentationConfig.out, epochs=1)
    write_yaml(shared, recipe)
    words = ["benefit", "--config", str(recipe), "--out", str(out), "--initial_weights", "scratch=none", f"own={path}"]
    words += ["--num_labelled", "1", "--seeds", "0"]
    if not processes:
        monkeypatch.setattr(benefit, "run_jobs", in_this_process)
    main.main([*words, "--jobs", "2"])
    numbers = json.loads((out / "benefit.json").read_text())
    assert (numbers["planned"], numbers["finished"], len(numbers["cases"])) == (2, 2, 1)
    assert [cell["steps"] for cell in numbers["cells"]] == [[1], [1]]
    assert (out / "benefit.png").exists()
    assert numbers["protocol"]["weights"] == ["last.pth after 1 steps"]
    for cell, start in zip(numbers["cells"], ("scratch", "own"), strict=True):
        summary = json.loads((out / "runs" / f"{start}_1_seed0" / "scores" / "summary.json").read_text())
        assert cell["dice"]["mean"] == pytest.approx(summary["mean"]["dice"])
        assert cell["nsd"]["mean"] == pytest.approx(summary["mean"]["nsd"])
    main.main(words)
    assert "2 runs, 2 of them finished" in capsys.readouterr().out
