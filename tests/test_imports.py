"""The import rule: `models` and `data` do not know each other; neither knows the engine or the command line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hyspark

PACKAGE = Path(hyspark.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [PACKAGE.parent / name for name in ("generate_js.py", "train.py", "finetune_btcv.py", "finetune_classify.py")]
COMMAND_LINE = ("hyspark.cli", "argparse", "tap")
CUDA_ALLOWED = {
    "engine/distributed.py": None,  # the one place that knows devices
    "engine/jobs.py": {"cuda", "CUDA_VISIBLE_DEVICES"},  # which GPU a job gets
    "engine/precision.py": {"cuda"},  # which formats a GPU has
    "config.py": {"cuda"},  # a choice of the setting `device`
    "report.py": {"cuda"},  # the environment table names the GPU
}
"""Files that may say cuda in code, and the words they may use (None: any)."""


def room(path: Path) -> str:
    """models, data, engine, or the file itself."""
    return path.relative_to(PACKAGE).parts[0]


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, inside functions too; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["hyspark", *path.relative_to(PACKAGE).parts[:-1]]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_from(path: Path, *packages: str) -> list[str]:
    """The imports of a file that lie in one of the packages."""
    return [name for name in imports(path) if any(name == p or name.startswith(f"{p}.") for p in packages)]


def words_with_cuda(path: Path) -> set[str]:
    """Names, attributes, keywords and strings of the code that hold "cuda"; docstrings are not code."""
    tree = ast.parse(path.read_text())
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    not_code = {id(n.value) for n in texts}
    words = []
    for node in ast.walk(tree):
        if id(node) not in not_code:
            words += [getattr(node, kind, None) for kind in ("id", "attr", "arg", "name", "value")]
    return {word for word in words if isinstance(word, str) and "cuda" in word.lower()}


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_rooms_are_there():
    assert {"models", "data", "engine", "cli.py", "config.py"} <= {room(path) for path in MODULES}
    assert all(path.is_file() for path in SCRIPTS)


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) == "models"], ids=named)
def test_models_know_no_data(path):
    assert imported_from(path, "hyspark.data", "hyspark.engine", *COMMAND_LINE) == []


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) == "data"], ids=named)
def test_data_knows_no_models(path):
    assert imported_from(path, "hyspark.models", "hyspark.engine", *COMMAND_LINE) == []


def test_only_the_command_line_imports_the_engine():
    known = {named(path) for path in MODULES if room(path) != "engine" and imported_from(path, "hyspark.engine")}
    assert known == {"cli.py"}


def test_only_the_command_line_parses_flags():
    assert {named(path) for path in MODULES if imported_from(path, *COMMAND_LINE)} == {"cli.py", "flags.py"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_only_call_the_command_line(path):
    own = imported_from(path, "hyspark")
    assert own
    assert imported_from(path, "hyspark.cli") == own


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: path.stem)
def test_no_module_imports_pyplot(path):
    """pyplot keeps figures in a global list and may want a display."""
    assert imported_from(path, "matplotlib.pyplot") == []


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_cuda_is_named_in_one_place(path):
    allowed = CUDA_ALLOWED.get(named(path), set())
    assert allowed is None or words_with_cuda(path) <= allowed


def test_the_rules_can_fail(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        '"""cuda in a docstring."""\nimport hyspark.engine.run\nfrom hyspark import engine\n'
        "import matplotlib.pyplot as plt\n\ndef f(x):\n    '''cuda'''\n    return x.to('cuda:0').cuda()\n"
    )
    assert imported_from(path, "hyspark.engine") == ["hyspark.engine.run", "hyspark.engine"]
    assert imported_from(path, "hyspark.models", *COMMAND_LINE) == []
    assert imported_from(path, "matplotlib.pyplot") == ["matplotlib.pyplot"]
    assert words_with_cuda(path) == {"cuda:0", "cuda"}
