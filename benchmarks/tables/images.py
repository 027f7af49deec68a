"""The page on images: perceptrons at equal wall-clock, ablations, CIFAR-10, the autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.perceptron_rows import Cell, best_of, cells, duel, front
from benchmarks.significance import compared, spread
from benchmarks.tables.ablations import ablations
from benchmarks.tables.autoencoder import autoencoder
from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

Content = dict[str, Any]

EPOCH = 60_000 // 128

HEAD = """# Results on images

Written by `python -m benchmarks.tables` from files under `benchmarks/results/`. Learning rates were
searched for each method by the same procedure, on training images held out for that: {trials}
trials{fewer}. Accuracies are on test images, which chose nothing. *p* is a paired t-test's, by
seed, after Holm's correction for the number of comparisons.

## Which optimizer, for a small network on a CPU?

{answers}

{table}

{caveat}
"""

CAVEAT = """\
A budget in seconds is a number of steps by each method's own step time, measured side by side on
one thread of the machine below; on another machine the ratios of those times are what to compare.
Where *p* is above .05 the seeds do not tell the two apart."""

PLACE = """### {data}, {net}, {seconds:g} s

{table}

{verdict}
"""

TIMES = """## What a step costs

Batch, forward, backward, update and schedule of a {net} network at batch 128, methods in
turns of twenty steps; the ratio is to fused AdamW, with quartiles over rounds. An epoch is {epoch}
steps.

{table}

Inference is the model's own: {inference}

{made}
"""

CIFAR = """## CIFAR-10 (JPEG)

The images come from JPEG copies: not comparable with published figures. All methods get the same
number of steps; {trials} trials for the rate on shorter runs. Mirrored at random, batch 128.

{table}

