"""Lists of weights of many kinds: each item moves as its float64 twin does, in any company."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.finite import within
from neurms.compiled.moments import move_moments
from neurms.compiled.native import compiler
from neurms.compiled.update import apply_updates_

native = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
FORMS = ["eager", "auto", PROMPT]

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "fresh": {"momentum": 0.9, "fresh": 0.1},
    "coupled": {"momentum": 0.9, "scale_velocity": True},
    "raw": {"momentum": 0.9, "fresh": 0.1, "scale_gradient": False, "scale_velocity": True},
}


def stored(shape: tuple[int, ...], kind: str) -> Tensor:
    x = torch.randn(shape)
    if kind == "columns":
        return x.mT.contiguous().mT
    if kind == "slice":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return x.double() if kind == "double" else x.bfloat16() if kind == "bfloat16" else x


KINDS = [
    ((300, 200), "rows"),
    ((300,), "rows"),
    ((33, 65), "columns"),
    ((2000, 33), "columns"),
    ((5, 7), "slice"),
    ((4, 3), "double"),
    ((1, 1), "rows"),
    ((0, 3), "rows"),
    ((1, 6, 4, 9), "rows"),
    ((2, 3, 4, 5), "rows"),
    ((9,), "bfloat16"),
    ((3, 40_000), "rows"),
]


class Items:
    """Columns of arguments of ``apply_updates_``, and the same in float64."""

    def __init__(self, kinds: list[tuple[tuple[int, ...], str]], momentum: bool) -> None:
        torch.manual_seed(len(kinds))
        self.weights = [stored(*kind) for kind in kinds]
        self.gradients = [stored(*kind) for kind in kinds]
        # Some items have no velocity, some no factor on one side.
        self.velocities = [
            stored(*kind) if momentum and i % 3 != 2 else None for i, kind in enumerate(kinds)
        ]
        self.lefts = [
            None if i % 5 == 4 else torch.rand(units(w)) + 0.1 for i, w in enumerate(self.weights)
        ]
        self.rights = [
            None if w.ndim == 1 or i % 4 == 2 else torch.rand(features(w)) + 0.1
            for i, w in enumerate(self.weights)
        ]
        self.rates = [0.1 + 0.01 * i for i in range(len(kinds))]
        self.decays = [(1.0, 0.9, 0.0)[i % 3] for i in range(len(kinds))]

    def columns(self) -> tuple[Any, ...]:
        factors = self.lefts, self.rights, self.rates, self.decays
        return (self.weights, self.gradients, self.velocities, *factors)

    def truth(self, mode: dict[str, Any]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        return [moved(mode, *row) for row in zip(*self.columns(), strict=True)]


def units(w: Tensor) -> int:
    return w.shape[0] * w.shape[1] if w.ndim == 4 else w.shape[0]


def features(w: Tensor) -> int:
    return w.shape[0] * w.shape[2] if w.ndim == 4 else w.shape[-1]


def moved(
    mode: dict[str, Any],
    w: Tensor,
    g: Tensor,
    v: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    rate: float,
    decay: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return W, V and the sum of squares of the step as the formulas of the docstring give them."""
    full: list[Any] = [1.0, 1.0]
    if left is not None:
        shape = (*w.shape[:2], 1, 1) if w.ndim == 4 else (-1, *[1] * (w.ndim - 1))
        full[0] = left.double().reshape(shape) if left.numel() else 1.0
    if right is not None:
        blocks = (w.shape[0], 1, w.shape[2], 1) if w.ndim == 4 else (-1,)
        full[1] = right.double().reshape(blocks)
    scaled = full[0] * g.double() * full[1]
    if v is not None:
        entering = scaled if mode.get("scale_gradient", True) else g.double()
        v = mode["momentum"] * v.double() + mode.get("fresh", 1.0) * entering
        scaled = full[0] * v * full[1] if mode.get("scale_velocity") else v
    return decay * w.double() - rate * scaled, v, scaled.square().sum()


def assert_close(found: Tensor, truth: Tensor, rounding: float = 1e-6) -> None:
    if found.dtype == torch.bfloat16:
        rounding = 2**-7
    size = float(truth.abs().amax()) if truth.numel() else 0.0
    torch.testing.assert_close(found.double(), truth, rtol=rounding, atol=rounding * size)


