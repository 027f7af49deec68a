"""The share of reductions and scalings against the width, as a picture for the results page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PICTURE", "draw"]

PICTURE = Path(__file__).parents[1] / "docs" / "results" / "figures" / "overhead.svg"

_COLOURS = {32: "#56b4e9", 128: "#0072b2", 512: "#e69f00", 2048: "#d55e00"}


def draw(runs: Sequence[Mapping[str, Any]], laws: Mapping[str, Any], path: Path = PICTURE) -> None:
    """Draw one panel for each mode and number of threads.

    Args:
        runs: What was measured.
        laws: The fitted exponents by panel.
        path: The picture; its folder is made.
    """
    import matplotlib as mpl

    mpl.use("svg")
    # Text as text, and names that do not change from one drawing to the next.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "neurms", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(8.4, 8.8), sharex=True, sharey=True)
    for axis, panel in zip(axes.flat, laws, strict=False):
        mode, _, threads = panel.partition(", ")
        own = [r for r in runs if r["mode"] == mode and f"{r['threads']} threads" == threads]
        for batch, colour in _COLOURS.items():
            points = sorted((r["width"], 100 * r["share"]) for r in own if r["batch"] == batch)
            if points:
                axis.loglog(
                    *zip(*points, strict=True), "o-", ms=3, c=colour, label=f"batch {batch}"
                )
        widths = sorted({r["width"] for r in own})
        axis.loglog(widths, [3 * 1024 / w for w in widths], "--", c="#888888", label="3 % at 1024")
        axis.set_title(f"{mode}, {threads}")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("width")
    figure.supylabel("reduce + scale, % of the layer's step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
