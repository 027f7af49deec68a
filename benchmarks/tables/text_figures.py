"""The figures of the page on text, as SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables.text_order import cell_losses
from benchmarks.tables.text_tasks import dominance

Content = dict[str, Any]


NAMES = ("scales", "gpt2")


def draw(folder: Path, contents: dict[str, Content]) -> None:
    """Write the figures whose results there are."""
    drawn: dict[str, Callable[[Any, Content], None]] = {"scales": _order, "gpt2": _dominance}
    for name, plot in drawn.items():
        if name in contents:
            _figure(folder, plot, contents[name])


def _figure(folder: Path, plot: Callable[[Any, Content], None], content: Content) -> None:
    import matplotlib as mpl

    # Without a salt and with a date, the same results would give another file each time.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "neurms", "font.size": 9}):
        mpl.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
        plot(axes, content)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"text-{plot.__name__.strip('_')}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _order(axes: Any, content: Content) -> None:
    """Plot every method's loss less AdamW's over the number of steps."""
    gaps: dict[str, list[tuple[int, float]]] = {}
    for name, cell in content["settings"]["cells"].items():
        losses, _ = cell_losses(content, name)
        if name.startswith("steps=") and len(losses) > 1:
            for method, loss in losses.items():
                gaps.setdefault(method, []).append((cell["steps"], loss - losses["adamw"]))
    for method, points in gaps.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
    axes.set(xscale="log", xlabel="steps", ylabel="loss less AdamW's, nats per byte")
    axes.legend(frameon=False)


def _dominance(axes: Any, content: Content) -> None:
    """Plot the average ratio, and its range as a band, over steps."""
    for method, points in dominance(content).items():
        steps, average, least, greatest = zip(*points, strict=True)
        (line,) = axes.plot(steps, average, marker="o", label=method)
        axes.fill_between(steps, least, greatest, alpha=0.1, color=line.get_color())
    axes.set(yscale="log", xlabel="step", ylabel="dominance: average, least .. greatest")
    axes.legend(frameon=False)
