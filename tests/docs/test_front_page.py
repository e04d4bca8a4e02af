"""The README stays a page to skim."""

from tests.docs.blocks import ROOT

MOST_LINES = 150


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES
