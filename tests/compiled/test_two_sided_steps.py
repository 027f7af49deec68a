"""RACS's step in one call: against float64, and against the calls that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled.native import compiler
from neurms.compiled.two_sided_steps import TRACKED, two_sided_steps_

SHAPES = [(64, 65), (5, 3), (40, 128), (1, 1), (300, 70)]
STEPS = [1, 2, 3, 7, 2]
BETA, GAMMA = 0.9, 1.01
FITS = [5, 1, TRACKED, 0]

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")


def operands(dtype: torch.dtype = torch.float32) -> list[list[Any]]:
    """Return the columns of a call: weights, gradients, averages, norms, and numbers of each."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    columns: list[list[Any]] = [
        [made(*shape) for shape in SHAPES],
        [made(*shape) for shape in SHAPES],
        [made(m).square() for m, _ in SHAPES],
        [made(n).square() for _, n in SHAPES],
        [made().abs() + size for size in (0.0, 0.1, 1e3, 3.0, 1.0)],
        STEPS,
        *([1.0, 0.19, 0.3, 1.0, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 0.9, 0.8, 0.0, 0.5]),
    ]
    columns[1][4][3] = 0
    columns[2][4][3] = 0
    return columns


def fit(g: Tensor, s: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the fit of G.^2: means, one round from s over its mean, or rounds from ones."""
    squares = g.square()
    if not rounds:
        return squares.mean(1), squares.mean(0)
    if rounds == TRACKED:
        start = (s / s.mean()).clamp(min=1e-3)
        q = squares @ start / start.square().sum()
        return q, squares.T @ q / q.square().sum()
    q = torch.ones(len(g), dtype=g.dtype)
    for _ in range(rounds):
        new = squares.T @ q / q.square().sum()
        q = squares @ new / new.square().sum()
    return q, new


def truth(columns: list[list[Any]], rounds: int) -> list[dict[str, Tensor]]:
    found = []
    for w, g, q, s, phi, step, correction, rate, decay in zip(*columns, strict=True):
        w, g, q, s, phi = (x.double() for x in (w, g, q, s, phi))
        own_q, own_s = fit(g, s, rounds)
        q, s = (BETA * old + (1 - BETA) * new for old, new in ((q, own_q), (s, own_s)))
        scale = correction * (1.0 if rounds else s.mean().sqrt())
        scaled = scale * g / torch.outer(q, s).sqrt()
        scaled[q == 0] = 0
        norm = scaled.norm()
        eta = 1.0 if step == 1 or phi == 0 else GAMMA / max(float(norm / phi), GAMMA)
        found.append({"w": decay * w - rate * eta * scaled, "q": q, "s": s, "phi": eta * norm})
    return found


@needs_compiler
@pytest.mark.parametrize("rounds", FITS)
@pytest.mark.parametrize("form", ["eager", "auto", "natively"])
def test_the_step_is_the_formula(form: str, rounds: int) -> None:
    columns = operands()
    expected = truth(columns, rounds)
    before = [w._version for w in columns[0]]
    step = two_sided_steps_.natively if form == "natively" else two_sided_steps_.on(form)
    assert step(*columns, BETA, rounds, GAMMA)
    for k, own in enumerate(expected):
        for name, column in zip(("w", "q", "s", "phi"), (0, 2, 3, 4), strict=True):
            found = columns[column][k].double()
            torch.testing.assert_close(found, own[name], rtol=2e-5, atol=2e-6)
    assert all(w._version > old for w, old in zip(columns[0], before, strict=True))


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e19])
@pytest.mark.parametrize(("matrix", "entry"), [(0, 37), (1, 14), (3, 0), (4, -1)])
@pytest.mark.parametrize("rounds", FITS)
@pytest.mark.parametrize("form", ["eager", "natively"])
def test_a_bad_gradient_anywhere_changes_nothing(
    form: str, rounds: int, matrix: int, entry: int, value: float
) -> None:
    columns = operands()
    columns[1][matrix].view(-1)[entry] = value
    before, versions = copied(columns), [w._version for w in columns[0]]
    step = two_sided_steps_.natively if form == "natively" else two_sided_steps_.on(form)
    assert not step(*columns, BETA, rounds, GAMMA)
    assert_unchanged(columns, before)
    assert [w._version for w in columns[0]] == versions


@needs_compiler
@pytest.mark.parametrize("column", range(5))
def test_what_does_not_fit_is_not_served(column: int) -> None:
    """Nor is anything changed then: a caller has another way."""
    columns = operands()
    columns[column][2] = torch.ones(7, 7)
    before = copied(columns)
    assert not two_sided_steps_.natively(*columns, BETA, 5, GAMMA)
    assert_unchanged(columns, before)


@needs_compiler
def test_other_dtypes_and_strides_are_not_served() -> None:
    assert not two_sided_steps_.natively(*operands(torch.float64), BETA, 5, GAMMA)
    columns = operands()
    columns[1][2] = torch.randn(128, 40).mT
    assert not two_sided_steps_.natively(*columns, BETA, 5, GAMMA)


def copied(columns: list[list[Any]]) -> list[list[Any]]:
    return [[x.clone() if isinstance(x, Tensor) else x for x in own] for own in columns]


def assert_unchanged(columns: list[list[Any]], before: list[list[Any]]) -> None:
    for own, old in zip(columns[:5], before, strict=False):
        pairs = zip(own, old, strict=True)
        assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in pairs)
