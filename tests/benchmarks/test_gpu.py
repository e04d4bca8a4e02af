"""benchmarks/gpu.py: its budget, what it keeps, and its rows at toy size through the code that runs on a GPU."""

import importlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from filelock import FileLock

FOLDER = Path(__file__).parents[2] / "benchmarks"
SECTION = "section"
ON = {"machine": "here"}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def budget() -> ModuleType:
    return importlib.import_module("budget")


@pytest.fixture
def gpu() -> ModuleType:
    return importlib.import_module("gpu")


@pytest.fixture
def in_this_process(budget, monkeypatch) -> None:
    """A worker without a process of its own, which would import torch anew."""

    def run(self, row, record, seconds):
        result = row.function(**row.options)
        for name, values in [("", result)] if isinstance(result, dict) else result:
            record.add(row.section, name or row.name, values)
        record.finish(row)
        return ""

    monkeypatch.setattr(budget.Worker, "run", run)


def measured(budget, tmp_path, rows, seconds=60.0):
    record = budget.Record(tmp_path, "rows")
    record.begin(ON, ["machine"])
    return budget.measure(lambda record: iter(rows), record, seconds), record


def values_of(record):
    return {name: values["value"] for name, values in record.rows[SECTION].items()}


# The budget and the record


def test_rows_are_kept_and_not_measured_again(budget, tmp_path):
    rows = [budget.Row(SECTION, f"{i}", dict, {"value": 1.5 * i}) for i in range(3)]
    is_whole, _ = measured(budget, tmp_path, rows)
    assert is_whole
    known = json.loads((tmp_path / "rows.json").read_text())
    assert [values["value"] for values in known["rows"][SECTION].values()] == [0.0, 1.5, 3.0]
    assert "| 2 | 3 |" in (tmp_path / "rows.md").read_text()
    again = [budget.Row(SECTION, row.name, dict, {"value": -1}) for row in rows]
    is_whole, record = measured(budget, tmp_path, [*again, budget.Row(SECTION, "3", dict, {"value": 9})])
    assert is_whole
    assert [values["value"] for values in record.rows[SECTION].values()] == [0.0, 1.5, 3.0, 9]


def test_a_row_that_fails_costs_no_other_and_is_tried_again(budget, tmp_path):
    rows = [
        budget.Row(SECTION, "raises", json.loads, {"s": "{"}),
        budget.Row(SECTION, "ends its process", os._exit, {"status": 3}),
        budget.Row(SECTION, "hangs", subprocess.run, {"args": ["sleep", "60"]}, limit=1.0),
        budget.Row(SECTION, "good", dict, {"value": 1}),
    ]
    is_whole, record = measured(budget, tmp_path, rows)
    assert is_whole
    assert values_of(record) == {"good": 1}
    reasons = {key.removeprefix(f"{SECTION}: "): why.splitlines()[0] for key, why in record.failed.items()}
    assert reasons["raises"].startswith("JSONDecodeError: Expecting property name")
    assert reasons["ends its process"] == "its process ended with code 3"
    assert reasons["hangs"] == "took longer than 1 s"
    assert "hangs: took longer" in (tmp_path / "rows.md").read_text()
    again = [budget.Row(SECTION, name, dict, {"value": i}) for i, name in enumerate(["raises", "hangs", "new"])]
    _, record = measured(budget, tmp_path, again)
    assert list(values_of(record)) == ["good", "new", "raises", "hangs"]  # what failed before comes last
    assert list(record.failed) == [f"{SECTION}: ends its process"]  # which was not asked for


def test_the_budget_is_kept(budget, tmp_path):
    """The row under way is stopped with what it has started, and is the next call's."""
    marker = tmp_path / "ended"
    rows = [
        budget.Row(SECTION, "short", dict, {"value": 1}),
        budget.Row(SECTION, "long", subprocess.run, {"args": ["sh", "-c", f"sleep 30; touch {marker}"]}),
        budget.Row(SECTION, "never", dict, {"value": 3}),
    ]
    start = time.monotonic()
    is_whole, record = measured(budget, tmp_path, rows, seconds=3.0)
    assert time.monotonic() - start < 20  # not the 30 of the row
    assert not is_whole
    assert values_of(record) == {"short": 1}
    assert record.failed == {}
    listed = subprocess.run(["pgrep", "-f", str(marker)], capture_output=True, text=True, check=False)
    assert listed.stdout == ""
    rows[1] = budget.Row(SECTION, "long", dict, {"value": 2})
    is_whole, record = measured(budget, tmp_path, rows)
    assert is_whole
    assert [values["value"] for values in record.rows[SECTION].values()] == [1, 2, 3]


