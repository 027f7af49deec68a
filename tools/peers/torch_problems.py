"""Problems of two unknowns that peers' suites minimise: rosenbrock, beale, ackley, sphere."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tools.peers.torch_subject import Subject, case

__all__ = ["PROBLEMS"]

STEPS = 300
RATES = (1e-1, 1e-2, 1.0, 1e-3, 10.0)
"""Of all kinds of rules; LARS moves a weight by a thousandth of lr times its length."""


def _rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _beale(x: Tensor, y: Tensor) -> Tensor:
    terms = ((1.5, 1), (2.25, 2), (2.625, 3))
    return torch.stack([(a - x + x * y**k) ** 2 for a, k in terms]).sum()


def _ackley(x: Tensor, y: Tensor) -> Tensor:
    radius = torch.sqrt((x**2 + y**2) / 2 + 1e-12)
    waves = (torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y)) / 2
    return 20 + math.e - 20 * torch.exp(-0.2 * radius) - torch.exp(waves)


def _sphere(x: Tensor, y: Tensor) -> Tensor:
    return x**2 + y**2


PROBLEMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float]]] = {
    "rosenbrock": (_rosenbrock, (-2.0, 2.0)),
    "beale": (_beale, (1.5, 1.5)),
    "ackley": (_ackley, (0.4, 0.3)),
    "sphere": (_sphere, (-1.0, 1.0)),
}
"""Name -> (function, start)."""


def _problem(name: str) -> None:
    function, start = PROBLEMS[name]

    def run(subject: Subject) -> None:
        goal = 0.3 * float(function(*torch.tensor(start)))
        least = [math.inf]
        for rate in RATES:
            least.append(_reached(subject, name, rate, goal))
            if least[-1] < goal:
                return
        raise AssertionError(f"{min(least)} where {goal} was asked for, in {STEPS} steps")

    run.__name__ = f"test_convergence_{name}"
    case(once=True)(run)


def _reached(subject: Subject, name: str, rate: float, goal: float) -> float:
    """Return the least value on the way, as peers do: step sizes of sign-like rules stay large."""
    function, start = PROBLEMS[name]
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(start)[:, None])
    # What a rule cannot move is AdamW's, at the same rate.
    optimizer = subject.optimizer(layer, lr=rate, fallback_lr=rate)
    (row,) = optimizer.plan()
    assert row.rule == subject.rule or row.reason.startswith("1 feature"), row.reason
    least = math.inf
    one = torch.ones(1, 1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = function(*layer(one)[0])
        least = min(least, float(value.detach()))
        if least < goal:
            break
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return least


for _name in PROBLEMS:
    _problem(_name)
