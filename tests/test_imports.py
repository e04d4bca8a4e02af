"""What modules import and name: the rooms, the command line, pyplot, CUDA."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hyspark

PACKAGE = Path(hyspark.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [PACKAGE.parent / name for name in ("generate_js.py", "train.py", "finetune_btcv.py")]
DEVICE_OF_MONAI = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
"""The device in the configs of MONAI bundles."""
CUDA_ALLOWED = {
    "training/distributed.py": None,  # which device a process has
    "training/memory.py": None,
    "training/precision.py": {"cuda"},  # which formats a GPU has
    "comparison/jobs.py": {"cuda", "CUDA_VISIBLE_DEVICES"},  # which GPU a job gets
    "config/shared.py": {"cuda"},  # a choice of the setting `device`
    "nnunet_trainers/nnUNetTrainer_HySparK.py": {"cuda"},  # the default of nnU-Net
    "reports/run_page.py": {"cuda"},  # the environment table names the GPU
    "evaluation/segmentation/deployed.py": {"cuda", "CUDAExecutionProvider"},  # what ONNX Runtime calls a GPU
    "exports/bundle_configs.py": {DEVICE_OF_MONAI},
}
"""Files that may say cuda in code, and the words they may use (None: any)."""


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


def test_the_rooms_are_those_of_the_contract():
    """Every room has its floor; what each may import, `make lint` checks by the contract in pyproject.toml."""
    contract = re.search(r"layers = \[(.*?)\]", (PACKAGE.parent / "pyproject.toml").read_text(), flags=re.DOTALL)
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"hyspark\.(\w+)", contract.group(1))) == rooms
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert all(path.is_file() for path in SCRIPTS)


def test_only_the_command_line_parses_flags():
    parsing = {named(path) for path in MODULES if imported_from(path, "argparse", "tap")}
    assert {name.partition("/")[0] for name in parsing} == {"cli"}


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
        '"""cuda in a docstring."""\nimport hyspark.training.loop\nfrom hyspark import training\n'
        "import matplotlib.pyplot as plt\n\ndef f(x):\n    '''cuda'''\n    return x.to('cuda:0').cuda()\n"
    )
    assert imported_from(path, "hyspark.training") == ["hyspark.training.loop", "hyspark.training"]
    assert imported_from(path, "hyspark.models", "tap") == []
    assert imported_from(path, "matplotlib.pyplot") == ["matplotlib.pyplot"]
    assert words_with_cuda(path) == {"cuda:0", "cuda"}