def test_a_function_may_give_several_rows(budget, tmp_path, in_this_process):
    pairs = [("a", {"value": 1}), ("b", {"value": 2, "more": "x"})]
    row = budget.Row(SECTION, "both", lambda: iter(pairs))
    _, record = measured(budget, tmp_path, [row])
    assert "| a | 1 |  |\n| b | 2 | x |" in record.as_markdown()
    assert record.is_done(row)


def test_rows_of_another_machine_are_not_mixed(budget, tmp_path):
    measured(budget, tmp_path, [budget.Row(SECTION, "0", dict, {"value": 1})])
    with pytest.raises(ValueError, match="another machine; name another folder: machine: was here, is there"):
        budget.Record(tmp_path, "rows").begin({"machine": "there"}, ["machine"])


def test_rows_of_another_version_of_the_code_are_told_apart(budget, tmp_path):
    _, record = measured(budget, tmp_path, [budget.Row(SECTION, "0", dict, {"value": 1})])
    assert "environment" not in record.as_markdown()
    record = budget.Record(tmp_path, "rows")
    record.begin(ON | {"code": "new"}, ["machine"])
    record.add(SECTION, "1", {"value": 2})
    assert "| | value | environment |" in record.as_markdown()
    assert "| 0 | 1 | 1 |\n| 1 | 2 | 2 |" in record.as_markdown()
    assert "1. machine here\n2. machine here, code new" in record.as_markdown()


def test_an_error_leaves_no_process_to_the_next_row(budget, tmp_path):
    """After an error of CUDA nothing works in its process any more; after too little memory all does."""
    numbers = []

    def run(self, row, record, seconds):
        numbers.append(id(self.process))
        self.process = SimpleNamespace(pid=None)
        return {"0": "RuntimeError: CUDA", "1": "OutOfMemoryError: CUDA"}.get(row.name, "")

    rows = [budget.Row(SECTION, f"{i}", dict) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget.Worker, "run", run)
        measured(budget, tmp_path, rows)
    none = id(None)
    assert [number == none for number in numbers] == [True, True, False]


def test_what_is_asked_wrongly_is_one_line(gpu, tmp_path, capsys):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "gpu.json").write_text("[")
    (tmp_path / "file").write_text("")
    cases = {
        "--minutes: expected a number above 0": ["--minutes", "0"],
        "--published": ["--published", str(tmp_path / "nowhere")],
        "gpu.json is damaged": ["--out", str(tmp_path / "damaged")],
        "Not a directory": ["--out", str(tmp_path / "file" / "x")],
    }
    for message, words in cases.items():
        assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "out").mkdir(exist_ok=True)  # which filelock makes only from 3.13 on
    with FileLock(tmp_path / "out" / ".lock"):
        assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "another call" in capsys.readouterr().err


# The rows


def test_everything_at_full_size_is_planned_in_the_order_of_its_worth(gpu, budget, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.planned, "PACKAGE", "json")  # as if it were installed
    arguments = gpu.Arguments().parse_args(["--published", "checkout", "--out", str(tmp_path)])
    rows = list(gpu.plan(arguments, gpu.Scale(), budget.Record(tmp_path, "gpu")))
    sections = list(dict.fromkeys(row.section for row in rows))
    assert sections[:5] == [gpu.CEILINGS, gpu.TESTS, gpu.STEPS, gpu.ENCODERS, gpu.DECODERS]
    assert sections[5:] == [
        gpu.VARIANTS,
        gpu.DEPTHWISE,
        gpu.LAYERS,
        f"{gpu.KERNELS} ({gpu.BASE})",
        gpu.TRAINING,
        gpu.PREDICTION,
    ]
    assert len({(row.section, row.name) for row in rows}) == len(rows)
    pickle.dumps([(row.function, dict(row.options)) for row in rows])
    encoders = [row.name for row in rows if row.section == gpu.ENCODERS]
    assert encoders[:3] == ["resnet50, 224^2, packed", "ResidualEncoderUNet, 96^3, packed", "HySparK-B, 96^3, packed"]
    assert {"resnet50, 224^2, hidden", "HySparK-B, 96^3, dense"} < set(encoders)
    steps = [row.name for row in rows if row.section == gpu.STEPS]
    assert steps[0] == "packed bf16, batch 8"
    kinds = [f"{compute} {precision}" for compute in ("packed", "masked") for precision in ("bf16", "TF32", "fp32")]
    sizes = ["batch 2", "batch 8", "batch 16", "batch 32", "largest batch"]
    wanted = {f"{kind}, {size}" for kind in kinds for size in sizes}
    assert wanted - set(steps) == {"masked TF32, largest batch", "masked fp32, largest batch"}
    assert {"published bf16, batch 8", "published fp32, batch 2"} <= set(steps)
    decoders = [(row.options["size"].options, row.name) for row in rows if row.section == gpu.DECODERS]
    assert decoders[0] == ({"decoder_width": 768}, "width 768, fraction 1")
    assert ({"decoder_width": 192, "reconstruct_fraction": 0.25}, "width 192, fraction 0.25") in decoders
    tests = next(row for row in rows if row.section == gpu.TESTS)
    assert "tests/training/test_gpu.py" in tests.options["paths"]


