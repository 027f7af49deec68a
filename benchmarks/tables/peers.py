"""Other libraries' optimizers beside ours."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown

PEERS = """## Other libraries' optimizers

`neurms bench kernels --peers`: the step on one 1024 x 1024 matrix, each library in turns with
torch's fused AdamW and with ours; the first step has every preparation and compilation in it.

{table}
"""


def peers(kernels: dict[str, Any]) -> str:
    """Return the section on other libraries; a peer that did not run is there with its reason."""
    lines = []
    for group, run in kernels["runs"].items():
        if not group.startswith("peers "):
            continue
        compiled = ", compiled" if group.endswith(" compiled") else ""
        for name, row in run.items():
            ours = "" if name.partition(" ")[2] else f" (in the turns of {group[6:]})"
            if "failed" in row:
                lines.append([name + compiled, row["failed"], "", ""])
                continue
            label = name + (compiled if name.startswith("heavyball") else "") + ours
            lines.append(
                [label, f"{row['ms']:.2f}", f"x{row['ratio']:.2f}", f"{row['first_s']:.2f}"]
            )
    return PEERS.format(table=markdown(["", "ms", "against fused AdamW", "first step, s"], lines))
