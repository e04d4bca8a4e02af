"""What the README shows must work: flags exist, Python runs, the tree is the tree, linked files exist."""

import re
import shlex
from pathlib import Path

import pytest

from hyspark.cli import arguments as cli_arguments
from hyspark.cli import main, parsing
from hyspark.config.classification import ClassificationConfig
from hyspark.config.pretrain import PretrainConfig
from hyspark.config.segmentation import SegmentationConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "data/README.md", "ckpt/README.md")]
SCRIPTS = {
    "generate_js.py": "datalist",
    "train.py": "pretrain",
    "finetune_btcv.py": "finetune",
}


def commands():
    """Every command line of the pages, as (words after the script, verb)."""
    found = []
    for page in PAGES:
        for line in page.read_text().replace("\\\n", " ").splitlines():
            for text in [line, *re.findall(r"`([^`]+)`", line)]:
                words = shlex.split(text.split("#")[0]) if text.count('"') % 2 == 0 and "'" not in text else []
                words = [w.rstrip(".") if w.endswith("py.") else w for w in words]
                if words and words[0] in ("python", "torchrun"):
                    at = next((i for i, w in enumerate(words) if w in SCRIPTS), None)
                    if at:
                        found.append((SCRIPTS[words[at]], words[at + 1 :]))
                elif len(words) > 1 and words[0] == "hyspark" and words[1] in main.VERBS:
                    found.append((words[1], words[2:]))
    return found


def test_the_pages_show_commands():
    verbs = {verb for verb, _ in commands()}
    assert {
        "datalist",
        "pretrain",
        "finetune",
        "weights",
        "evaluate",
        "predict",
        "benefit",
        "finetune-classifier",
    } <= verbs


@pytest.mark.parametrize(("verb", "argv"), commands())
def test_every_command_shown_has_flags_that_exist(verb, argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    if verb == "pretrain":
        parsing.read_config(PretrainConfig, verb, argv)
    elif verb == "finetune":
        parsing.read_config(SegmentationConfig, verb, argv)
    elif verb == "finetune-classifier":
        parsing.read_config(ClassificationConfig, verb, argv)
    elif verb == "benefit":
        args = cli_arguments.BenefitArguments(allow_abbrev=False).parse_args(argv, known_only=True)
        parsing.read_config(
            {"segment": SegmentationConfig, "classify": ClassificationConfig}[args.task], verb, args.extra_args
        )
    else:
        arguments = {
            "datalist": cli_arguments.DatalistArguments,
            "check": cli_arguments.CheckArguments,
            "weights": cli_arguments.WeightsArguments,
            "export": cli_arguments.ExportArguments,
            "import": cli_arguments.ImportArguments,
            "slices": cli_arguments.SlicesArguments,
            "evaluate": cli_arguments.EvaluateArguments,
            "predict": cli_arguments.PredictArguments,
        }
        parsing.parse(arguments[verb](allow_abbrev=False), argv)


def test_the_python_shown_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(block.replace("96", "32"), {})
    assert "matched     121 keys" in capsys.readouterr().out


def test_the_tree_is_the_tree():
    """Each room of the picture in the page of the design names the modules that are in it."""
    page = (ROOT / "docs/explanation/design.md").read_text()
    tree = re.search(r"```text\n(generate_js\.py.*?)```", page, flags=re.DOTALL).group(1)
    assert set(SCRIPTS) == set(re.findall(r"\w+\.py", tree))
    shown: dict[str, str] = {}
    room, outer = "", ""
    for line in tree[tree.index("\nhyspark/") :].splitlines()[2:]:
        if found := re.match(r"( +)(\w+)/ +(.*)", line):
            outer = found[2] if len(found[1]) == 2 else outer
            room = found[2] if len(found[1]) == 2 else f"{outer}/{found[2]}"
            shown[room] = found[3]
        else:
            shown[room] += line
    package = ROOT / "hyspark"
    rooms = {path.parent.relative_to(package).as_posix() for path in package.rglob("__init__.py")} - {"."}
    assert set(shown) == rooms
    for name, text in shown.items():
        modules = {path.stem for path in (package / name).glob("*.py")} - {"__init__"}
        assert modules <= set(re.findall(r"\w+", text)), name


def test_files_that_pages_name_exist():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name in re.findall(r"\b(?:hyspark|tests|benchmarks)/[\w/]+\.py", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_linked_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
