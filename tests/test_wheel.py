"""A wheel is all that its user needs: verbs, recipes and pages work from an empty folder, without the checkout."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from hyspark.cli.main import VERBS

ROOT = Path(__file__).parents[1]


def call(*command: object, cwd: Path, code: int = 0) -> str:
    """Run a command without the checkout on Python's path; its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    call(sys.executable, *build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=folder)
    others = [path for path in sys.path if path.endswith("site-packages")]
    Path(site, "others.pth").write_text("\n".join(others) + "\n")
    return python


@pytest.mark.slow
def test_a_wheel_holds_verbs_recipes_and_pages(python, tmp_path):
    where = call(python, "-c", "import hyspark; print(hyspark.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(python.parents[1])
    for verb in VERBS:
        assert f"usage: hyspark {verb}" in call(python, "-m", "hyspark", verb, "--help", cwd=tmp_path)
    call(python, "-m", "hyspark", "phantom", "--out", "demo", "--num_labelled", 0, "--num_unlabelled", 3, cwd=tmp_path)
    pretrain = ("pretrain", "--config", "pretrain_demo", "--data", "demo", "--out", "run", "--device", "cpu")
    advice = call(python, "-m", "hyspark", *pretrain, cwd=tmp_path, code=2).partition("make it by: hyspark ")[2]
    call(python, "-m", "hyspark", *advice.split(), cwd=tmp_path)
    call(python, "-m", "hyspark", *pretrain, "--max_steps", 1, "--picture_every", 0, cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()
