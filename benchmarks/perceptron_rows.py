"""What the runs of ``neurms bench perceptrons`` say: a cell for each budget, the front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.perceptrons import step_ms
from benchmarks.significance import band, compared, spread
from benchmarks.vision import METHODS

__all__ = ["Cell", "best_of", "cells", "duel", "front"]


@dataclass(frozen=True)
class Cell:
    """One method in one budget.

    Args:
        place: (data, net, seconds).
        method: Its name.
        lr: The learning rate of its seeds.
        steps: Of each run.
        ms: Of a step.
        scores: Test accuracy by seed.
        validation: Best accuracy of its search.
        state_bytes: Of the optimizer.
        trials: Learning rates that its search tried.
    """

    place: tuple[str, str, float]
    method: str
    lr: float
    steps: int
    ms: float
    scores: tuple[float, ...]
    validation: float
    state_bytes: int
    trials: int

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return spread(self.scores)[0]

    @property
    def std(self) -> float:
        """Its standard deviation over seeds."""
        return spread(self.scores)[1]

    @property
    def band(self) -> tuple[float, float]:
        """Its 95 % bootstrap band."""
        return band(self.scores)

    @property
    def ours(self) -> bool:
        """Whether it is a NeuRMS."""
        return METHODS[self.method].ours


def cells(runs: Mapping[str, Any], times: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Return the cells of finished runs.

    Args:
        runs: By keys "data/net/S s/method/search/lr X" and "data/net/S s/method/steps N/lr X/seed
            K".
        times: The runs of ``step_times``.

    Returns:
        One for each place and method with all of its seeds, as many as any method of its place has.
        A method that was run for several numbers of steps, as its step time was measured anew,
        counts with the one that is nearest to the budget by the times given.
    """
    groups: dict[tuple[Any, ...], dict[tuple[int, float], list[float]]] = {}
    state: dict[tuple[Any, ...], int] = {}
    searched: dict[tuple[Any, ...], dict[float, float]] = {}
    for key, run in runs.items():
        data, net, budget, method, *rest = key.split("/")
        where = ((data, net, float(budget.split()[0])), method)
        if rest[0] == "search":
            searched.setdefault(where, {})[float(rest[1].split()[1])] = run["accuracy"]
            continue
        ident = (int(rest[0].split()[1]), float(rest[1].split()[1]))
        groups.setdefault(where, {}).setdefault(ident, []).append(run["accuracy"])
        state[where] = run["state_bytes"]
    seeds: dict[Any, int] = {}
    for (place, _), variants in groups.items():
        seeds[place] = max(seeds.get(place, 0), *map(len, variants.values()))
    found = []
    for (place, method), variants in groups.items():
        ms = step_ms(place[1], times)[method]
        whole = {ident: scores for ident, scores in variants.items() if len(scores) == seeds[place]}
        if not whole:
            continue
        search = searched[place, method]
        # Of equally near ones the rate that the search liked best, should it have gone on since.
        steps, lr = min(
            whole, key=lambda ident: (abs(ident[0] * ms - 1e3 * place[2]), -search[ident[1]])
        )
        scores = tuple(whole[steps, lr])
        best = max(search.values())
        found.append(
            Cell(place, method, lr, steps, ms, scores, best, state[place, method], len(search))
        )
    return found


def front(found: Iterable[Cell]) -> list[Cell]:
    """Return the cells of one data set and net that no cell of the same or a lower budget beats."""
    every = list(found)
    return [
        cell
        for cell in every
        if not any(o.place[2] <= cell.place[2] and o.mean > cell.mean for o in every)
    ]


def best_of(found: Iterable[Cell]) -> Cell | None:
    """Return the NeuRMS of a place with the best validation accuracy, which no test image chose."""
    ours = [cell for cell in found if cell.ours]
    return max(ours, key=lambda cell: cell.validation, default=None)


def duel(cell: Cell, found: Iterable[Cell]) -> dict[str, dict[str, float]]:
    """Return the paired comparison of a cell with every method of its place that is not NeuRMS."""
    count = len(cell.scores)
    others = {
        o.method: o.scores
        for o in found
        if not o.ours and o.place == cell.place and len(o.scores) == count
    }
    return compared(cell.scores, others) if others else {}
