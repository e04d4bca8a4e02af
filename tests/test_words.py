"""The field's words: help, messages and docstrings say what engineers of the field say."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / name for name in ("generate_js.py", "train.py", "finetune_btcv.py")]
FILES += sorted((ROOT / "hyspark").rglob("*.py"))
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
