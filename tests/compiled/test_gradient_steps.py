"""Variant P's step in one call: against float64, and against the calls that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled.gradient_steps import gradient_steps_
from neurms.compiled.native import compiler

SHAPES = [(64, 65), (5, 3), (40, 128), (1, 1), (300, 70)]
BIASED = [True, False, True, True, False]
BETA, KAPPA, DAMPING = 0.9, 3.0, 0.5
SETTINGS = BETA, KAPPA, DAMPING

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")


def operands(momentum: float, dtype: torch.dtype = torch.float32) -> list[list[Any]]:
    """Return the columns of a call: of matrices with and without a bias, one with a frozen one."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, there: bool = True, positive: bool = False) -> Tensor | None:
        x = torch.randn(shape, generator=generator)
        return (x.abs() if positive else x).to(dtype) if there else None

    sizes = list(zip(SHAPES, BIASED, strict=True))
    averaged = bool(momentum)
    columns: list[list[Any]] = [
        [made(*shape) for shape in SHAPES],
        [made(*shape) for shape in SHAPES],
        [made(*shape, there=averaged) for shape in SHAPES],
        [made(m, there=biased) for (m, _), biased in sizes],
        [made(m, there=biased) for (m, _), biased in sizes],
        [made(m, there=biased and averaged) for (m, _), biased in sizes],
        [made(m, positive=True) for m, _ in SHAPES],
        # The last bias has no gradient, and is a column of zeros.
        [made(n + (biased or n == 70), positive=True) for (_, n), biased in sizes],
        *([0.1, 0.19, 0.5, 1.0, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
        *([1.0, 0.9, 0.8, 0.0, 0.5], [0.5, 0.0, 0.4, 0.3, 0.0], [1.0, 0.0, 0.9, 0.0, 0.0]),
    ]
    return columns


def joined(gradients: list[Any], bias_gradients: list[Any], columns: list[Any]) -> list[Tensor]:
    """Return [G | g] in float64, g of zeros where a bias has no gradient."""
    both = zip(gradients, bias_gradients, columns, strict=True)
    return [
        torch.cat([g, torch.zeros(len(g), 1) if x is None else x[:, None]], 1).double()[:, : len(s)]
        for g, x, s in both
    ]


def bounded(averages: Tensor, one_sided: bool) -> Tensor:
    inverse = averages.rsqrt()
    median = inverse.sort().values[(len(inverse) - 1) // 2]
    return inverse.clamp(0.0 if one_sided else median / KAPPA, median * KAPPA)


def truth(
    columns: list[list[Any]], momentum: float, nesterov: bool = False, of_averages: bool = False
) -> list[dict[str, Tensor]]:
    """Return what every matrix becomes, of [W | b] and [G | g] as one matrix each."""
    found = []
    for w, g, v, b, x, y, q, s, correction, rate, decay, bias_rate, bias_decay in zip(
        *columns, strict=True
    ):
        n = w.shape[1]
        (joint,) = joined([g], [x], [s])
        average = joint
        if momentum:
            (before,) = joined([v], [y], [s])
            average = moving = momentum * before + (1 - momentum) * joint
            if nesterov:
                moving = momentum * average + (1 - momentum) * joint
        else:
            moving = joint
        own = {"v": average[:, :n], "y": average[:, -1]} if momentum else {}
        if of_averages:
            joint = moving
        rows = BETA * q.double().square() + (1 - BETA) * joint.square().sum(1)
        across = BETA * s.double().square() + (1 - BETA) * joint.square().sum(0)
        scale = ((rows.sum() + across.sum()) / 2 * correction).sqrt()
        left, right = scale * bounded(rows, of_averages), bounded_alive(across, of_averages)
        own |= {"q": rows.sqrt(), "s": across.sqrt()}
        own["w"] = decay * w.double() - rate * left[:, None] * moving[:, :n] * right[:n]
        if b is None:
            own.pop("y", None)
        else:
            own["b"] = bias_decay * b.double() - bias_rate * left * moving[:, n] * right[n]
        found.append(own)
    return found


def bounded_alive(averages: Tensor, one_sided: bool) -> Tensor:
    alive = averages > 0
    factors = torch.zeros_like(averages)
    damped = (averages + DAMPING * averages.mean()) / (1 + DAMPING)
    factors[alive] = bounded(damped[alive], one_sided)
    return factors


HOW = [(0.0, False, False), (0.6, False, False), (0.6, True, False), (0.6, False, True)]
HOW += [(0.6, True, True)]


@needs_compiler
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", ["eager", "prompt", "natively"])
def test_the_step_is_the_formula(form: str, how: tuple[float, bool, bool]) -> None:
    columns = operands(how[0])
    expected = truth(columns, *how)
    before = [w._version for w in columns[0]]
    if form == "natively":
        assert gradient_steps_.natively(*columns, *SETTINGS, *how)
    else:
        assert gradient_steps_.on(form)(*columns, *SETTINGS, *how)
    for k, own in enumerate(expected):
        for name, column in zip("wvbyqs", (0, 2, 3, 5, 6, 7), strict=True):
            if name in own:
                found = columns[column][k].double()
                torch.testing.assert_close(found, own[name], rtol=2e-5, atol=2e-6)
    assert all(w._version > old for w, old in zip(columns[0], before, strict=True))


@needs_compiler
@pytest.mark.parametrize("column", range(8))
def test_what_does_not_fit_is_not_served(column: int) -> None:
    """Nor is anything changed then: a caller has another way."""
    columns = operands(0.5)
    columns[column][2] = torch.ones(7, 7)
    before = copied(columns)
    assert not gradient_steps_.natively(*columns, *SETTINGS, 0.5)
    assert_unchanged(columns, before)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -4e30])
@pytest.mark.parametrize(("column", "place"), [(1, (2, 37)), (1, (4, -1)), (4, (0, 5))])
@pytest.mark.parametrize("of_averages", [False, True])
@pytest.mark.parametrize("form", ["eager", "prompt", "natively"])
def test_a_bad_gradient_anywhere_changes_nothing(
    form: str, of_averages: bool, column: int, place: tuple[int, int], value: float
) -> None:
    columns = operands(0.6)
    matrix, entry = place
    columns[column][matrix].view(-1)[entry] = value
    before, versions = copied(columns), [w._version for w in columns[0]]
    step = gradient_steps_.natively if form == "natively" else gradient_steps_.on(form)
    assert not step(*columns, *SETTINGS, 0.6, of_averages, of_averages)
    assert_unchanged(columns, before)
    assert [w._version for w in columns[0]] == versions


def copied(columns: list[list[Any]]) -> list[list[Any]]:
    return [[x.clone() if isinstance(x, Tensor) else x for x in own] for own in columns]


def assert_unchanged(columns: list[list[Any]], before: list[list[Any]]) -> None:
    for own, old in zip(columns[:8], before, strict=False):
        pairs = zip(own, old, strict=True)
        assert all(
            a is b if a is None else torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
            for a, b in pairs
        )


@needs_compiler
def test_other_dtypes_and_strides_are_not_served() -> None:
    assert not gradient_steps_.natively(*operands(0.5, torch.float64), *SETTINGS, 0.5)
    columns = operands(0.5)
    columns[1][2] = torch.randn(128, 40).mT
    assert not gradient_steps_.natively(*columns, *SETTINGS, 0.5)
