"""A name is defined in one module, so that whoever looks for it finds it."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hyspark"
TWICE = {
    "pretrain": "verb of the command line, and Python function with settings as keyword arguments",
    "finetune": "verb of the command line, and Python function with settings as keyword arguments",
    "evaluate": "verb of the command line, and Python function with settings as keyword arguments",
    "predict": "verb of the command line, and Python function with settings as keyword arguments",
    "embed": "verb of the command line, and Python function with settings as keyword arguments",
    "T": "type variable",
}
"""Names that may have two definitions, and why."""


def top_level_names(source: str) -> list[str]:
    """Functions, classes and constants of a module."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("__")]


def test_a_name_is_defined_in_one_module():
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in top_level_names(path.read_text()):
            modules[name].append(path.relative_to(PACKAGE).as_posix())
    twice = {name: paths for name, paths in modules.items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in TWICE} == {}
    assert set(twice) == set(TWICE), "an exception that is not needed any more"


def test_modules_of_a_room_are_more_than_a_letter_apart():
    """No pretrain beside pretraining, no store beside storage."""
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        stems = sorted(
            {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
        )
        for one in stems:
            assert not {f"{one}s", f"{one}ing", f"{one}ed", f"{one.removesuffix('e')}age"} & set(stems), (folder, one)


def test_every_kind_of_definition_is_seen():
    source = "def f(): ...\nclass C: ...\nA = B = 1\nD: int = 2\n__all__ = []\nx.y = 3\n"
    assert top_level_names(source) == ["f", "C", "A", "B", "D"]
