"""What is wrong with a command that a page shows: an unknown verb, flag, recipe, script, target or extra."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hyspark.cli import completion, main
from hyspark.cli.arguments import BenefitArguments
from hyspark.cli.parsing import EARLIER_SETTINGS, parse, present_words, read_config, recipe_path
from hyspark.config.classification import ClassificationConfig
from hyspark.config.nnunet_training import NnunetTrainingConfig
from hyspark.config.recipes import SETTINGS_OF
from hyspark.config.segmentation import SegmentationConfig
from hyspark.config.yaml_files import find_recipe
from hyspark.utils.settings import field_info
from tests.docs.blocks import ROOT, prose_of, verb_and_flags
from tests.docs.shortened import in_folder

OF_OTHERS = {
    "--nproc_per_node",  # torchrun
    "--nnodes",
    "--node_rank",
    "--master_addr",
    "--master_port",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--rdzv_id",
    "--standalone",
    "--max-restarts",
    "--ntasks",  # SLURM
    "--ntasks-per-node",
    "--nodes",
    "--gres",
    "--gpus",
    "--gpus-per-node",
    "--cpus-per-task",
    "--mem",
    "--time",
    "--requeue",
    "--signal",
    "--array",
    "--wrap",
    "--dependency",
    "--export",
    "--ml",  # TotalSegmentator
    "--strict",  # mkdocs
    "--all-files",
    "--validate",
    "--index-url",  # pip
    "--extra-index-url",
    "--editable",
    "--upgrade",
    "--logdir",  # tensorboard, and an earlier spelling of --out
}
"""Flags of other programs that pages name."""
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
MADE_BY_USERS = re.compile(r"[$<>*{}]|\.\.\.|^[A-Z_]+$")
"""Words that stand for others."""


@cache
def flags_of(verb: str) -> set[str]:
    """Return the flags of a verb, in earlier spellings too."""
    verb = main.EARLIER.get(verb, verb)
    if verb == "benefit":
        tasks = (SegmentationConfig, ClassificationConfig)
        flags = set().union(*(flags_of(name) for name, one in SETTINGS_OF.items() if one in tasks))
        flags |= {f"--{name}" for name in field_info(NnunetTrainingConfig)}
    else:
        flags = set()
    parser = completion.verb_parser(verb)
    flags |= {option for action in parser._actions for option in action.option_strings}
    return flags | {f"--{old}" for old in parser.old_spellings()}


@cache
def all_flags() -> set[str]:
    """Return the flags of all verbs, scripts of benchmarks and named programs."""
    flags = {"--version", "--completion"} | OF_OTHERS | {f"--{old}" for old in EARLIER_SETTINGS}
    for verb in main.VERBS:
        flags |= flags_of(verb)
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        flags |= {
            f"--{name}" for name in re.findall(r'(?:"--|^    )(\w+)(?:"|: .+ = )', path.read_text(), re.MULTILINE)
        }
    return flags


def extras() -> set[str]:
    """Return the extras of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    part = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", part, flags=re.MULTILINE))


def wrong_words(words: Sequence[str], *, whole: bool = True) -> Iterator[str]:
    """Yield what a user cannot type of a command.

    Args:
        words: The words of the command.
        whole: Whether the words are a command as it is typed, not a part of one in a sentence.
    """
    called = verb_and_flags(tuple(words))
    if called:
        yield from wrong_verb(*called, whole=whole)
    elif words[:2] == ["hyspark", "--version"] or words[:1] == ["hyspark"]:
        return
    elif words[0] == "make" and len(words) > 1:
        for word in words[1:]:
            if "=" not in word and not word.startswith("-") and word not in TARGETS and not MADE_BY_USERS.search(word):
                yield f"make has no target {word}"
    elif words[0] in ("python", "python3") and len(words) > 1:
        yield from wrong_script(words[1:])
    for extra in re.findall(r"(?:hyspark|\.)\[([\w,]+)\]", " ".join(words)):
        yield from (f"no extra {name}" for name in extra.split(",") if name not in extras())


def wrong_script(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a Python script of the checkout, and its flags."""
    name = next((word for word in words if word.endswith(".py")), "")
    if not name.startswith(("benchmarks/", "docs/", "hyspark/", "tests/")):
        return
    path = ROOT / name
    if not path.is_file():
        yield f"no script {name}"
        return
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    sources = "".join(one.read_text() for one in path.parent.rglob("*.py"))
    yield from (f"{name} has no flag {flag}" for flag in flags if not re.search(rf"\b{flag[2:]}\b", sources))


def wrong_verb(verb: str, argv: list[str], *, whole: bool) -> Iterator[str]:
    """Yield what is wrong with a verb and its flags; whole commands are parsed as the command line does."""
    if verb in ("--version", "--help", "--completion", "-h") or MADE_BY_USERS.search(verb):
        return
    if verb not in (*main.VERBS, *main.EARLIER):
        yield f"hyspark has no verb {verb}"
        return
    known = flags_of(verb) | OF_OTHERS | {"--help"}
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    wrong = [flag for flag in given if flag not in known]
    yield from (f"hyspark {verb} has no flag {flag}" for flag in wrong)
    config = recipe_path(argv)
    if config and not MADE_BY_USERS.search(config):
        try:
            with in_folder(ROOT):
                find_recipe(config)
        except FileNotFoundError as error:
            if "/" not in config or config.startswith("configs/"):
                yield str(error)
            return  # a file of the user's own
    if whole and not wrong and "--help" not in argv and not any(MADE_BY_USERS.search(word) for word in argv):
        yield from parsed(main.EARLIER.get(verb, verb), argv)


def parsed(verb: str, argv: list[str]) -> Iterator[str]:
    """Yield what the command line says against a verb's words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), in_folder(ROOT):
            if verb in SETTINGS_OF:
                read_config(SETTINGS_OF[verb], f"hyspark {verb}", argv)
            elif verb == "benefit":
                parser = BenefitArguments(allow_abbrev=False)
                args = parser.parse_args(present_words(argv, parser.old_spellings()), known_only=True)
                kind: Any = {"segment": SegmentationConfig, "classify": ClassificationConfig}[args.task]
                kind = NnunetTrainingConfig if args.engine == "nnunet" else kind
                read_config(kind, "hyspark benefit", args.extra_args)
            else:
                parse(completion.verb_parser(verb), argv)
    except ValueError as error:
        yield f"{verb}: {error}"
    except SystemExit:
        yield f"{verb}: {said.getvalue().strip().splitlines()[-1]}"


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """Yield what stands between backticks outside of fenced blocks, with its line."""
    text = prose_of(page)
    for found in re.finditer(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", text, flags=re.S):
        yield text.count("\n", 0, found.start()) + 1, " ".join(found[2].split())
