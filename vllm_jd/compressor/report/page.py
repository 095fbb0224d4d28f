"""A self-contained page: its frame and its style, tiles with key numbers, pictures, tables.

Nothing on it is loaded from elsewhere or run: a page may be sent to anybody.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape


def page(title: str, body: str, style: str = "") -> str:
    """An HTML page.

    Args:
        title: of its window, as text.
        body: HTML.
        style: CSS beside that which all pages have.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def tiles(numbers: Mapping[str, str]) -> str:
    """Key numbers, as text, beside each other."""
    inside = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>\n"
        for key, value in numbers.items()
    )
    return f"<dl>\n{inside}</dl>"


def picture(title: str, png: bytes, text: str) -> str:
    """A figure with its title and a line about it."""
    title, text = escape(title), escape(text)
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><h2>{title}</h2><img alt="{title}. {text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str | float]], kind: str = ""
) -> str:
    """A table; numbers have three digits.

    Args:
        title: its caption.
        columns: what stands above them.
        rows: their cells; the first of each is its name.
        kind: class of the element.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = ""
    for name, *cells in rows:
        text = (cell if isinstance(cell, str) else f"{cell:#.3g}" for cell in cells)
        body += (
            f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in text)
            + "</tr>\n"
        )
    start = f'<table class="{kind}">' if kind else "<table>"
    return (
        f"{start}<caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}</tbody></table>"
    )


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; margin: 0; }
body { font: 13px/1.35 system-ui, sans-serif; color: #1a1a1a; background: #f3f4f6;
  padding: 10px 14px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 18px; }
h1 { font-size: 19px; overflow-wrap: anywhere; }
header p, figcaption, footer { color: #555; font-size: 12px; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0; }
dl div { flex: 1 1 auto; background: #fff; border: 1px solid #ddd; border-radius: 4px;
  padding: 4px 10px; }
dt { color: #555; font-size: 11.5px; }
dd { font-size: 16px; font-weight: 600; white-space: nowrap; }
.note { background: #fff7db; border: 1px solid #e8d48a; border-radius: 4px; padding: 3px 10px;
  margin-bottom: 8px; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 8px; }
figure, section { background: #fff; border: 1px solid #ddd; border-radius: 4px;
  padding: 6px 10px; min-width: 0; break-inside: avoid; }
figure { display: flex; flex-direction: column; }
h2, caption { font-size: 13px; font-weight: 600; text-align: left; margin-bottom: 3px; }
img { width: 100%; height: auto; }
h2.none { margin-top: 8px; }
ul.none { padding-left: 18px; color: #666; font-size: 12px; }
code { white-space: nowrap; }
figcaption { font-size: 11.5px; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; font-size: 11.5px;
  line-height: 1.2; margin-bottom: 4px; }
th, td { padding: 1px 2px; text-align: right; font-weight: 400; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; overflow: hidden; text-overflow: ellipsis; }
th:nth-child(2) { width: 5.4em; }
th:nth-child(3) { width: 5.4em; }
th:nth-child(4) { width: 7.4em; }
thead th { color: #555; border-bottom: 1px solid #ddd; }
footer { margin-top: 8px; }
@media print {
  body { background: #fff; padding: 0; }
  main { grid-template-columns: 1fr 1fr; }
  th:first-child { white-space: normal; overflow-wrap: anywhere; }
}
"""
