"""What is fixed before a comparison runs: its splits, seeds, budget, precision and margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["EDITION", "NETWORK_SEEDS", "PERCEPTRON_SEEDS", "TUNING_SEEDS", "Design"]

EDITION = 2
"""Of the rules; results files from before there were any have no edition."""

TUNING_SEEDS = (0,)
"""Seeds that searches use and that no row reports."""

NETWORK_SEEDS = tuple(range(101, 106))
"""The seeds of every row on text and convolutional networks."""

PERCEPTRON_SEEDS = tuple(range(101, 111))
"""The seeds of every row on perceptrons."""


@dataclass(frozen=True)
class Design:
    """A comparison as it is fixed beforehand.

    Args:
        task: Its name.
        figure: What is compared, with its unit.
        better: Which direction is better.
        margin: Within which two rows count as level, in units of the figure.
        trials: Different settings that each row's search tries.
        seeds: What every row reports.
        details: What else all rows share: steps, batch, network, schedule.
        tuning_seeds: What searches use.
        chosen_on: The split that chooses settings.
        reported_on: The split that rows report.
        precision: Of weights, gradients and state, the same for all rows.
    """

    task: str
    figure: str
    better: Literal["lower", "higher"]
    margin: float
    trials: int
    seeds: tuple[int, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    chosen_on: str = "validation"
    reported_on: str = "test"
    precision: str = "float32"

    def recorded(self) -> dict[str, Any]:
        """Return the design as it goes into a results file."""
        return {"edition": EDITION, **asdict(self)}
