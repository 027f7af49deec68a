"""The figures of the page on images, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.perceptron_rows import Cell, cells
from benchmarks.tables.autoencoder import finals

Content = dict[str, Any]


def draw(folder: Path, contents: dict[str, Content]) -> None:
    """Write the figures whose results there are."""
    import matplotlib as mpl

    # Without a salt and with a date, the same results would give another file each time.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "neurms", "font.size": 9}):
        mpl.use("Agg")
        from matplotlib import pyplot

        folder.mkdir(parents=True, exist_ok=True)
        if "perceptrons" in contents:
            times = contents["step_times"]["runs"]
            _front(pyplot, folder, cells(contents["perceptrons"]["runs"], times))
        if "ablations" in contents:
            _rho(pyplot, folder, contents["ablations"])
        if "autoencoder" in contents:
            _losses(pyplot, folder, contents["autoencoder"])


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _front(pyplot: Any, folder: Path, found: list[Cell]) -> None:
    """Plot accuracy, with bands, over the seconds of training: a row of panels for each data set.

    A column is a network; what was not run stays empty.
    """
    sets = sorted({cell.place[0] for cell in found}, reverse=True)
    nets = sorted({cell.place[1] for cell in found}, key=lambda net: (len(net), net))
    figure, axes = pyplot.subplots(
        len(sets),
        len(nets),
        figsize=(1.4 + 3.6 * len(nets), 3.6 * len(sets)),
        layout="constrained",
        squeeze=False,
    )
    names = sorted({cell.method for cell in found}, key=lambda name: (name.startswith("Neu"), name))
    colours = dict(zip(names, 2 * pyplot.get_cmap("tab20").colors, strict=False))
    for row, data in zip(axes, sets, strict=True):
        for panel, net in zip(row, nets, strict=True):
            _panel(panel, [c for c in found if c.place[:2] == (data, net)], colours)
            panel.set_title(f"{data} {net}", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=7, loc="outside right center")
    _save(pyplot, figure, folder / "images-front.svg")


def _panel(panel: Any, found: list[Cell], colours: dict[str, Any]) -> None:
    for name in [name for name in colours if any(cell.method == name for cell in found)]:
        own = sorted((c for c in found if c.method == name), key=lambda cell: cell.place[2])
        means = [cell.mean for cell in own]
        panel.errorbar(
            [cell.steps * cell.ms / 1e3 for cell in own],
            means,
            [
                [cell.mean - cell.band[0] for cell in own],
                [cell.band[1] - cell.mean for cell in own],
            ],
            label=name,
            color=colours[name],
            marker="o" if own[0].ours else ".",
            linestyle="-" if own[0].ours else ":",
        )
    panel.set(xscale="log", xlabel="s of training", ylabel="test accuracy")
    budgets = sorted({cell.place[2] for cell in found})
    panel.set_xticks(budgets, [f"{seconds:g}" for seconds in budgets])
    panel.minorticks_off()
    if found:
        best = max(cell.mean for cell in found)
        panel.set_ylim(best - (0.06 if found[0].place[0] == "mnist" else 0.1), best + 0.004)


def _rho(pyplot: Any, folder: Path, content: Content) -> None:
    """Plot each layer's rho over steps."""
    figure, axes = pyplot.subplots(figsize=(5.2, 3.0), layout="constrained")
    for key, run in content["runs"].items():
        if key.startswith("rho/"):
            for layer, values in run["rho"].items():
                steps = [run["every"] * (index + 1) for index in range(len(values))]
                axes.plot(steps, values, label=f"{key.split('/')[1]}, layer {layer}")
    axes.set(xlabel="step", ylabel="rho", ylim=(0, 1))
    axes.legend(frameon=False)
    _save(pyplot, figure, folder / "images-rho.svg")


def _losses(pyplot: Any, folder: Path, content: Content) -> None:
    """Plot the autoencoders' batch losses over steps, a panel for each length of the runs."""
    lengths = finals(content)
    size = (1.6 + 3.6 * len(lengths), 3.2)
    figure, axes = pyplot.subplots(
        1, len(lengths), figsize=size, layout="constrained", squeeze=False
    )
    for panel, (steps, methods) in zip(axes[0], lengths.items(), strict=True):
        for method, runs in methods.items():
            curve = runs[0]["curve"]
            panel.plot([10 * index for index in range(len(curve))], curve, label=method)
        panel.set(xlabel=f"step of {steps}", ylabel="cross entropy of an image", yscale="log")
        panel.legend(frameon=False)
    _save(pyplot, figure, folder / "autoencoder-loss.svg")
