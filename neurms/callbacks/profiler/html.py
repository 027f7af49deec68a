"""The report as one page that needs nothing beside itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from neurms.callbacks.profiler.formats import bytes_text, number, percent, time_text
from neurms.callbacks.profiler.plots import figures

if TYPE_CHECKING:
    from neurms.callbacks.profiler.advice import Advice
    from neurms.callbacks.profiler.report import ProfilerReport
    from neurms.callbacks.profiler.rows import LayerRow

__all__ = ["page"]


def page(report: ProfilerReport) -> str:
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


def _about(report: ProfilerReport) -> str:
    header, steps = report.run.header, report.steps
    parts = [
        f"{len(steps)} of {report.run.totals.get('steps', 'an unknown number of')} steps profiled",
        f"every {header.get('every_n_steps', '?')} after {header.get('warmup_steps', '?')}",
        f"device {header.get('device', '?')}",
        f"{header.get('threads', '?')} threads",
        f"{header.get('ranks', 1)} rank(s)",
        f"torch {header.get('torch', '?')}",
    ]
    unfinished = [] if report.run.finished else ["the run was cut off"]
    return ", ".join(parts + unfinished) + "."


def _totals(report: ProfilerReport) -> str:
    entries = [
        ("step", time_text(None if report.step_ms is None else report.step_ms * 1e3)),
        ("samples/s", number(report.samples_per_second)),
        ("overhead", percent(report.overhead)),
        ("with bookkeeping", percent(report.overhead_with_bookkeeping)),
        ("mean ρ", number(report.rho)),
        ("optimizer state", bytes_text(report.state_bytes)),
        ("resident", bytes_text(report.rss_bytes)),
        ("peak", bytes_text(report.peak_rss_bytes)),
        (
            "looking at a step cost",
            time_text(None if report.profiler_ms is None else report.profiler_ms * 1e3),
        ),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in entries)


def _advice(report: ProfilerReport) -> str:
    entries = report.advice()
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


_HEADINGS = (
    "layer", "kind", "shape", "rule", "rows", "forward", "backward", "D\u1d40H", "reduce", "scale",
    "update", "bookkeeping", "overhead", "law", "ρ", "ceiling", "ρ batch", "ρ gradient", "error",
    "r_avg", "r_min", "r_max", "dead", "clipped", "kept energy", "limited", "state", "predicted",
)  # fmt: skip


def _table(report: ProfilerReport) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in _HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
        for row in report
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cells(row: LayerRow) -> list[str]:
    dominance = row.dominance
    return [
        row.layer,
        row.kind,
        "×".join(map(str, row.shape)),
        row.rule,
        f"{row.rows:,}",
        time_text(row.forward_us),
        time_text(row.backward_us),
        time_text(row.gemm_us),
        time_text(row.reduce_us),
        time_text(row.scale_us),
        time_text(row.update_us),
        time_text(row.bookkeeping_us),
        percent(row.overhead),
        percent(row.predicted_overhead),
        number(row.rho),
        number(row.rho_ceiling),
        number(row.rho_batch),
        number(row.rho_gradient),
        number(row.factorization_error),
        number(dominance.r_avg if dominance else None),
        number(dominance.r_min if dominance else None),
        number(dominance.r_max if dominance else None),
        number(row.dead_units),
        number(row.clipped_units),
        percent(row.subspace_energy),
        percent(row.limiter_hits),
        bytes_text(row.state_bytes),
        bytes_text(row.predicted_state_bytes),
    ]


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