def timed_once(function, device):
    """The time of a first call; bf16 is slow on a CPU."""
    start = time.perf_counter()
    function()
    taken = time.perf_counter() - start
    return SimpleNamespace(first=taken, seconds=taken)


def test_steps_at_toy_size(gpu, tmp_path, capsys, monkeypatch, in_this_process):
    for module in map(importlib.import_module, ("gpu_steps", "depthwise")):
        monkeypatch.setattr(module, "timed", timed_once)
    monkeypatch.setattr(importlib.import_module("profile_step"), "WARM_UP", 1)
    monkeypatch.setattr(gpu.planned, "PACKAGE", "package_that_is_missing")
    only = ["ceilings", "steps", "encoders", "depthwise", "profile", "prediction"]
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", *only]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    steps = rows[gpu.STEPS]
    assert list(steps)[:3] == ["packed bf16, batch 2", "packed bf16, batch 1", "packed bf16, largest batch"]
    for values in steps.values():
        values.pop("environment")
        assert all(math.isfinite(values[column]) and values[column] > 0 for column in values)
        assert values["samples/s"] == pytest.approx(1e3 * values["batch"] / values["ms"])
    flops = {name: v["TFLOP/s"] * v["ms"] / v["batch"] for name, v in steps.items()}
    assert flops["masked fp32, batch 2"] > 2 * flops["packed fp32, batch 2"]
    assert flops["packed fp32, batch 2"] == pytest.approx(flops["packed bf16, batch 1"])
    layers = rows[gpu.LAYERS]
    assert sum(values["fraction"] for name, values in layers.items() if name != "the step") == pytest.approx(1)
    assert {"encoder.embeddings.layer1.0.conv1", "decoder.levels.3.refine.3"} <= set(layers)
    for name in ("encoder.embeddings.layer1.0.conv1", "decoder.levels.3.refine.3"):
        assert min(layers[name][column] for column in ("forward ms", "backward ms", "forward TFLOP/s")) > 0
    assert "BorderConvolutionBackward" not in layers
    encoders = rows[gpu.ENCODERS]
    assert {name.split(",")[0] for name in encoders} == {"resnet10t", "HySparK"}
    assert encoders["HySparK, 32^3, hidden"]["packed is faster by"] > 0
    printed = capsys.readouterr().out
    assert "ResidualEncoderUNet, 8^3: skipped; package_that_is_missing is not installed: pip install" in printed
    assert "written to" in printed


def test_without_cuda_it_says_what_to_do(gpu, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_fails_gives_another_exit_code(gpu, budget, tmp_path, monkeypatch):
    monkeypatch.setattr(budget.Worker, "run", lambda *_: "why")
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "ceilings"]) == 1


def test_variants_change_what_they_say(gpu):
    """Each is taken, and torch is as before afterwards."""
    steps = importlib.import_module("gpu_steps")
    before = (torch.backends.cudnn.benchmark, steps.light_decoder.COMPOSE_FROM, steps.recompute.checkpoint)
    with steps.applied(steps.Variant(cudnn_benchmark=True, compose=False, recompute=False), "fp32"):
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
        assert steps.light_decoder.COMPOSE_FROM > 10**12
        assert steps.recompute.checkpoint(lambda x: x + 1, 2, use_reentrant=False) == 3
    assert before == (torch.backends.cudnn.benchmark, steps.light_decoder.COMPOSE_FROM, steps.recompute.checkpoint)
    assert torch.backends.cudnn.allow_tf32
    size = gpu.TOY.size
    for variant in (steps.Variant(recompute=False), steps.Variant(channels_last=False, fused=False, compose=False)):
        assert steps.step(size, 1, variant=variant, base_ms=1.0)["faster by"] > 0


