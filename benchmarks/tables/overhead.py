"""What NeuRMS's reductions and scalings cost, and whether the profiler tells it right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.overhead import MODES, MOMENTS
from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

OVERHEAD = """## Overhead

`neurms bench overhead`: the second of two equal linear layers under NeuRMS-F. Share of reduce and
scale in the layer's step, in percent, 2 threads, by width:

{shares}

At width 1024, on 1 and 2 threads, it is {step_low:.1f} to {step_high:.1f} percent with
`update="step"` and {back_low:.1f} to {back_high:.1f} percent with `update="backward"`, which scales
D and H in a pass of its own and saves that of the weight. `backward bf16` is that with
`gemm="bfloat16"`: {bf16_low:.1f} to {bf16_high:.1f} percent of a shorter step, for its factors
enter W with the product and count as update. Where the time goes, in microseconds,
`update="step"`, batch 512, 2 threads (DᵀH is a part of backward; bookkeeping is all that is no
kernel, the optimizer's own included):

{parts}

The law share ~ width^k, fitted to all widths with one constant for each batch; 95 percent
intervals:

{laws}

![Share of reduce and scale against the width](figures/overhead.svg)

GB/s of the kernels beside a plain copy, from memory and from the processor's caches; a sum reads,
a copy and a scaling read and write:

{bandwidth}

{made}

Counts of cache misses: {counters}. torch's vector unit is {unit}; of the {all} single-precision
additions and multiplications in the native kernels' machine code (not of those that run) {packed}
are packed.
"""

MOMENTS_TEXT = """## Overhead of variant P

`neurms bench overhead --variant P`: the same for NeuRMS-P, which reads the gradient once for its
sums. `backward` forms no gradient: its probes go through D and H.

{shares}

At width 1024, on 1 and 2 threads, {step_low:.1f} to {step_high:.1f} percent, from batch 512 on
at most {large:.1f}; without a gradient {back_low:.1f} to {back_high:.1f}.

{made}
"""

PROFILER = """## Does the profiler tell it right?

`neurms bench profiler_cost`: three layers, batch {rows}, {threads} thread. Reduce and scale as the
profiler reports them, over a plain clock around the same kernels, in the same steps and in steps
that it does not look at:

{times}

The reported overhead falls as width^{step:.2f} ({step_low:.2f} .. {step_high:.2f}) with
`update="step"` and as width^{back:.2f} ({back_low:.2f} .. {back_high:.2f}) with
`update="backward"`. Steps under a profiler that is attached but does not look take {away:.4f}
(width 64) and {away_256:.4f} times (256) what steps without one do, the comparison of none with
none gives {control:.4f} and {control_256:.4f}; what runs in them takes {hook:.2f} microseconds.
"""

_PARTS = {
    "forward": "forward_us",
    "backward": "backward_us",
    "DᵀH": "gemm_us",
    "reduce": "reduce_us",
    "scale": "scale_us",
    "update": "update_us",
}


def overhead(content: dict[str, Any]) -> str:
    """Return the section on overhead."""
    runs = [run for run in content["runs"].values() if "mode" in run]
    at = {
        mode: [100 * r["share"] for r in runs if r["width"] == 1024 and r["mode"] == mode]
        for mode in MODES
    }
    native = content["vectors"].get("native", {})
    return OVERHEAD.format(
        shares=_shares(runs),
        step_low=min(at["step"]),
        step_high=max(at["step"]),
        back_low=min(at["backward"]),
        back_high=max(at["backward"]),
        bf16_low=min(at["backward bf16"]),
        bf16_high=max(at["backward bf16"]),
        parts=_parts(runs),
        laws=_laws(content["laws"]),
        bandwidth=_bandwidth(content["runs"]),
        made=made_by(content),
        counters=content["counters"],
        unit=content["vectors"]["torch"],
        packed=sum(count for kind, count in native.items() if kind != "scalar"),
        all=sum(native.values()),
    )


def moments(content: dict[str, Any]) -> str:
    """Return what variant P's reductions and scalings cost."""
    runs = [run for run in content["runs"].values() if "mode" in run]
    at = {
        mode: [100 * r["share"] for r in runs if r["width"] == 1024 and r["mode"] == mode]
        for mode in MOMENTS
    }
    large = [
        100 * r["share"]
        for r in runs
        if (r["width"], r["mode"]) == (1024, "P step") and r["batch"] >= 512
    ]
    return MOMENTS_TEXT.format(
        shares=_shares(runs, MOMENTS),
        step_low=min(at["P step"]),
        step_high=max(at["P step"]),
        large=max(large),
        back_low=min(at["P backward"]),
        back_high=max(at["P backward"]),
        made=made_by(content),
    )


def _shares(runs: Sequence[Mapping[str, Any]], modes: Iterable[str] = MODES) -> str:
    widths = sorted({run["width"] for run in runs})
    lines = []
    for mode in modes:
        for batch in sorted({run["batch"] for run in runs}):
            own = {
                r["width"]: 100 * r["share"]
                for r in runs
                if (r["mode"], r["batch"], r["threads"]) == (mode, batch, 2)
            }
            cells = [f"{own[width]:.2f}" if width in own else "-" for width in widths]
            lines.append([f"{mode}, batch {batch}", *cells])
    return markdown(["", *map(str, widths)], lines)


def _parts(runs: Sequence[Mapping[str, Any]]) -> str:
    chosen = {"mode": "step", "batch": 512, "threads": 2}
    own = [r for r in runs if all(r[key] == value for key, value in chosen.items())]
    lines = [
        [
            str(run["width"]),
            *(f"{run[key]:,.0f}" for key in _PARTS.values()),
            f"{run['bookkeeping_us'] + run['optimizer_us']:,.0f}",
        ]
        for run in sorted(own, key=lambda r: int(r["width"]))
    ]
    return markdown(["width", *_PARTS, "bookkeeping"], lines)


def _laws(laws: Mapping[str, Any]) -> str:
    lines = []
    for name, entry in laws.items():
        cells = [_interval(entry[key]) for key in ("kernels", "kernels, arithmetic", "all")]
        lines.append([name, *cells])
    header = ["", "reduce + scale", "where they exceed thrice their least", "with bookkeeping"]
    return markdown(header, lines)


def _interval(law: Mapping[str, float] | None) -> str:
    return "-" if law is None else f"{law['k']:.2f} ({law['low']:.2f} .. {law['high']:.2f})"


def _bandwidth(runs: Mapping[str, Any]) -> str:
    found = {key.partition(" ")[2]: run for key, run in runs.items() if "mode" not in run}
    names = list(next(iter(found.values())))
    lines = [[key, *(f"{run[name]:.1f}" for name in names)] for key, run in found.items()]
    return markdown(["rows x columns", *names], lines)


def profiler(content: dict[str, Any]) -> str:
    """Return the section on the profiler's own accuracy."""
    runs = [run for run in content["runs"].values() if "update" in run]
    lines = [
        [
            f"{run['width']}, {run['update']}",
            f"{run['inside_us']:,.0f}",
            f"{run['inside_over_outside']:.2f}",
            f"{run['inside_over_between']:.2f}",
            f"{100 * run['overhead']:.2f}",
            f"{100 * run['overhead_with_bookkeeping']:.2f}",
        ]
        for run in runs
    ]
    header = ["width, update", "reported us", "over the clock's", "over those between"]
    header += ["overhead %", "with bookkeeping %"]
    step, back = (content["laws"][f"overhead, {mode}"] for mode in ("step", "backward"))
    return PROFILER.format(
        rows=content["settings"]["rows"],
        threads=content["settings"]["threads"],
        times=markdown(header, lines),
        step=step["k"],
        step_low=step["low"],
        step_high=step["high"],
        back=back["k"],
        back_low=back["low"],
        back_high=back["high"],
        away=content["runs"]["looking away 64"]["median_of_ratios"],
        away_256=content["runs"]["looking away 256"]["median_of_ratios"],
        control=content["runs"]["control 64"]["median_of_ratios"],
        control_256=content["runs"]["control 256"]["median_of_ratios"],
        hook=content["runs"]["looking away 64"]["hook_us"],
    )
