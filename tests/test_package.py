"""The package: one version, the bounds that were tested, the README of its page, what `make setup` does and says."""

import importlib.util
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hyspark
from hyspark.cli.main import main

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = ROOT / ".github" / "constraints"


def requirements() -> list[Requirement]:
    """What the package and its extras need, but for the package itself."""
    table = PROJECT.partition("\ndependencies = [")[2].partition("[project.scripts]")[0]
    found = [Requirement(text) for text in re.findall(r'"([^"\n]+)"', table)]
    return [one for one in found if one.name != "hyspark"]


def pins(name: str) -> dict[str, list[str]]:
    """Versions of a file of constraints, by package; those behind a comment "of their own" are not the project's."""
    own = (CONSTRAINTS / name).read_text().partition("# Of their own")[0]
    found = [Requirement(line) for line in own.splitlines() if line and not line.startswith("#")]
    return {
        name: [str(one.specifier).removeprefix("==") for one in found if one.name == name]
        for name in {one.name for one in found}
    }


def test_requirements_are_read():
    names = {one.name for one in requirements()}
    assert {"torch", "jinja2", "pytest", "lightly", "SimpleITK", "mkdocs-material", "zarr"} <= names
    assert len(names) > 35


def test_the_lowest_versions_are_the_bounds():
    """`make test-lowest` runs what pyproject.toml promises; every bound is one specifier, >=."""
    bounds = {one.name: [Version(str(one.specifier).removeprefix(">="))] for one in requirements()}
    assert {name: [Version(text) for text in texts] for name, texts in pins("lowest.txt").items()} == bounds


def test_the_newest_versions_lie_within_the_bounds():
    newest = pins("newest.txt")
    for one in requirements():
        assert all(one.specifier.contains(text) for text in newest[one.name]), one
    assert set(newest) == {one.name for one in requirements()}


def test_one_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"hyspark {hyspark.__version__}\n"
    assert 'version = { attr = "hyspark.utils.version.VERSION" }' in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hyspark.__version__
    assert Version(version("hyspark")) <= Version(hyspark.__version__)  # an older one where it was installed before


def python_versions() -> list[str]:
    """Versions of Python that pyproject.toml names."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)


def test_the_workflow_runs_every_version_of_python():
    assert re.search(r'requires-python = ">=([\d.]+)"', PROJECT).group(1) == python_versions()[0]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = {row["python"] for row in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]}
    assert tested == set(python_versions())


def test_a_page_of_the_package_has_no_links_into_the_checkout():
    spec = importlib.util.spec_from_file_location("hyspark_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    readme = (
        "![scan](docs/a.png)\n\n*A caption, of\ntwo lines.*\n\n"
        "# A\n[![tests](https://a.b/c.svg)](docs/ci.md) ![scan](docs/a.png)\n"
        '<img alt="x" src="docs/b.png" width="3"> <img src="https://a.b/c.png">\n'
        "See [the docs](docs/index.md#a), [paper](https://a.b), [below](#below).\n```python\nnets[0](docs)\n```\n"
        "[Licence](LICENSE)\n"
    )
    assert setup.describe_package(readme) == (
        '# A\n![tests](https://a.b/c.svg) \n <img src="https://a.b/c.png">\n'
        "See the docs, [paper](https://a.b), [below](#below).\n```python\nnets[0](docs)\n```\nLicence\n"
    )
    described = setup.describe_package((ROOT / "README.md").read_text())
    assert described.startswith("# ")
    outside = re.sub(r"```.*?```", "", described, flags=re.DOTALL)
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", outside) == []


# make setup


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, and stand-ins for Python and pip that write down how they are called."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "path").mkdir()
    pip = '#!/bin/sh\necho "pip $*" >> calls\ncase "$*" in *index-url*) exit "${INDEX:-0}";; esac\n'
    own = '#!/bin/sh\ncase "$*" in *torch.version*) exit "${HAS_CUDA:-0}";; *) echo "own python $*" >> calls;; esac\n'
    python = (
        '#!/bin/sh\ncase "$*" in *version_info*) exit "${IS_OLD:-0}";; esac\n'
        f"mkdir -p .venv/bin && cp {tmp_path}/path/pip .venv/bin/pip && cp {tmp_path}/path/own .venv/bin/python\n"
    )
    for name, text in {"pip": pip, "own": own, "python3": python, "nvidia-smi": "#!/bin/sh\n"}.items():
        (tmp_path / "path" / name).write_text(text)
        (tmp_path / "path" / name).chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str, code: int = 0, **variables: str) -> str:
    """Call make with the stand-ins first on the path; its output."""
    environment = os.environ | {"PATH": f"{folder}/path:/usr/bin:/bin"} | variables
    done = subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_setup_installs_the_base_and_says_what_it_downloads(checkout):
    said = make(checkout, "setup")
    assert re.search(
        r"setup: PyTorch with CUDA: about 3.2 GB to download and 6 GB on disk with all it needs, in \.venv\n", said
    )
    assert "NVIDIA driver" not in said
    assert calls(checkout) == ["pip install --quiet --upgrade pip", "pip install --quiet --editable ."]
    assert "download" not in make(checkout, "setup")
    assert len(calls(checkout)) == 2  # nothing the second time


def test_the_build_without_cuda_is_offered_where_there_is_no_driver(checkout):
    (checkout / "path" / "nvidia-smi").unlink()
    assert "setup: no NVIDIA driver found; make setup TORCH=cpu" in make(checkout, "setup")
    assert "pip install --quiet --editable ." in calls(checkout)


def test_setup_without_cuda(checkout):
    said = make(checkout, "setup", "TORCH=cpu")
    assert "setup: PyTorch without CUDA: about" in said
    assert "NVIDIA" not in said
    index = "--index-url https://download.pytorch.org/whl/cpu torch torchvision"
    assert [index in line for line in calls(checkout)] == [False, True, False]


def test_an_index_that_does_not_answer_is_named_and_the_ordinary_one_follows(checkout):
    said = make(checkout, "setup", "TORCH=cpu", INDEX="1", HAS_CUDA="1")
    assert "https://download.pytorch.org/whl/cpu has no PyTorch for this machine, or does not answer" in said
    assert "setup: .venv has PyTorch with CUDA; for the one without: rm -r .venv && make setup TORCH=cpu" in said
    assert calls(checkout)[-1] == "pip install --quiet --editable ."


def test_setup_refuses_what_it_does_not_know(checkout):
    assert "TORCH=gpu: expected TORCH=cpu" in make(checkout, "setup", "TORCH=gpu", code=2)
    assert "python3 is older than Python 3.10" in make(checkout, "setup", IS_OLD="1", code=2)
    assert not (checkout / "calls").exists()


def test_tools_are_installed_for_tests_alone(checkout):
    make(checkout, "test")
    assert [line for line in calls(checkout) if "dev" in line] == ["pip install --quiet --editable .[dev]"]
    assert calls(checkout)[-1].startswith("own python -m pytest")
    demo = make(checkout, "--dry-run", "demo")
    assert "[dev]" not in demo


def test_the_lowest_versions_have_an_environment_of_their_own(checkout):
    said = make(checkout, "--dry-run", "test-lowest", "PYTHON=python3.10", code=2)
    assert "lowest.txt" in said  # a checkout without the file of constraints
    shutil.copytree(CONSTRAINTS, checkout / ".github" / "constraints")
    said = make(checkout, "--dry-run", "test-lowest", "PYTHON=python3.10")
    assert "python3.10 -m venv .venv-lowest" in said
    assert ".venv-lowest/bin/pip install --quiet --constraint .github/constraints/lowest.txt --editable" in said