def test_the_largest_batch_gives_way_to_memory(gpu, monkeypatch):
    steps = importlib.import_module("gpu_steps")
    tried = []

    def step(size, batch, *args, **options):
        tried.append(batch)
        if batch > 50:
            raise torch.OutOfMemoryError
        return {"batch": batch}

    monkeypatch.setattr(steps, "step", step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 100e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = steps.largest(steps.Size(), [(2, 5.0), (10, 17.0)])  # 2 GB, and 1.5 for each crop
    assert tried[0] == int((0.93 * 100 - 5) / 1.5 + 2)
    assert found["batch"] == tried[-1] <= 50
    assert steps.largest(steps.Size(most=7), [(2, 5.0), (10, 17.0)]) == {"batch": 7}


def test_what_was_faster_is_taken_together(gpu):
    steps = importlib.import_module("gpu_steps")
    variant = steps.Variant
    measured = {
        variant(cudnn_benchmark=True): 80.0,
        variant(compile="encoder"): 90.0,
        variant(compile="blocks"): 70.0,
        variant(recompute=False): 99.0,  # not by two per cent
        variant(channels_last=False): 140.0,
    }
    assert steps.winners(100.0, measured) == variant(cudnn_benchmark=True, compile="blocks")


def test_tests_are_rows_with_their_reasons(monkeypatch, tmp_path):
    runs = importlib.import_module("gpu_runs")
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('a', ['x y', 'z'])\ndef test_good(a): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\ndef test_skipped(): pytest.skip('no')\n"
    )
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which takes seconds, and the tests need none
    found = {}

    def collect(passed):
        for name, values in runs.run_tests(["tests"], str(tmp_path / "log"), passed):
            found[name.partition("::")[2]] = values

    with pytest.raises(RuntimeError, match="1 tests failed"):
        collect([])
    assert found["test_good[x y]"] == {"outcome": "passed", "reason": None}
    assert found["test_bad"]["outcome"] == "failed"
    assert "one is not two" in found["test_bad"]["reason"]
    assert found["test_skipped"]["outcome"] == "skipped"
    passed = [f"tests/test_x.py::{name}" for name in ("test_good[x y]", "test_good[z]", "test_bad")]
    again = dict(runs.run_tests(["tests"], str(tmp_path / "log"), passed))
    assert list(again) == ["tests/test_x.py::test_skipped"]
    assert dict(runs.run_tests(["tests"], str(tmp_path / "log"), [*passed, *again])) == {}


KERNELS = """
import torch
import depthwise, depthwise_triton

depthwise_triton.CHUNK = 1
x, weight = torch.randn(2, 3, 4, 3, 5).requires_grad_(), torch.randn(3, 1, 3, 3, 3).requires_grad_()
wanted = depthwise.by_cudnn(x, weight)
gradient = torch.randn_like(wanted)
gradients = torch.autograd.grad(wanted, (x, weight), gradient, retain_graph=True)
for method in (depthwise.by_triton, depthwise.by_shifts):
    found = method(x, weight)
    for one, other in zip((found, *torch.autograd.grad(found, (x, weight), gradient)), (wanted, *gradients)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
print("agree")
"""


def test_depthwise_kernels_agree_with_torch():
    """The Triton kernels by Triton's interpreter, on the CPU, which has to be chosen before torch imports Triton."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER)}
    finished = subprocess.run(
        [sys.executable, "-c", KERNELS], env=environment, cwd=FOLDER.parent, capture_output=True, text=True
    )
    assert finished.stdout.strip() == "agree", finished.stderr


@pytest.mark.slow
def test_all_of_it_at_toy_size(gpu, tmp_path):
    """As `make gpu DEVICE=cpu` does it, in two calls; about five minutes on two cores."""
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--out", str(tmp_path)]
    for minutes in ("0.5", "20"):
        finished = subprocess.run([*command, "--minutes", minutes], capture_output=True, text=True, check=True)
        known = json.loads((tmp_path / "gpu.json").read_text())
        assert known["failed"] == {}
    assert "the same command" not in finished.stdout
    assert set(known["rows"]) == {
        *(gpu.CEILINGS, gpu.TESTS, gpu.STEPS, gpu.ENCODERS, gpu.DECODERS, gpu.VARIANTS, gpu.DEPTHWISE),
        *(gpu.LAYERS, gpu.TRAINING, gpu.PREDICTION),
        *(section for section in known["rows"] if section.startswith(gpu.KERNELS)),
    }
