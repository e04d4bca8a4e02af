"""Links of pages and notebooks: the files and headings that they lead to."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from tests.docs.blocks import ROOT, name_of, prose_of

LINK = re.compile(
    r"""\]\(<?(?P<inline>[^)\s>]+)[^)]*\)|^\s*\[[^\]^]+\]:\s*<?(?P<defined>[^\s>]+)|<\w+[^>]*?(?:href|src)="(?P<html>[^"]+)\"""",
    flags=re.MULTILINE,
)
OUTSIDE = re.compile(r"\w+:|//")


@cache
def load_generator() -> Any:
    """Import docs/generate_reference.py."""
    spec = spec_from_file_location("generate_reference", ROOT / "docs/generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page: Path) -> str:
    """Return the text of a page, or of a notebook's cells, without blocks."""
    if page.suffix != ".ipynb":
        return prose_of(page)
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def dead_links(page: Path, generated: Mapping[str, str]) -> Iterator[str]:
    """Yield the targets of a page that do not exist.

    Args:
        page: The page.
        generated: Pages that are written when the site is built, by their paths in the checkout.
    """
    text = text_of(page)
    for found in LINK.finditer(re.sub(r"`[^`\n]*`", "", text)):
        target = found["inline"] or found["defined"] or found["html"]
        if OUTSIDE.match(target):
            continue
        name, _, anchor = target.partition("#")
        if workflow := re.match(r"\.\./\.\./actions/workflows/([^/]+)", name):
            name = f".github/workflows/{workflow[1]}"
        linked = (page.parent / name).resolve() if name else page.resolve()
        shown = generated.get(name_of(linked))
        if (shown is None and not linked.exists()) or (
            anchor and linked.suffix == ".md" and anchor not in anchors_of(shown or text_of(linked))
        ):
            yield target


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page: those that it names, and those that sites make of its headings."""
    found = set(re.findall(r"\{[^}]*#([\w-]+)[^}]*\}", text)) | set(re.findall(r"""(?:id|name)="([^"]+)\"""", text))
    found |= set(re.findall(r"^::: (\S+)", text, flags=re.MULTILINE))  # of mkdocstrings
    count: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+?)(?:\{.*\})?\s*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        number = count[slug] = count.get(slug, -1) + 1
        found |= {f"{slug}-{number}", f"{slug}_{number}"} if number else {slug, re.sub(r"-+", "-", slug)}
    return found
