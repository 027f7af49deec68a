"""The report as one page that needs nothing beside itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape

from neurms.report.advice import Advice, advise
from neurms.report.columns import COLUMNS, DECISIVE, cells, profiled, totals
from neurms.report.curves import loss_texts
from neurms.report.document import document, shown, table
from neurms.report.plots import Figure, figures
from neurms.report.recommendation import recommendation
from neurms.report.summary import Summary

__all__ = ["page", "plots", "title_of"]


_NEXT = (
    "In PyTorch <code>report.advice().apply(model)</code> makes the optimizer that follows. The "
    "advice says whose premise holds; train with it, and let <code>neurms report A B</code> set "
    "the losses side by side."
)


def page(report: Summary) -> str:
    """Return the page's HTML: what to do, totals, plots, layers, advice with its reasons."""
    title = title_of(report)
    found = {**loss_texts(report.run.logged), **totals(report)}
    return document(
        title,
        f"""<header>
<h1>{escape(title)}</h1>
<p class="about">{escape(_about(report))}</p>
</header>
<main>
<p class="lead">{_lead(recommendation(report))}</p>
<dl class="totals">{_totals(found)}</dl>
<h2>Plots</h2>
{plots(figures(report))}
<h2>Layers</h2>
{table(DECISIVE, cells(report, DECISIVE), "layers")}
<details><summary>All columns</summary>
{table(tuple(COLUMNS), cells(report, tuple(COLUMNS)), "all columns of the layers")}
</details>
<h2>Advice, layer by layer</h2>
{_advice(report)}
</main>""",
    )


def title_of(report: Summary) -> str:
    """Return a run's model and optimizer."""
    header = report.run.header
    return f"{header.get('model', 'model')} with {header.get('optimizer', 'an optimizer')}"


def plots(found: Iterable[Figure]) -> str:
    """Return figures as HTML."""
    body = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{plot}"
        + (f"<p>{escape(note)}</p>" if note else "")
        + "</figure>"
        for name, plot, note in found
    )
    return f'<div class="plots">{body}</div>'


def _lead(sentence: str) -> str:
    """Return a sentence as HTML, names between backticks as code."""
    parts = escape(re.sub("[Rr]ho", "ρ", sentence)).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _about(report: Summary) -> str:
    header = report.run.header
    threads, ranks = header.get("threads", "?"), header.get("ranks", 1)
    parts = [
        profiled(report),
        f"every {header.get('every_n_steps', '?')} after {header.get('warmup_steps', '?')}",
        f"device {header.get('device', '?')}",
        f"{threads} thread{'' if threads == 1 else 's'}",
        f"{ranks} rank{'' if ranks == 1 else 's'}",
        f"torch {header.get('torch', '?')}",
    ]
    unfinished = [] if report.run.finished else ["the run was cut off"]
    return ", ".join(parts + unfinished) + "."


def _totals(found: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{shown(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in found.items())


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
    return f'<section class="advice">{"".join(parts)}<p>{_NEXT}</p></section>'
