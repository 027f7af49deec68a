"""The sections on NeuRMS's settings, one at a time, and on rho."""

from __future__ import annotations

from typing import Any

from benchmarks.significance import compared, paired, spread
from benchmarks.tables.markdown import markdown, p_said, p_value
from benchmarks.tables.provenance import made_by

Content = dict[str, Any]

ABLATIONS = """## NeuRMS's settings, one at a time: {data}, {steps} steps

784-512-10, batch 128, {steps} steps for every row, {trials} trials each. The difference, in points,
is to variant U with momentum .9, the row "U".

{table}

{verdict}

{leads}

{made}
"""

LEADS = (
    ("F, c_max 1", "F", "letting C only shrink features"),
    ("F, c_max 3", "F", "a tighter bound on C"),
    ("F, head to AdamW", "F", "the head to AdamW, under F"),
    ("head to AdamW", "U", "the head to AdamW, under U"),
    ("U, s_max 1e4", "U", "hardly any clipping of S"),
    ("clip relative, kappa 2", "U", "clipping relative to the layer's median"),
    ("U, beta .9", "U", "a shorter memory of v"),
    ("U", "bias correction off", "bias correction"),
    ("U", "no momentum", "momentum"),
    ("U", "AdamW", "NeuRMS-U in the place of AdamW, at equal steps"),
    ("head to AdamW", "AdamW", "NeuRMS-U in the hidden layer alone, at equal steps"),
    ("U", "RMNP", "NeuRMS-U in the place of RMNP, at equal steps"),
)
"""Two rows of the ablations, the changed and what it is compared with, and what that means."""

FIGURE = """
![rho over training](figures/images-rho.svg)
"""

RHO = """## Does the factorisation hold? {data}

rho, the correlation of G_ij^2 with v_i u_j over a layer's entries, read every {every} steps while
the 784-512-10 network trains; first, middle and last reading.

{table}
{figure}"""


def ablations(content: Content, *, rho: bool = True) -> str:
    """Return the sections on NeuRMS's settings and, if wanted, on rho."""
    groups: dict[str, tuple[float, list[float]]] = {}
    for key, run in content["runs"].items():
        name, *rest = key.split("/")
        if rest[0].startswith("lr "):
            groups.setdefault(name, (float(rest[0][3:]), []))[1].append(run["accuracy"])
    base = groups["U"][1] if "U" in groups else []
    others = {n: s for n, (_, s) in groups.items() if n != "U" and len(s) == len(base)}
    tests = compared(base, others)
    lines = []
    for name, (lr, scores) in groups.items():
        mean, std = spread(scores)
        test = tests.get(name)
        lines.append(
            [
                name,
                f"{lr:g}",
                f"{mean:.4f}",
                f"{std:.4f}",
                f"{-100 * test['difference']:+.2f}" if test else "",
                p_value(test["p_holm"]) if test else "",
            ]
        )
    sure = [name for name, test in tests.items() if test["p_holm"] <= 0.05]
    text = ABLATIONS.format(
        data=content["settings"].get("data", "mnist"),
        steps=content["settings"]["steps"],
        trials=content["settings"]["trials"],
        table=markdown(["change", "lr", "test", "std", "- U", "p"], lines),
        verdict=(
            f"After correction for {len(tests)} comparisons over {len(base)} seeds, only these "
            f"differ from U significantly: {', '.join(sure)}."
            if sure
            else f"After correction for {len(tests)} comparisons over {len(base)} seeds, none "
            "differs from U significantly."
        ),
        leads=_leads(groups),
        made=made_by(content),
    )
    return f"{text}\n{_rho(content)}" if rho and _rho(content) else text


def _leads(groups: dict[str, tuple[float, list[float]]]) -> str:
    """Return what each thing that might help changed, in points, with its paired p alone."""
    lines = []
    for changed, base, what in LEADS:
        pair = [groups.get(name, (0.0, []))[1] for name in (changed, base)]
        if len(pair[0]) == len(pair[1]) > 1:
            test = paired(*pair)
            lines.append(
                f"- {what} ({changed} against {base}): {100 * test['difference']:+.2f}, "
                f"{p_said(test['p'])} before correction."
            )
    return "\n".join(["What the papers leave open, in points:", "", *lines]) if lines else ""


def _rho(content: Content) -> str:
    lines, every = [], 0
    for key, run in content["runs"].items():
        if key.startswith("rho/"):
            every = run["every"]
            for layer, values in run["rho"].items():
                shown = [values[0], values[len(values) // 2], values[-1]]
                lines.append([f"{key.split('/')[1]}, layer {layer}", *(f"{v:.2f}" for v in shown)])
    if not lines:
        return ""
    data = content["settings"].get("data", "mnist")
    figure = FIGURE if data == "mnist" else ""
    return RHO.format(
        data=data,
        figure=figure,
        every=every,
        table=markdown(["run", "first", "middle", "last"], lines),
    )
