"""HTML pages from the templates of this room, each one self-contained file."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).with_name("templates")


def render_page(template: str, *, title: str, cards: dict[str, str], **content: Any) -> bytes:
    """Render a page. All text is escaped; names that are not UTF-8 keep their bytes.

    Args:
        template: File name of the template.
        title: Title of the page.
        cards: Facts at the top of the page, by name.
        **content: Further variables of the template.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["data_url"] = data_url
    page = environment.get_template(template).render(title=title, cards=cards, **content)
    return page.encode("utf-8", "surrogateescape")


def data_url(content: bytes) -> str:
    """Write a PNG as a URL that holds all of it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