@pytest.mark.parametrize("form", [*FORMS, "torchscript"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_mixed_lists(form: str, mode: str, measure: bool, threads: int) -> None:
    settings = MODES[mode]
    items = Items(KINDS, bool(settings))
    truth, gradients = items.truth(settings), [g.clone() for g in items.gradients]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    sums = apply_updates_.on(form)(*items.columns(), **settings, measure=measure)
    torch.set_num_threads(before)
    for w, v, (expected, velocity, _) in zip(items.weights, items.velocities, truth, strict=True):
        assert_close(w, expected)
        if v is not None:
            assert velocity is not None
            assert_close(v, velocity)
    assert all(torch.equal(a, b) for a, b in zip(items.gradients, gradients, strict=True))
    assert (sums is not None) is measure
    if sums is not None:
        assert sums.dtype == torch.float64
        expected = torch.stack([total for *_, total in truth])
        rounding = torch.tensor([1e-2 if k == "bfloat16" else 2e-6 for _, k in KINDS])
        assert bool(((sums - expected).abs() <= rounding * expected).all())


@native
def test_measuring_changes_no_bit() -> None:
    for mode in MODES.values():
        one, other = Items(KINDS[:4], bool(mode)), Items(KINDS[:4], bool(mode))
        apply_updates_.on(PROMPT)(*one.columns(), **mode)
        apply_updates_.on(PROMPT)(*other.columns(), **mode, measure=True)
        assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


@native
@pytest.mark.parametrize("mode", MODES)
def test_company_changes_no_bit(mode: str) -> None:
    settings = MODES[mode]
    together, alone = Items(KINDS, bool(settings)), Items(KINDS, bool(settings))
    apply_updates_.on(PROMPT)(*together.columns(), **settings)
    for row in zip(*alone.columns(), strict=True):
        apply_updates_.on(PROMPT)(*([x] for x in row), **settings)
    assert all(torch.equal(a, b) for a, b in zip(together.weights, alone.weights, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_counted(form: str) -> None:
    items = Items([kind for kind in KINDS if 0 not in kind[0]], True)
    written = [*items.weights, *[v for v in items.velocities if v is not None]]
    versions = [x._version for x in written]
    apply_updates_.on(form)(*items.columns(), momentum=0.9)
    assert all(x._version > seen for x, seen in zip(written, versions, strict=True))


@native
def test_a_graph_that_saved_the_weight_notices() -> None:
    w = torch.nn.Parameter(torch.randn(256, 256))
    loss = w.square().sum()
    with torch.no_grad():
        g, s = torch.ones(256, 256), torch.ones(256)
        apply_updates_([w], [g], [None], [s], [None], [0.1], [1.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS)
def test_empty_lists(form: str) -> None:
    empty: tuple[list[Any], ...] = tuple([] for _ in range(7))
    assert apply_updates_.on(form)(*empty) is None
    sums = apply_updates_.on(form)(*empty, measure=True)
    assert sums is not None
    assert sums.shape == (0,)


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_unequal_lengths_are_refused(form: str) -> None:
    w = torch.ones(2)
    with pytest.raises(ValueError, match="zip"):
        apply_updates_.on(form)([w], [w], [None], [None], [None, None], [1.0], [1.0])


@native
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_element(form: str) -> None:
    w, g = torch.zeros(200, 300), torch.ones(200, 300)
    g[3, 4] = float("nan")
    apply_updates_.on(form)([w], [g], [None], [torch.ones(200)], [None], [1.0], [1.0])
    assert w.isnan().nonzero().tolist() == [[3, 4]]


@pytest.mark.parametrize("form", FORMS)
def test_with_a_decay_of_0_a_weight_is_not_read(form: str) -> None:
    """So a gradient can become its own velocity: W is G."""
    for shape in ((200, 300), (4, 5)):
        g, v, s = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
        expected = 0.9 * v + s[:, None] * g
        apply_updates_.on(form)([g], [g], [v], [s], [None], [-1.0], [0.0], 0.9)
        torch.testing.assert_close(g, expected)
        assert torch.equal(g, v)
        w = torch.full(shape, torch.nan)
        apply_updates_.on(form)([w], [v], [None], [None], [None], [2.0], [0.0])
        torch.testing.assert_close(w, -2 * v)


def calls(run: Callable[[], object]) -> int:
    run()
    profile = cProfile.Profile()
    profile.runcall(run)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@native
@pytest.mark.parametrize("form", ["auto", PROMPT])
def test_ten_layers_take_hardly_more_calls_than_one(form: str) -> None:
    def arguments(count: int) -> tuple[Any, ...]:
        items = Items([((200, 300), "rows"), ((200,), "rows")] * count, False)
        items.velocities = [torch.zeros_like(w) for w in items.weights]
        return items.columns()

    def vectors(count: int) -> list[Tensor]:
        return [torch.rand(50_000) for _ in range(count)]

    root = 0.9, 1e-8, 1e-12, 0.0, 1.0, None

    def counts(count: int) -> list[int]:
        weights, v, x = arguments(count), vectors(count), [1.0] * count
        return [
            calls(lambda: apply_updates_.on(form)(*weights, 0.9)),
            calls(lambda: move_moments.on(form)(v, v, x, x, *root)),
            calls(lambda: within.on(form)(v, x)),
        ]

    with torch.no_grad():
        one, ten = counts(1), counts(10)
    assert one == ten
    assert max(one) <= 70
