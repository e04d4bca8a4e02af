"""Building blocks of the pages: style, cards, tables, figures."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--text:#1d2330;--soft:#5d6675;--line:#dfe3e8}
@media(prefers-color-scheme:dark){:root{--page:#101216;--card:#1b1f26;--text:#e3e7ed;--soft:#98a2b0;--line:#323843}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:76rem;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:0 0 1rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .6rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.7rem}
.cards div,.box{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.cards dt,figcaption,.note{color:var(--soft);font-size:.86rem}dl,dd{margin:0}
.cards dd{font-size:1.2rem;font-weight:600;overflow-wrap:anywhere}
.box{overflow-x:auto}img{display:block;max-width:100%;height:auto;border-radius:.4rem}
figure{margin:0 0 1rem}
details{margin:0 0 .6rem}summary{cursor:pointer;font-weight:600;margin:0 0 .4rem}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top}
tr+tr>*{border-top:1px solid var(--line)}.text td{font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.numbers :is(td,th):not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
.numbers tr:last-child td{font-weight:600}
"""


def cards(summary: Mapping[str, str]) -> str:
    """A few figures with their names, side by side."""
    boxes = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in summary.items())
    return f'<dl class="cards">{boxes}</dl>'


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML page of parts that are HTML already; `title` is not."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
    )
    return head + "\n".join(body) + "\n</body></html>\n"


def figure_html(path: Path) -> str:
    """A picture with its name below."""
    name = escape(path.stem)
    return f'<figure><img alt="{name}" src="{data_url(path.read_bytes())}"><figcaption>{name}</figcaption></figure>'


def table(rows: Sequence[Sequence[str]], kind: str, *, header: bool = False) -> str:
    """An HTML table of the style `kind`; with `header`, its first row is one."""
    lines = []
    for index, row in enumerate(rows):
        tag = "th" if header and index == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<div class="box"><table class="{kind}">{"".join(lines)}</table></div>'


def data_url(content: bytes) -> str:
    """A PNG as an address that holds all of it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
