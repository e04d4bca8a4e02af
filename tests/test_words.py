"""The field's words: help, messages, docstrings and pages say what engineers of the field say."""

import ast
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / name for name in ("generate_js.py", "train.py", "finetune_btcv.py")]
FILES += sorted((ROOT / "hyspark").rglob("*.py"))
RECORDED = (ROOT / "docs/results/openkbp", ROOT / "docs/results/covidct")
"""Reports as `hyspark benefit` wrote them, in the words of its version then."""
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "data").glob("*.md"),
    *(ROOT / "ckpt").glob("hyspark*.md"),
    ROOT / "ckpt/README.md",
]
PAGES += [page for page in (ROOT / "docs").rglob("*.md") if page.parent not in RECORDED]
PAGES += [*(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
PLACEHOLDER = r"\bOUTPUT_[A-Z]+|\bTODO\b"
"""Text that was to be replaced."""
BANNED = {
    r"\breview(s|ed|ing)?\b": "validation",
    r"\bas a share\b|\b(the|a|its|each|this|whose|same) shares?\b|\bshares? of\b": "ratio, fraction or shard",
    r"\bhand(s|ed)? on\b": "export",
    r"\b(left|leaves?|leaving)( \w+)? out\b": "exclude, skip, omit or drop",
    r"\bcannot be used\b|\bcan be used\b": "unreadable, or what does not fit",
    r"\bt(old|ells?|elling)\b": "report, warn or describe",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bslow copy\b": "momentum encoder",
    r"\bnumber format\b": "precision",
    r"\bso many\b": "the number of",
    r"\bby heart\b": "overfitting",
    r"\bof others\b": "third-party",
    r"\bfresh(ly)?\b": "randomly initialised",
    r"\bplanes\b": "2D slices",
    r"\bas it stands\b|\bwhat is there\b|\bof the kind\b|\bwhere there (is|are) (one|such|some)\b": "the thing's name",
    r"\b(in|at) (its|their|the|the same|that) place\b|\bplace (in|of)\b": "position or index",
}


def texts(path: Path) -> list[tuple[int, str]]:
    """Docstrings and comments of a file, and strings of several words, with their lines."""
    source = path.read_text()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            found.append((node.lineno, " ".join(node.value.split())))
    with path.open("rb") as file:
        comments = (token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT)
        found += [(token.start[0], token.string) for token in comments]
    return found


def sentences(page: Path) -> str:
    """Text of a page or a notebook without blocks, code, link targets and comments; lines keep their numbers."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        text = "\n".join("".join(cell["source"]) for cell in cells)
    for hidden in (r"^( *)(`{3,}).*?^\1\2 *$", r"<!--.*?-->", r"`[^`\n]*`", r"\]\([^)]*\)", r"https?://\S+"):
        text = re.sub(hidden, lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    return text


def wrong_words(text: str, name: str) -> list[str]:
    """Banned words of a text, with the line of each, and what to say."""
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: say {instead}: "
        f"{text[max(0, match.start() - 30) : match.end() + 30]}"
        for pattern, instead in {**BANNED, PLACEHOLDER: "what is printed"}.items()
        for match in re.finditer(pattern, text, flags=0 if pattern == PLACEHOLDER else re.IGNORECASE)
    ]


def test_words_of_our_own_are_not_used_on_pages():
    wrong = [line for page in PAGES for line in wrong_words(sentences(page), str(page.relative_to(ROOT)))]
    assert wrong == []


def test_those_of_pages_are_found_outside_of_code_alone(tmp_path):
    (tmp_path / "a.md").write_text("# Told\n\n```sh\ntold\n```\n`told` [x](told.md) <!-- told -->\nOUTPUT_LIST\n")
    found = wrong_words(sentences(tmp_path / "a.md"), "a.md")
    assert [line.partition(": say")[0] for line in found] == ["a.md:1", "a.md:7"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_of_our_own_are_not_used(path):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: say {instead}: {text[max(0, match.start() - 30) : match.end() + 30]}"
        for line, text in texts(path)
        for pattern, instead in BANNED.items()
        if (match := re.search(pattern, text, flags=re.IGNORECASE))
    ]
    assert wrong == []


@pytest.mark.parametrize("word", ["review", "its share", "handed on", "leave it out", "told", "so many", "fresh"])
def test_each_is_found(word, tmp_path):
    (tmp_path / "a.py").write_text(f'"""Do something with {word}."""\n')
    ((_, text),) = texts(tmp_path / "a.py")
    assert any(re.search(pattern, text) for pattern in BANNED)
