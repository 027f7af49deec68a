"""The sections on perceptrons at equal wall-clock: the answer, then a table for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.perceptron_rows import Cell, best_of, duel, front
from benchmarks.significance import compared
from benchmarks.tables.duels import Outcome, float32, outcomes, places, words
from benchmarks.tables.markdown import markdown, p_value
from benchmarks.tables.provenance import made_by
from benchmarks.tables.reasons import reasons

__all__ = ["budgets", "head"]

Content = dict[str, Any]

HEAD = """# Results on images

Written by `python -m benchmarks.tables` from files under `benchmarks/results/`. Learning rates were
searched for each method by the same procedure, on training images held out for that: {trials}
trials{fewer}. Accuracies are on test images, which chose nothing. *p* is a paired t-test's, by
seed, after Holm's correction for the number of comparisons.

## Which optimizer, for a small network on a CPU?

All in float32:

{answers}

{table}

{bf16}{caveat}
"""

CAVEAT = """\
A budget in seconds is a number of steps by each method's own step time, measured side by side on
one thread of the machine below, and at least 10, even where a method has no time for them; on
another machine the ratios of those times are what to compare.
Where *p* is above .05 the seeds do not tell the two apart. The front holds what no other method
beats by mean test accuracy in the same time or less; best NeuRMS is the one that validation images
choose, best of the others the one with the highest test accuracy, which favours the others.
`NeuRMS-U-head` leaves the last layer to AdamW, as RMNP, RACS and Muon do; the other NeuRMS keep
it. Methods run: {counts}."""

BF16 = """\
With the product of errors and inputs of NeuRMS's backward pass, and nothing else, in bfloat16
(`gemm="bfloat16"`, methods that end in bf16; it needs a processor with AMX or AVX512-BF16), against
the same others, whose products are in float32. It says nothing of models whose own products are in
bfloat16, too: in small layers those make SGD's step shorter than NeuRMS's
([Speed](../results.md#speed), rows "all in bf16").

{answers}

{table}

"""

PLACE = """### {data}, {net}, {seconds:g} s

{table}

{verdict}
"""


def _at(found: Sequence[Cell], place: tuple[str, str, float]) -> list[Cell]:
    own = [cell for cell in found if cell.place == place]
    return sorted(own, key=lambda cell: -cell.mean)


def head(found: Sequence[Cell]) -> str:
    """Return the head of the page: who is ahead in which budget."""
    plain, every = outcomes(float32(found)), outcomes(found)
    trials = [cell.trials for cell in found]
    fewer = f", only {min(trials)} where a row says so" if min(trials) < max(trials) else ""
    narrow = BF16.format(answers=words(every), table=_duels(every))
    return HEAD.format(
        trials=max(trials),
        fewer=fewer,
        answers=words(plain),
        table=_duels(plain),
        bf16=narrow if len(float32(found)) < len(found) else "",
        caveat=CAVEAT.format(counts=_counts(found)),
    )


def _counts(found: Sequence[Cell]) -> str:
    nets = dict.fromkeys(net for _, net, _ in places(found))
    return ", ".join(f"{len({c.method for c in found if c.place[1] == n})} on {n}" for n in nets)


def _duels(every: Sequence[Outcome]) -> str:
    lines = [
        [
            o.name,
            f"{o.ours.method} {o.ours.mean:.4f}",
            f"{o.rival.method} {o.rival.mean:.4f}",
            f"{o.points:+.2f}",
            p_value(o.p),
            f"{o.ahead} / {o.others - o.ahead - o.behind} / {o.behind}",
            ", ".join(o.on_front) or "no",
        ]
        for o in every
    ]
    header = [
        "setting",
        "best NeuRMS",
        "best of the others",
        "points",
        "p",
        "others behind / level / ahead",
        "NeuRMS on the front",
    ]
    return markdown(header, lines)


def _same(found: Sequence[Cell], place: tuple[str, str, float]) -> list[Cell]:
    return [cell for cell in found if cell.place[:2] == place[:2]]


def budgets(found: Sequence[Cell], content: Content) -> str:
    """Return the tables of all budgets."""
    parts = ["## Accuracy at equal wall-clock\n", "![](figures/images-front.svg)\n"]
    for place in places(found):
        own = _at(found, place)
        against = next((cell for cell in own if cell.method == "AdamW"), None)
        on_front = front(_same(found, place))
        others = {c.method: c.scores for c in own if c.method != "AdamW"}
        tests = compared(against.scores, others) if against else {}
        lines = [_line(cell, tests.get(cell.method), on_front) for cell in own]
        header = [
            "method",
            "lr",
            "trials",
            "steps",
            "best validation",
            "test",
            "std",
            "95 % band",
            "- AdamW",
            "p",
            "state kB",
        ]
        parts.append(
            PLACE.format(
                data=place[0],
                net=place[1],
                seconds=place[2],
                table=markdown(header, lines),
                verdict=_verdict(own),
            )
        )
    return "\n".join([*parts, reasons(found), made_by(content), ""])


def _line(cell: Cell, test: dict[str, float] | None, on_front: Sequence[Cell]) -> list[str]:
    low, high = cell.band
    name = f"**{cell.method}**" if cell in on_front else cell.method
    return [
        name,
        f"{cell.lr:g}",
        str(cell.trials),
        str(cell.steps),
        f"{cell.validation:.4f}",
        f"{cell.mean:.4f}",
        f"{cell.std:.4f}",
        f"{low:.4f} .. {high:.4f}",
        f"{-100 * test['difference']:+.2f}" if test else "",
        p_value(test["p_holm"]) if test else "",
        f"{cell.state_bytes / 1e3:.0f}",
    ]


def _verdict(own: Sequence[Cell]) -> str:
    ours = best_of(own)
    if ours is None:
        return ""
    tests = duel(ours, own)
    sure = [n for n, t in tests.items() if t["p_holm"] <= 0.05 and t["difference"] > 0]
    behind = [n for n, t in tests.items() if t["p_holm"] <= 0.05 and t["difference"] < 0]
    open_ = [n for n in tests if n not in sure + behind]
    parts = [
        f"{verb} {', '.join(names)}"
        for verb, names in (
            ("significantly ahead of", sure),
            ("not told apart from", open_),
            ("significantly behind", behind),
        )
        if names
    ]
    return f"{ours.method}, the NeuRMS that validation images choose, is {'; '.join(parts)}."