{made}
"""


def page(contents: dict[str, Content]) -> str:
    """Return the page; sections whose results are not there are left out.

    Args:
        contents: Results files by name.
    """
    times = contents["step_times"]
    found = cells(contents["perceptrons"]["runs"], times["runs"])
    sections = [_head(found), _front(found, contents["perceptrons"]), _times(times)]
    made = [section(contents[name]) for name, section in SECTIONS.items() if name in contents]
    return "\n".join([*sections, *filter(None, made)])


def _places(found: Sequence[Cell]) -> list[tuple[str, str, float]]:
    return sorted({cell.place for cell in found}, key=lambda p: (p[0] != "mnist", p[0], p[1], p[2]))


def _at(found: Sequence[Cell], place: tuple[str, str, float]) -> list[Cell]:
    own = [cell for cell in found if cell.place == place]
    return sorted(own, key=lambda cell: -cell.mean)


def _head(found: Sequence[Cell]) -> str:
    lines, wins, ties, losses = [], [], [], []
    for place in _places(found):
        own = _at(found, place)
        rivals = [cell for cell in own if not cell.ours]
        ours = best_of(own)
        if ours is None or not rivals:
            continue
        tests = duel(ours, own)
        rival = rivals[0]
        test = tests[rival.method]
        name = f"{place[0]} {place[2]:g} s"
        group = ties if test["p_holm"] > 0.05 else wins if test["difference"] > 0 else losses
        group.append(name)
        lines.append(
            [
                f"{place[0]}, {place[1]}, {place[2]:g} s",
                f"{ours.method} {ours.mean:.4f}",
                f"{rival.method} {rival.mean:.4f}",
                f"{100 * test['difference']:+.2f}",
                f"{test['p_holm']:.3f}",
                "yes" if ours in front(_same(found, place)) else "no",
            ]
        )
    header = ["setting", "best NeuRMS", "best of the others", "points", "p", "on the front"]
    parts = [
        (wins, "NeuRMS is ahead of every other method tried, significantly against the best"),
        (ties, "NeuRMS and the best of the others cannot be told apart"),
        (losses, "another method is significantly ahead of NeuRMS"),
    ]
    answers = "\n".join(f"- {text}: {', '.join(names)}." for names, text in parts if names)
    trials = [cell.trials for cell in found]
    fewer = f", only {min(trials)} where a row says so" if min(trials) < max(trials) else ""
    head = {"trials": max(trials), "fewer": fewer}
    return HEAD.format(**head, answers=answers, table=markdown(header, lines), caveat=CAVEAT)


def _same(found: Sequence[Cell], place: tuple[str, str, float]) -> list[Cell]:
    return [cell for cell in found if cell.place[:2] == place[:2]]


def _front(found: Sequence[Cell], content: Content) -> str:
    parts = ["## Accuracy at equal wall-clock\n", "![](figures/images-front.svg)\n"]
    for place in _places(found):
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
    return "\n".join([*parts, made_by(content), ""])


def _line(cell: Cell, test: dict[str, float] | None, on_front: Sequence[Cell]) -> list[str]:
    low, high = cell.band
    name = f"**{cell.method}**" if cell in on_front else cell.method
    return [
        name,
        f"{cell.lr:g}",
        str(cell.trials),
        str(cell.steps),
        f"{cell.mean:.4f}",
        f"{cell.std:.4f}",
        f"{low:.4f} .. {high:.4f}",
        f"{-100 * test['difference']:+.2f}" if test else "",
        f"{test['p_holm']:.3f}" if test else "",
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


def _times(content: Content) -> str:
    runs = content["runs"]
    sections = []
    for net in sorted({key.split(" ")[0] for key in runs if " threads " in key}):
        keys = sorted(key for key in runs if key.startswith(f"{net} batch"))
        names = list(dict.fromkeys(name for key in keys for name in runs[key]))
        lines = [
            [
                name,
                *(part for key in keys for part in _timed(runs[key].get(name))),
                f"{runs[keys[0]][name]['ms'] * EPOCH / 1e3:.2f}",
            ]
            for name in names
        ]
        header = ["method"]
        for key in keys:
            header += [f"ms, {key.split()[-1]} thread(s)", "ratio"]
        sections.append(
            TIMES.format(
                net=net,
                epoch=EPOCH,
                table=markdown([*header, "s an epoch"], lines),
                inference=_inference(runs.get(f"{net} inference")),
                made=made_by(content),
            )
        )
    return "\n".join(sections)


def _timed(row: dict[str, float] | None) -> list[str]:
    if row is None:
        return ["", ""]
    return [f"{row['ms']:.2f}", f"{row['ratio']:.2f} ({row['low']:.2f}..{row['high']:.2f})"]


def _inference(rows: dict[str, Any] | None) -> str:
    if rows is None:
        return "NeuRMS changes no layer, and `detach()` takes its taps off."
    plain, tapped, detached = (rows[name] for name in ("plain", "tapped", "detached"))
    return (
        f"{plain['ms']:.3f} ms for a batch of 128 as it was made, x{detached['ratio']:.2f} "
        f"({detached['low']:.2f}..{detached['high']:.2f}) after NeuRMS trained it and let go "
        f"(`detach()`), x{tapped['ratio']:.2f} with the taps still on."
    )


def cifar(content: Content) -> str:
    """Return the section on CIFAR-10."""
    groups: dict[tuple[str, str], dict[str, tuple[str, list[float]]]] = {}
    for key, run in content["runs"].items():
        net, method, length, lr, *seed = key.split("/")
        if seed:
            lr = lr.removeprefix("lr ")
            place = groups.setdefault((net, length), {})
            place.setdefault(method, (lr, []))[1].append(run["accuracy"])
    lines = []
    for (net, length), methods in groups.items():
        base = methods.get("AdamW", ("", []))[1]
        others = {n: s for n, (_, s) in methods.items() if n != "AdamW" and len(s) == len(base) > 1}
        tests = compared(base, others) if others else {}
        for method, (lr, scores) in sorted(methods.items(), key=lambda x: -spread(x[1][1])[0]):
            mean, std = spread(scores)
            test = tests.get(method)
            lines.append(
                [
                    f"{net}, {length}: {method}",
                    lr,
                    f"{mean:.4f}",
                    f"{std:.4f}" if len(scores) > 1 else "",
                    str(len(scores)),
                    f"{-100 * test['difference']:+.2f}" if test else "",
                    f"{test['p_holm']:.3f}" if test else "",
                ]
            )
    if not lines:
        return ""
    header = ["network, run, method", "lr", "test", "std", "seeds", "- AdamW", "p"]
    trials = content["settings"]["trials"]
    return CIFAR.format(trials=trials, table=markdown(header, lines), made=made_by(content))


SECTIONS: dict[str, Callable[[Content], str]] = {
    "ablations": ablations,
    "ablations_fashion_mnist": ablations,
    "cifar": cifar,
    "autoencoder": autoencoder,
}
"""Results files that may be missing, and their sections."""
NAMES = ("perceptrons", "step_times", *SECTIONS)
"""The results files of the page."""
