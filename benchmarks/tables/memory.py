"""What a training step takes at its peak, by optimizer."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown

MEMORY = """## Memory

`neurms bench memory`: one training step of a ReLU network {sizes}, batch {batch}, {threads}
threads, gradients set to None, each optimizer in a fresh process. MiB; the resident set is counted
over what the process held before the model, with malloc giving every block of 64 KiB or more back
at once; what torch allocates is counted from its profiler's events.

{table}

`update="backward"` never has the gradients of the tapped weights, {tapped:.1f} MiB. Its peak is
{resident:.1f} (U) and {resident_f:.1f} MiB (F) below plain SGD's in the resident set and
{allocated:.1f} and {allocated_f:.1f} MiB as allocated: SGD's peak comes at the end of backward,
when the activations are gone, its own at the beginning, when they are all there. What forward
leaves alive, {forward:.1f} MiB, no way of updating can stay below. Gradients and state of AdamW
take {over_step:.2f} times what those of NeuRMS-F take, {over_backward:,.0f} times with
`update="backward"`. There RMNP's gradients enter its momentum: its peak is {rmnp_resident:.1f} MiB
below that with gradients in the resident set and {rmnp_allocated:.1f} MiB as allocated.
"""


def memory(content: dict[str, Any]) -> str:
    """Return the section on memory."""
    keys = ("gradient_bytes", "state_bytes", "resident_bytes", "allocated_bytes")
    lines = [
        [name, *(f"{run[key] / 2**20:.1f}" for key in keys)]
        for name, run in content["runs"].items()
    ]
    found, settings = content["comparison"], content["settings"]

    def below(variant: str, measure: str) -> float:
        bytes_: float = found[f"NeuRMS-{variant} backward, {measure}_bytes below sgd"]
        return bytes_ / 2**20

    def below_itself(measure: str) -> float:
        bytes_: float = found[f"rmnp backward, {measure}_bytes below rmnp"]
        return bytes_ / 2**20

    return MEMORY.format(
        sizes="-".join(map(str, settings["sizes"])),
        batch=settings["batch"],
        threads=settings["threads"],
        table=markdown(["", "gradients", "state", "peak resident", "peak allocated"], lines),
        tapped=found["tapped_gradient_bytes"] / 2**20,
        resident=below("U", "resident"),
        resident_f=below("F", "resident"),
        allocated=below("U", "allocated"),
        allocated_f=below("F", "allocated"),
        rmnp_resident=below_itself("resident"),
        rmnp_allocated=below_itself("allocated"),
        forward=content["runs"]["sgd"]["forward_bytes"] / 2**20,
        over_step=found["adamw over NeuRMS-F step"],
        over_backward=found["adamw over NeuRMS-F backward"],
    )
