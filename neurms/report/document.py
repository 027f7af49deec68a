"""The frame of a page: its head and its style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["document", "framed", "shown", "table"]


def document(title: str, body: str) -> str:
    """Return a whole page, with no script and no request to anywhere."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def framed(page: str, title: str, height: int = 720) -> str:
    """Return a page as a notebook shows it: in a frame, so that its style stays its own."""
    return (
        f'<iframe title="{escape(title)}" srcdoc="{escape(page)}" sandbox '
        f'style="width:100%;height:{height}px;border:0"></iframe>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """Return a table of text that scrolls by itself where it is too wide; first column is names."""
    top = "".join(f'<th scope="col">{shown(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def shown(name: str) -> str:
    """Return a heading as HTML, with its symbols."""
    return escape(name.replace("rho", "ρ").replace("^T ", "ᵀ"))


_STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--paper:#fff;--card:#f6f8fa;--mark:#0969da}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;
--paper:#0d1117;--card:#161b22;--mark:#4493f8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:16px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:1.4em 0 .5em}
.about{color:var(--soft);margin:.2em 0 1em}
.lead{background:var(--card);border-left:4px solid var(--mark);border-radius:4px;
font-size:1.1rem;padding:10px 14px;margin:0 0 14px}
.totals{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:8px;margin:0}
.totals div{background:var(--card);border-radius:8px;padding:8px 12px}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-size:1.1rem;font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:14px}
figure{margin:0;background:var(--card);border-radius:8px;padding:12px;break-inside:avoid}
figcaption{font-weight:600;margin-bottom:6px}
figure p{color:var(--soft);font-size:.85rem;margin:6px 0 0}
svg{display:block;width:100%;max-width:560px;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)}
svg .grid{stroke:var(--line);stroke-width:1}
svg .median{stroke:var(--ink);stroke-width:1.5}
svg .tick-x,svg .label{text-anchor:middle}svg .tick-y{text-anchor:end}
svg .label{fill:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;list-style:none;margin:4px 0 0;padding:0;
font-size:.8rem}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}
.advice ul{margin:.3em 0 .6em;padding-left:1.2em}summary{cursor:pointer;margin:.4em 0}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;font-size:.85rem;white-space:nowrap;width:100%;
font-variant-numeric:tabular-nums}
th,td{padding:5px 9px;text-align:right;border-bottom:1px solid var(--line)}
thead th{font-weight:600;color:var(--soft)}
tbody th{font-weight:400;white-space:normal;overflow-wrap:normal;min-width:8em}
tbody th,thead th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
@media print{body{max-width:none;font-size:11px}.scroll{overflow:visible}
table{white-space:normal;font-size:8px}th,td{padding:2px 3px}details{display:block}}
"""
