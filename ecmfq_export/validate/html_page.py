"""One HTML page that needs nothing from outside: its frame and style, tables, and words that carry a color."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2328; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 0 0 10px; }
.sub { color: #5b636d; margin: 0 0 18px; }
section { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 16px 18px; margin: 0 0 16px; overflow-x: auto; }
.verdict { border-left: 6px solid; }
.verdict.pass { border-left-color: #3d8b57; } .verdict.fail { border-left-color: #b3392f; }
.verdict h2 { font-size: 20px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: #5b636d; font-weight: 600; border-bottom: 1px solid #d5d9df; padding: 4px 10px 4px 0; }
td { border-bottom: 1px solid #eef0f3; padding: 4px 10px 4px 0; vertical-align: top; }
td.n, th.n { text-align: right; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.ok { color: #2f7347; font-weight: 600; } .bad { color: #b3392f; font-weight: 600; } .open { color: #8a6d1a; font-weight: 600; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 16px; }
.two section { margin: 0; } .two { margin-bottom: 16px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
img { image-rendering: pixelated; border-radius: 4px; display: block; }
p.note { color: #5b636d; font-size: 13px; margin: 8px 0 0; }
"""


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """A whole page; `parts` are HTML sections, title and subtitle plain text."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>"
        f'<h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p>\n' + "\n".join(parts) + "\n</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int]) -> str:
    """A table of HTML cells under plain headers; columns in `numbers` are aligned right."""

    def cell(tag: str, column: int, text: str) -> str:
        return f"<{tag}{' class=n' if column in numbers else ''}>{text}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, escape(h)) for i, h in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def word(kind: str, text: str) -> str:
    """Plain text in the color of `kind`: ``ok``, ``bad`` or ``open``."""
    return f'<span class="{kind}">{escape(text)}</span>'
