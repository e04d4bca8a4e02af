"""Advice in messages works when it is typed: verbs and flags exist, and files come with a wheel."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from hyspark.cli import completion, main
from hyspark.config.yaml_files import recipe_files
from hyspark.utils import install

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "hyspark").rglob("*.py"))
OF_OTHERS = {"--nproc_per_node", "--porcelain", "--untracked", "--ml", "python zero_to_fp32.py"}
OF_OTHERS |= {"--config_file", "--dataset_dir", "--labels_dir", "--output_dir"}
"""Flags of torchrun, git, TotalSegmentator and MONAI's bundles, and DeepSpeed's script beside its weights."""
FLAGS = {
    flag for verb in main.VERBS for action in completion.verb_parser(verb)._actions for flag in action.option_strings
} | {"--version", "--completion"}


def messages(path: Path) -> list[tuple[int, str]]:
    """Texts of a file that are no docstrings, with their lines; what is filled in is "..."."""
    tree = ast.parse(path.read_text())
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values)
            found.append((node.lineno, text))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (silent | parts):
            found.append((node.lineno, node.value))
    return found


def wrong_advice(text: str) -> list[str]:
    """What a user cannot type of a message."""
    wrong = [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+", text) if flag not in FLAGS | OF_OTHERS]
    wrong += [word for word in re.findall(r"\bpython3? [\w/]+\.py\b", text) if word not in OF_OTHERS]
    for verb in re.findall(r"(?:`|by: |type |run )hyspark ([a-z][a-z-]*)", text):
        wrong += [] if verb in main.VERBS else [f"hyspark {verb}"]
    for name in re.findall(r"--config (?:configs/)?([a-z]\w*)", text):
        wrong += [] if name in recipe_files() else [f"--config {name}"]
    return wrong + [extra for extra in re.findall(r"hyspark\[(\w+)\]", text) if extra not in extras()]


def extras() -> list[str]:
    """The extras of this package."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    return re.findall(r"^(\w+) = \[", text.partition("\n[")[0], flags=re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_messages_advise_can_be_typed(path):
    found = [(line, wrong) for line, text in messages(path) if (wrong := wrong_advice(text))]
    assert found == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("use --batch_sizes 2", ["--batch_sizes"]),
        ("make it by: python generate_js.py --data d", ["python generate_js.py"]),
        ("use `hyspark finetun`", ["hyspark finetun"]),
        ("--config pretrain_dem", ["--config pretrain_dem"]),
        ("pip install 'hyspark[view]'", ["view"]),
        ("use --batch_size 2, or `hyspark pretrain --config pretrain`; pip install 'hyspark[views]'", []),
    ],
)
def test_wrong_advice_is_found(text, wrong):
    assert wrong_advice(text) == wrong


def asked_for() -> set[str]:
    """Extras that the package's messages name."""
    calls = r"(?:install_command\(|extra_error\(error, (?:f?\"[^\"]*\"|\w+), )['\"](\w+)"
    return {name for path in FILES for name in re.findall(calls, path.read_text())}


def test_extras_in_messages_exist():
    assert {"dicom", "formats", "views"} <= asked_for() <= set(extras())


@pytest.mark.parametrize("extra", sorted(asked_for()))
def test_an_extra_is_installed_as_the_package_was(extra, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert install.install_command(extra) == f"pip install -e '.[{extra}]'"
    monkeypatch.chdir(tmp_path)
    pip, install_word, editable, where = shlex.split(install.install_command(extra))
    assert (pip, install_word, editable, where) == ("pip", "install", "-e", f"{ROOT}[{extra}]")
    monkeypatch.setattr(install, "PACKAGE", tmp_path / "site-packages" / "hyspark")
    assert install.install_command(extra) == f"pip install 'hyspark[{extra}]'"
