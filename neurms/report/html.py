"""The report as one page that needs nothing beside itself."""

from __future__ import annotations

from html import escape

from neurms.report.advice import Advice, advise
from neurms.report.columns import COLUMNS, profiled, totals
from neurms.report.plots import figures
from neurms.report.summary import Summary

__all__ = ["page"]


def page(report: Summary) -> str:
    """Return the page's HTML: totals, advice, plots, table; no script, no request to anywhere."""
    header = report.run.header
    title = f"{header.get('model', 'model')} with {header.get('optimizer', 'an optimizer')}"
    plots = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{plot}<p>{escape(note)}</p></figure>"
        for name, plot, note in figures(report)
    )
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
<header>
<h1>{escape(title)}</h1>
<p class="about">{escape(_about(report))}</p>
</header>
<dl class="totals">{_totals(report)}</dl>
<h2>Advice</h2>
{_advice(report)}
<h2>Plots</h2>
<main>{plots}</main>
<h2>Layers</h2>
{_table(report)}
</body>
</html>
"""


def _about(report: Summary) -> str:
    header = report.run.header
    parts = [
        profiled(report),
        f"every {header.get('every_n_steps', '?')} after {header.get('warmup_steps', '?')}",
        f"device {header.get('device', '?')}",
        f"{header.get('threads', '?')} threads",
        f"{header.get('ranks', 1)} rank(s)",
        f"torch {header.get('torch', '?')}",
    ]
    unfinished = [] if report.run.finished else ["the run was cut off"]
    return ", ".join(parts + unfinished) + "."


def _totals(report: Summary) -> str:
    entries = totals(report).items()
    return "".join(f"<div><dt>{_shown(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in entries)


def _advice(report: Summary) -> str:
    entries = advise(report)
    if not entries:
        return "<p>No step was profiled.</p>"
    groups: dict[str, list[Advice]] = {}
    for entry in entries:
        groups.setdefault(entry.rule, []).append(entry)
    parts = []
    for rule, own in groups.items():
        body = "".join(f"<li><code>{escape(a.layer)}</code> {escape(a.reason)}</li>" for a in own)
        open_ = " open" if len(own) <= 8 else ""
        parts.append(
            f"<details{open_}><summary><b>{escape(rule)}</b> for {len(own)} "
            f"layer{'s' if len(own) > 1 else ''}</summary><ul>{body}</ul></details>"
        )
    return f'<section class="advice">{"".join(parts)}</section>'


def _table(report: Summary) -> str:
    head = "".join(f"<th>{_shown(name)}</th>" for name in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(text(row))}</td>" for text in COLUMNS.values()) + "</tr>"
        for row in report
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _shown(name: str) -> str:
    return escape(name.replace("rho", "ρ").replace("^T ", "ᵀ"))


_STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--paper:#fff;--card:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;
--paper:#0d1117;--card:#161b22}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:16px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:1.4em 0 .5em}
.about{color:var(--soft);margin:.2em 0 1em}
.totals{display:grid;grid-template-columns:repeat(auto-fit,minmax(125px,1fr));gap:8px;margin:0}
.totals div{background:var(--card);border-radius:8px;padding:8px 12px}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-size:1.1rem;font-weight:600}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:14px}
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
.advice ul{margin:.3em 0 .6em;padding-left:1.2em}summary{cursor:pointer}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;font-size:.85rem;white-space:nowrap}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
th{font-weight:600;color:var(--soft)}
@media print{body{max-width:none;font-size:11px}.scroll{overflow:visible}
table{white-space:normal;font-size:8px}th,td{padding:2px 3px}details{display:block}}
"""
