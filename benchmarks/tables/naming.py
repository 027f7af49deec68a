"""A comparison's rows as a user would write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.evidence.ledger import Row

__all__ = ["called", "constructed", "label"]

LABELS = {
    "AdamW": "AdamW",
    "P": "NeuRMS P",
    "P momentum": "NeuRMS P, momentum",
    "P average": "NeuRMS P of the average",
    "P damped": "NeuRMS P of the average, damped",
    "P 4 probes": "NeuRMS P, 4 probes",
    "P backward": "NeuRMS P, in backward",
}

CLASSES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "adamw": ("torch.optim.AdamW", {}),
    "sgd": ("torch.optim.SGD", {}),
    "racs": ("neurms.RACS", {}),
    "rmnp": ("neurms.RMNP", {}),
    "muon": ("neurms.Muon", {}),
    "neurms": ("neurms.NeuRMS", {}),
    "neurms, normalized": ("neurms.NeuRMS", {"normalize": "rms"}),
    "moments": ("neurms.NeuRMS", {"variant": "P", "head": "fallback"}),
}
"""Rule of an entrant -> class, and the settings that the entrant fixes for it."""

WIDTH = 80

TORCHS = ("fused", "weight_decay")


def label(name: str) -> str:
    """Return the name of a row as legends have it."""
    return LABELS.get(name, name)


def called(row: Row) -> str:
    """Return the class of a row with the settings that set it apart, as code.

    Example: ``NeuRMS(variant="P", momentum=0.5)``.
    """
    if row.about["rule"] not in CLASSES:
        return label(row.name)
    name, _ = CLASSES[row.about["rule"]]
    settings = {k: v for k, v in _settings(row).items() if k != "head"}
    values = dict(row.chosen)
    if values.get("momentum"):
        settings["momentum"] = values["momentum"]
    short = name.rsplit(".", 1)[-1]
    return f"`{short}({_arguments(settings)})`" if settings else f"`{short}`"


def constructed(row: Row) -> str:
    """Return the line that makes a row's optimizer for ``model``, with its rates."""
    name, _ = CLASSES.get(row.about["rule"], ("neurms.create", {}))
    values = dict(row.chosen)
    settings = _settings(row)
    settings |= {k: values[k] for k in ("lr", "momentum", "fallback_lr") if values.get(k)}
    first = "model.parameters()" if name.startswith("torch.") else "model"
    inside = f"{first}, {_arguments(settings)}"
    line = f"optimizer = {name}({inside})"
    # Wider lines do not fit beside a page's margins.
    if len(line) <= WIDTH:
        return line
    # One argument a line, as the formatter that checks the pages has it.
    lines = "".join(f"    {argument},\n" for argument in inside.split(", "))
    return f"optimizer = {name}(\n{lines})"


def _settings(row: Row) -> dict[str, Any]:
    fixed = CLASSES.get(row.about["rule"], ("", {}))[1]
    own = {k: v for k, v in row.about["settings"].items() if k not in TORCHS}
    return {**fixed, **own}


def _arguments(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={_number(value)}"
        for name, value in settings.items()
    )


def _number(value: float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:g}"
