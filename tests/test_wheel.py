"""A wheel is all that its user needs: verbs, recipes and pages work from an empty folder, without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from hyspark import __version__
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


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a checkout or an unpacked source distribution."""
    folder.mkdir(exist_ok=True)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    call(sys.executable, *build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a package is made of, in a folder of its own, and a module of an old build."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("hyspark", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "build" / "lib" / "hyspark").mkdir(parents=True)
    (folder / "build" / "lib" / "hyspark" / "removed.py").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout."""
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
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
    assert call(python, "-m", "hyspark", "--version", cwd=tmp_path) == f"hyspark {__version__}\n"
    for verb in VERBS:
        assert f"usage: hyspark {verb}" in call(python, "-m", "hyspark", verb, "--help", cwd=tmp_path)
    call(python, "-m", "hyspark", "phantom", "--out", "demo", "--num_labelled", 0, "--num_unlabelled", 3, cwd=tmp_path)
    pretrain = ("pretrain", "--config", "demo", "--data", "demo", "--out", "run", "--device", "cpu")
    advice = call(python, "-m", "hyspark", *pretrain, cwd=tmp_path, code=2).partition("make it by: hyspark ")[2]
    call(python, "-m", "hyspark", *advice.split(), cwd=tmp_path)
    call(
        python,
        "-m",
        "hyspark",
        *pretrain,
        "--max_steps",
        1,
        "--picture_every",
        0,
        "--batch_size",
        1,
        "--vit_depth",
        1,
        cwd=tmp_path,
    )
    assert (tmp_path / "run" / "report.html").is_file()
    moco = ("pretrain", "--model", "moco/timm/resnet18", "--slices", "axial", "--crop_size", 64, "--in_channels", 3)
    block = "import sys; sys.modules['lightly'] = None; from hyspark.cli.main import main; main(sys.argv[1:])"
    assert "pip install 'hyspark[views]'" in call(python, "-c", block, *moco, "--data", "demo", cwd=tmp_path, code=2)


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel, but for the list of their checksums, whose order may differ."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.mark.slow
def test_a_source_distribution_gives_the_same_wheel(wheel, checkout, tmp_path):
    code = f"import setuptools.build_meta; setuptools.build_meta.build_sdist({str(tmp_path)!r})"
    call(sys.executable, "-c", code, cwd=checkout)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    names = {path.relative_to(tmp_path).parts[1] for path in (tmp_path / packed.name.removesuffix(".tar.gz")).iterdir()}
    assert {"tests", "docs", "data", "ckpt"} & names == set()
    direct = contents(wheel)
    assert contents(build_wheel(tmp_path / packed.name.removesuffix(".tar.gz"), tmp_path / "again")) == direct
    assert not any(name.endswith("removed.py") for name in direct)
    recipes = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {Path(name).name for name in direct if name.startswith("hyspark/recipes/")} == recipes
    metadata = message_from_bytes(next(text for name, text in direct.items() if name.endswith("/METADATA")))
    assert metadata["Version"] == __version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "# " in metadata.get_payload()
