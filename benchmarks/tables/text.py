"""The page on text: language models, tags, and what was tried to understand them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.language import final
from benchmarks.language_rows import finals, paired_p, rows
from benchmarks.significance import holm
from benchmarks.tables.markdown import counted, markdown, p_said, p_value
from benchmarks.tables.provenance import made_by
from benchmarks.tables.text_sections import LEADS, LLAMA, SMALL

Content = dict[str, Any]

SURE = 0.05
VARIANTS = (
    ("neurms-relative", "neurms-u"),
    ("neurms-relative-momentum.8", "neurms-relative"),
    ("alice-0", "alice"),
    ("rmnp-momentum.8", "rmnp"),
)
"""Variants of the small LLaMA, each with what it is a variant of."""


def number(value: float | None, form: str) -> str:
    """Return a figure as text, a dash for none."""
    return "-" if value is None else format(value, form)


def compared(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the columns that all tables of losses share."""
    header = ["method", "lr", "seeds", "loss", "std", "minus AdamW", "p"]
    lines = [
        [
            row["optimizer"].partition(":")[2] or row["optimizer"],
            row["lr"],
            str(row["seeds"]),
            f"{row['loss']:.4f}",
            number(row["std"], ".4f"),
            ""
            if row["p"] is None and row["difference"] == 0
            else number(row["difference"], "+.4f"),
            p_value(row["p"]),
        ]
        for row in found
    ]
    return header, lines


def _of_llama(content: Content, timing: Content | None) -> tuple[list[dict[str, Any]], Content]:
    """Return the rows of the small LLaMA and what a step costs, by method."""
    cost: Content = timing["runs"].get("w128 l3 b16 c128", {}) if timing else {}
    step_ms = {name: row["ms"] for name, row in cost.items()}
    return rows(content["runs"], 600, step_ms=step_ms), cost


def llama(content: Content, timing: Content | None) -> str:
    """Return the section on the small LLaMA."""
    found, cost = _of_llama(content, timing)
    header, lines = compared(found)
    words = content.get("bytes_per_word", math.nan)
    for row, line in zip(found, lines, strict=True):
        line += [
            f"{math.exp(row['loss']):.3f}",
            f"{math.exp(row['loss'] * words):,.0f}",
            *_speed(row),
            *_memory(cost.get(row["optimizer"])),
        ]
    header += ["ppl, byte", "ppl, word", "step ratio", "throughput", "speed-up", "state MB"]
    settings = content["settings"]
    return LLAMA.format(
        steps=600,
        tune=200,
        batch=settings["batch"],
        context=settings["context"],
        bytes_per_word=words,
        table=markdown(header, lines),
        variants=_variants(content),
        made=made_by(content),
    )


def _variants(content: Content) -> str:
    """Return in words what each variant gains on its own method, p corrected for their number."""
    found = finals(content["runs"], 600)
    pairs = {}
    for variant, plain in VARIANTS:
        if variant in found and plain in found:
            shared = sorted(found[variant].keys() & found[plain].keys())
            runs = ((found[variant][seed], found[plain][seed]) for seed in shared)
            pairs[variant, plain] = [(final(ours), final(theirs)) for ours, theirs in runs]
    tested = {names: p for names, own in pairs.items() if (p := paired_p(own)) is not None}
    if not tested:
        return ""
    parts = []
    for (variant, plain), p in zip(tested, holm(list(tested.values())), strict=True):
        own = pairs[variant, plain]
        gap = sum(ours - theirs for ours, theirs in own) / len(own)
        parts.append(f"{variant} less {plain} {gap:+.3f} ({p_said(p)})")
    return f"Variants against what they vary, by seed: {', '.join(parts)}.\n\n"


def seeds(content: Content) -> str:
    """Return how many seeds the small LLaMA's methods have."""
    return counted(len(runs) for runs in finals(content["runs"], 600).values())


def answers(content: Content, timing: Content | None) -> str:
    """Return in words which methods are ahead of AdamW on the small LLaMA, and which are not."""
    found, cost = _of_llama(content, timing)
    ahead, unsure, behind = [], [], []
    for row in sorted(found, key=lambda row: -(row["speedup"] or row["step_ratio"] or 0.0)):
        if row["p"] is None:
            continue
        if row["p"] >= SURE:
            unsure.append(row["optimizer"])
        elif row["difference"] < 0:
            ahead.append(_gain(row, cost))
        else:
            behind.append(f"{row['optimizer']} ({row['difference']:+.3f})")
    lists = [
        ("Ahead of AdamW, the greatest gain in time first", ahead),
        ("Not to be told apart from it", unsure),
        ("Behind it, in nats per byte", behind),
    ]
    return "\n".join(f"- {title}: {', '.join(names)}." for title, names in lists if names)


