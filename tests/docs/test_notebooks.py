"""The notebooks run, shortened; they are committed with pictures, and what they conclude holds."""

import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NAMES = ("reconstructions", "features")
MOST_BYTES = 600_000

nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: pip install '.[notebooks]'")
pytest.importorskip("nbclient", reason="nbclient is missing: pip install '.[notebooks]'")
pytest.importorskip("ipykernel", reason="ipykernel is missing: pip install '.[notebooks]'")


def printed(notebook):
    """What the cells of a notebook print and warn of, and the types of what they show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    warned = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    shown = [kind for output in outputs for kind in output.get("data", {})]
    return text, warned, shown


def number_after(text, name):
    return float(re.search(rf"^{name}\s+(\d\.\d+)$", text, re.MULTILINE)[1])


def check_conclusions(name, notebook):
    """What the pages say of their numbers, whatever these are."""
    text, warned, shown = printed(notebook)
    assert "Warning" not in warned
    assert shown.count("image/png") >= (5 if name == "reconstructions" else 2)
    if name == "reconstructions":
        assert "matched     230 keys" in text
        rows = re.findall(r"(\d+)% hidden: error (\d\.\d+), mean of each patch (\d\.\d+)", text)
        assert len(rows) >= 3
        assert float(rows[0][1]) < float(rows[0][2])
    else:
        chance = number_after(text, "chance")
        assert number_after(text, "pre-trained") > 3 * chance
        assert number_after(text, "random weights") > chance
        assert re.search(r"^mean +0\.\d\d +0\.\d\d$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def execution():
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _path_of_the_kernel(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))


@pytest.fixture
def _coarse(tmp_path, monkeypatch):
    """What the kernel runs before the first cell: phantoms are coarse and trainings take one step, as on pages."""
    monkeypatch.setenv("HYSPARK_NOTEBOOK_QUICK", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    startup = tmp_path / "profile_default" / "startup" / "shorten.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("from tests.docs.shortened import one_step\n\nshortened = one_step()\nshortened.__enter__()\n")


@pytest.mark.usefixtures("_path_of_the_kernel", "_coarse")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(execution, name):
    check_conclusions(name, execution.execute(FOLDER / f"{name}.ipynb"))


@pytest.mark.slow
@pytest.mark.usefixtures("_path_of_the_kernel")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_as_it_stands(execution, name, monkeypatch):
    monkeypatch.delenv("HYSPARK_NOTEBOOK_QUICK", raising=False)
    check_conclusions(name, execution.execute(FOLDER / f"{name}.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_with_its_outputs(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < MOST_BYTES
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    check_conclusions(name, notebook)
    assert "widget" not in str(notebook.metadata)
    assert str(FOLDER.parents[1]) not in path.read_text()
