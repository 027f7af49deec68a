"""Sections of the page on text beside the LLaMAs: GPT-2 and dominance, shapes."""

from __future__ import annotations

import math

from benchmarks.language_rows import finals, rows
from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by
from benchmarks.tables.text import Content, compared, number
from benchmarks.tables.text_sections import GPT2, SHAPES


def gpt2(content: Content) -> str:
    """Return the section on the small GPT-2 and its dominance ratios."""
    settings = content["settings"]
    found = rows(content["runs"], settings["steps"])
    header, lines = compared(found)
    words = content["bytes_per_word"]
    for row, line in zip(found, lines, strict=True):
        line += [
            f"{math.exp(row['loss']):.3f}",
            f"{math.exp(row['loss'] * words):,.0f}",
            number(row["step_ratio"], ".2f"),
        ]
    header += ["ppl, byte", "ppl, word", "step ratio"]
    table = [
        [name, str(step), *(f"{ratio:.2f}" for ratio in ratios)]
        for name, points in dominance(content).items()
        for step, *ratios in (points[0], points[len(points) // 2], points[-1])
    ]
    scale = settings["scale"]
    return GPT2.format(
        parameters=content["parameters"] / 1e6,
        width=scale["width"],
        layers=scale["layers"],
        batch=scale["batch"],
        context=scale["context"],
        steps=settings["steps"],
        table=markdown(header, lines),
        independent=math.sqrt(math.pi * scale["width"] / 2),
        dominance=markdown(["method", "step", "r_avg", "r_min", "r_max"], table),
        made=made_by(content),
    )


def dominance(content: Content) -> dict[str, list[tuple[int, float, float, float]]]:
    """Return by method (step, r_avg, r_min, r_max), over shapes of matrices and seeds."""
    result = {}
    for name, own in finals(content["runs"], content["settings"]["steps"]).items():
        points = []
        for seen in zip(*(run["watched"] for run in own.values()), strict=True):
            shapes = [ratios for one in seen for k, ratios in one.items() if k != "step"]
            average = sum(ratios["r_avg"] for ratios in shapes) / len(shapes)
            least = min(ratios["r_min"] for ratios in shapes)
            points.append(
                (seen[0]["step"], average, least, max(ratios["r_max"] for ratios in shapes))
            )
        result[name] = points
    return result


def shapes(content: Content) -> str:
    """Return the section on RMNP's time against Muon's."""
    published = {"LLaMA 60M": "12.9", "GPT-2 770M": "44.3", "GPT-2 1.5B": "42.9"}
    lines = []
    for name, matrices in content["settings"]["models"].items():
        times = [(content["runs"].get(f"{m}x{n}"), count) for m, n, count in matrices]
        if not all(run for run, _ in times):
            continue
        rmnp, muon = (sum(run[rule] * k for run, k in times) for rule in ("rmnp", "muon"))
        lines.append(
            [name, f"{rmnp:.0f}", f"{muon:,.0f}", f"{muon / rmnp:.0f}", published.get(name, "")]
        )
    header = ["model", "RMNP ms", "Muon ms", "Muon / RMNP", "paper's"]
    return SHAPES.format(
        threads=content["settings"]["threads"],
        table=markdown(header, lines),
        made=made_by(content),
    )
