"""A comparison read back from its results file, row by row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Row", "Settings", "rows"]

Settings = tuple[tuple[str, float], ...]
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One method of a comparison.

    Args:
        name: Of the row.
        about: Its rule, fixed settings and axes, as recorded.
        design: Of the comparison, as recorded.
        trials: By settings, then by tuning seed, the runs of the search.
        reported: By settings, then by seed, the runs that are reported.
    """

    name: str
    about: Mapping[str, Any]
    design: Mapping[str, Any]
    trials: Mapping[Settings, Mapping[int, Run]]
    reported: Mapping[Settings, Mapping[int, Run]]

    @property
    def complete(self) -> bool:
        """Whether all of its trials and seeds were run."""
        return len(self.trials) >= self.design["trials"] and len(self.scores) == len(
            self.design["seeds"]
        )

    @property
    def chosen(self) -> Settings:
        """The settings with the best figure on the tuning seeds."""
        return min(self.trials, key=self._loss)

    @property
    def chosen_figure(self) -> float:
        """That figure, on the split that chooses."""
        return self._sign * self._loss(self.chosen)

    @property
    def scores(self) -> tuple[float, ...]:
        """The reported figure by ascending seed, NaN where a run diverged."""
        runs = self.reported.get(self.chosen, {})
        figures = [runs[seed].get(self.design["reported_on"]) for seed in sorted(runs)]
        return tuple(math.nan if figure is None else float(figure) for figure in figures)

    @property
    def edges(self) -> tuple[str, ...]:
        """The settings whose chosen value is the outermost tried, with the direction.

        An end of the levels that nothing lies beyond, such as no momentum, is none.
        """
        found = []
        for name, value in self.chosen:
            tried = {dict(settings)[name] for settings in self.trials}
            axis = self.about["axes"][name]
            for end, word in ((min(tried), "low"), (max(tried), "high")):
                natural = axis != "rate" and value == 0.0
                if value == end and not natural:
                    found.append(f"{name} {word}")
        return tuple(found)

    @property
    def state_bytes(self) -> int | None:
        """Of the optimizer."""
        runs = list(self.reported.get(self.chosen, {}).values())
        return runs[0].get("state_bytes") if runs else None

    @property
    def steps(self) -> int | None:
        """That a reported run took."""
        runs = list(self.reported.get(self.chosen, {}).values())
        return runs[0].get("steps") if runs else None

    @property
    def _sign(self) -> float:
        return 1.0 if self.design["better"] == "lower" else -1.0

    def _loss(self, settings: Settings) -> float:
        runs = self.trials[settings].values()
        figures: list[Any] = [run.get(self.design["chosen_on"]) for run in runs]
        if None in figures:
            return math.inf
        return self._sign * statistics.fmean(figures)


def rows(content: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a results file in the order in which they were begun."""
    design, about = content["settings"]["design"], content["settings"]["rows"]
    found: dict[str, dict[str, dict[Settings, dict[int, Run]]]] = {}
    for run in content["runs"].values():
        kinds = found.setdefault(run["row"], {"trial": {}, "seed": {}})
        settings = tuple(run["settings"].items())
        kinds[run["kind"]].setdefault(settings, {})[run["seed"]] = run
    return [
        Row(name, about[name], design, kinds["trial"], kinds["seed"])
        for name, kinds in found.items()
        if kinds["trial"]
    ]