def _gain(row: Mapping[str, Any], cost: Content) -> str:
    gains = [f"{row['step_ratio']:.2f} times fewer steps"] if row["step_ratio"] else []
    gains += [f"{row['speedup']:.2f} times less time"] if row["speedup"] else []
    if row["optimizer"] in cost:
        share = cost[row["optimizer"]]["state_bytes"] / cost["adamw"]["state_bytes"]
        gains.append(f"{share:.0%} of its state")
    return f"**{row['optimizer']}** ({', '.join(gains)})"


def short(content: Content, timing: Content | None) -> str:
    """Return the small LLaMA's table in few columns."""
    found, cost = _of_llama(content, timing)
    header, lines = compared(found)
    lines = [
        [line[0], *line[3:], *_speed(row), *_memory(cost.get(row["optimizer"]))]
        for row, line in zip(found, lines, strict=True)
    ]
    header = [header[0], *header[3:], "step ratio", "throughput", "speed-up", "state MB"]
    return markdown(header, lines)


def _speed(row: Mapping[str, Any]) -> list[str]:
    return [number(row[name], ".2f") for name in ("step_ratio", "throughput", "speedup")]


def _memory(cost: Mapping[str, Any] | None) -> list[str]:
    return ["-" if cost is None else f"{cost['state_bytes'] / 1e6:.2f}"]


def small(content: Content, scales: Content, timing: Content | None) -> str:
    """Return the section on all methods at the smaller scale.

    Args:
        content: Of ``leads.json``.
        scales: Of ``scales.json``, whose cell of as many steps has AdamW, Muon and RMNP.
        timing: Of ``llama_step.json``.
    """
    steps = content["settings"]["steps"]
    prefix = f"steps={steps} "
    runs = {
        key.removeprefix(prefix): run
        for key, run in scales["runs"].items()
        if key.startswith(prefix)
    }
    runs |= {
        key.replace(" methods:", " "): run
        for key, run in content["runs"].items()
        if " methods:" in key
    }
    cost = timing["runs"].get("w64 l2 b8 c64", {}) if timing else {}
    found = rows(runs, steps, step_ms={name: row["ms"] for name, row in cost.items()})
    header, lines = compared(found)
    for row, line in zip(found, lines, strict=True):
        line += [*_speed(row), *_memory(cost.get(row["optimizer"]))]
    header += ["step ratio", "throughput", "speed-up", "state MB"]
    differ = [name for name, row in cost.items() if row["state_bytes"] != row["predicted_bytes"]]
    return SMALL.format(
        steps=steps,
        exception=f" but {', '.join(differ)}" if differ else "",
        table=markdown(header, lines),
        made=made_by(content),
    )


def leads(content: Content, group: str, title: str, text: str, base: str) -> str | None:
    """Return the section on one group of variants, None if none of them has run.

    Args:
        content: Of ``leads.json``.
        group: Of variants.
        title: Of the section.
        text: What it begins with.
        base: The row that variants are set against, beside AdamW.
    """
    steps = content["settings"]["steps"]
    plain = {"neurms": "neurms-u"}.get(group, group)
    wanted = [f" {group}:", " methods:adamw ", f" methods:{plain} "]
    wanted += [" methods:alice-0 "] if group == "alice" else []
    runs = {k: run for k, run in content["runs"].items() if any(name in k for name in wanted)}
    if not any(f" {group}:" in key and key.startswith("final") for key in runs):
        return None
    found = rows(runs, steps, baseline="methods:adamw")
    header, lines = compared(found)
    return LEADS.format(
        title=title,
        text=f"{text}\n\n{changes(found, group, base)}",
        table=markdown(header, lines),
        made=made_by(content),
    )


def changes(found: Sequence[Mapping[str, Any]], group: str, base: str) -> str:
    """Return in words what every variant changes against one row, and who reaches AdamW."""
    losses = {row["optimizer"].removeprefix(f"{group}:"): row["loss"] for row in found}
    if base not in losses:
        return ""
    variants = [name for name in losses if name != base and not name.startswith("methods:")]
    moved = ", ".join(f"{name} {losses[name] - losses[base]:+.3f}" for name in variants)
    reached = [name for name in variants if losses[name] <= losses["methods:adamw"]]
    level = f"At AdamW's loss or below: {', '.join(reached)}" if reached else "None reaches AdamW's"
    return f"Loss less that of `{base.removeprefix('methods:')}`: {moved}. {level}."
