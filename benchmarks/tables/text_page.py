"""``docs/results/text.md``: the sections on text, in order, from whatever results there are."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.tables import text, text_order, text_tasks
from benchmarks.tables.provenance import made_by
from benchmarks.tables.text import Content
from benchmarks.tables.text_words import FINDINGS, HEAD, LEADS, SUMMARY

NAMES = ("llama", "llama_step", "leads", "scales", "gpt2", "shapes")


def page(contents: Mapping[str, Content]) -> str:
    """Return the page.

    Args:
        contents: Of the results files of :data:`NAMES` that exist, by name.
    """
    sections: list[str | None] = [HEAD]
    timing = contents.get("llama_step")
    if "llama" in contents:
        found = contents["llama"]
        sections.append(
            FINDINGS.format(answers=text.answers(found, timing), seeds=text.seeds(found))
        )
        sections.append(text.llama(contents["llama"], timing))
    if "leads" in contents and "scales" in contents:
        sections.append(text.small(contents["leads"], contents["scales"], timing))
    if "scales" in contents:
        sections.append(text_order.order(contents["scales"]))
    if "leads" in contents:
        sections += [text.leads(contents["leads"], *lead) for lead in LEADS]
    for name, section in (
        ("gpt2", text_tasks.gpt2),
        ("shapes", text_tasks.shapes),
    ):
        if name in contents:
            sections.append(section(contents[name]))
    return "\n".join(section for section in sections if section is not None)


def summary(contents: Mapping[str, Content]) -> str:
    """Return the section of the first results page: the small LLaMA in short, and more."""
    found = contents["llama"], contents.get("llama_step")
    return SUMMARY.format(table=text.short(*found), made=made_by(contents["llama"]))
