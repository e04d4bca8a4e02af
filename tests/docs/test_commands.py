"""The commands and the Python of every page run: shortened, and the slow ones as they stand."""

from pathlib import Path

import pytest

from tests.docs.blocks import RUNS, blocks_of, name_of, pages, summary
from tests.docs.page_form import faults_of
from tests.docs.typing_pages import type_page

PAGES = pages()
TYPED = [page for page in PAGES if any(block.language in RUNS for block in blocks_of(page))]
SLOW = [page for page in PAGES if any(block.mark == "slow" for block in blocks_of(page))]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for the workspaces, one for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if folder.name.startswith("popen-") else folder) / "workspaces"


@pytest.mark.parametrize("page", TYPED, ids=name_of)
def test_what_a_page_shows_runs(page, tmp_path, cache):
    type_page(page, tmp_path, cache)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_slow_pages_run_as_they_stand(page, tmp_path, cache):
    type_page(page, tmp_path, cache, as_typed=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_on_a_page_is_passed_over(page):
    assert faults_of(page) == []


def test_the_summary_counts_every_page():
    print(summary())
    assert summary().startswith(f"{len(pages())} pages")


def write_page(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n```sh\ntrue\nhyspark nonsense\n```\n", "page.md:4: exit code 2"),
        ("```sh\nhyspark phantom --out data --num_labeled 2\n```\n", "unknown argument '--num_labeled'"),
        ("```sh\npip install .\n```\n", "mark the block"),
        ("```sh\nmake nothing\n```\n", "no target nothing"),
        ("```sh\nfor x in 1 2; do\n  cat none_$x\ndone\n```\n", "page.md:3: exit code 1"),
        ("<!-- exit: 1 -->\n```sh\nhyspark --version\n```\n", "exit code 0, expected 1"),
        ("text\n\n```python\nx = 1\nraise KeyError(x)\n```\n", "page.md:4: KeyError"),
        ("```pycon\n>>> 1 + 1\n2\n>>> 2 + 2\n5\n```\n", "page.md:4: printed '4"),
        ("```sh\necho $(hyspark nonsense)\nls\n```\n", "page.md:2: exit code 2"),
        ("```sh\nif hyspark nonsense; then ls; fi\nls\n```\n", "though it failed: hyspark nonsense"),
        ("<!-- workspace: labeled -->\n```sh\nls\n```\n", "no workspace labeled"),
        ("```sh\nhyspark nonsense || ls\n```\n", "hides failures"),
    ],
)
def test_a_page_that_is_wrong_fails_with_its_line(tmp_path, cache, text, message):
    with pytest.raises(AssertionError) as failure:
        type_page(write_page(tmp_path, text), tmp_path / "run", cache)
    assert message in str(failure.value)


def test_a_page_that_is_right_passes(tmp_path, cache):
    text = (
        "<!-- file: more.py -->\n```python\nNAME = 'phantoms'\n```\n"
        "1. In a list:\n   ```sh\n   source .venv/bin/activate\n   cd data\n   out=few   # kept\n   ```\n"
        "```sh\nhyspark phantom --out $out \\\n    --num_labelled 0 --num_unlabelled 0\npwd | grep data > seen\n```\n"
        "<!-- exit: 2 -->\n```sh\nhyspark weights none.pth\n```\n"
        "```pycon\n>>> from more import NAME\n>>> NAME\n'phantoms'\n```\n"
        "```sh\ncd ..\nmake demo\npython - <<'END'\nprint('typed')\nEND\n```\n"
        "<!-- needs: a GPU -->\n```sh\nnvidia-smi\n```\n"
    )
    type_page(write_page(tmp_path, text), tmp_path / "run", cache)
    assert (tmp_path / "run/checkout/data/seen").read_text()


@pytest.mark.parametrize("text", ["```sh\nls\n", "<!-- need: a GPU -->\n```sh\nls\n```\n"])
def test_what_is_no_mark_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"page\.md:[12]: "):
        blocks_of(write_page(tmp_path, text))
