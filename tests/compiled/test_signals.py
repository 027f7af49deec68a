"""A signal observed and scaled at once, and moments moved: every form against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.native import compiler
from neurms.compiled.reductions import column_square_sum
from neurms.compiled.signals import scaled_signal
from tests.core.unitwise.root_truth import inverse_root

native = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
SHAPES = [(128, 784), (512, 1024), (3, 40_000), (40_000, 3), (1, 70_000), (33, 1001), (5, 7)]
CORRECTION = torch.tensor(0.3, dtype=torch.float64)
SETTINGS = (0.9, CORRECTION, 1e-8, 1e-12, 0.5, 100.0)


def signal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale


def truth(x: Tensor, v: Tensor, per_row: bool) -> tuple[Tensor, ...]:
    wide, rows = x.double(), x.shape[0]
    squares = wide.square().sum(0)
    blended = 0.9 * v.double() + 0.1 * squares * (rows if per_row else 1 / rows)
    s = inverse_root(blended / 0.3, v_min=1e-12).clamp(0.5, 100)
    return squares, wide.sum(0), blended, s, wide * s


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], scale: float) -> None:
    squares, sums, blended, s, scaled = zip(found, expected, strict=True)
    # Squares below float32's normal range keep its absolute, not its relative, precision.
    for one, two in (squares, blended):
        torch.testing.assert_close(one.double(), two, rtol=1e-6, atol=1e-38)
    atol = 1e-6 * float(expected[0].sqrt().max())
    torch.testing.assert_close(sums[0].double(), sums[1], rtol=1e-6, atol=atol)
    torch.testing.assert_close(s[0].double(), s[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled[0].double(), scaled[1], rtol=1e-6, atol=1e-44)


class TestScaledSignal:
    @pytest.mark.parametrize("per_row", [True, False])
    def test_against_float64(self, backend: str, per_row: bool) -> None:
        x, v = signal((37, 9)), signal((9,)).square()
        found = scaled_signal.on(backend)(x, v, per_row, *SETTINGS)
        check(found, truth(x, v, per_row), 1.0)

    @native
    @pytest.mark.parametrize("form", ["auto", PROMPT])
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
    @pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-19, 1.0, 1e12])
    def test_native_at_all_scales(self, shape: tuple[int, int], scale: float, form: str) -> None:
        x, v = signal(shape, scale), (signal(shape[1:]) * scale).square()
        before = x.clone(), v.clone()
        check(scaled_signal.on(form)(x, v, False, *SETTINGS), truth(x, v, False), scale)
        assert torch.equal(x, before[0])
        assert torch.equal(v, before[1])

    @native
    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_threads_change_nothing(self, threads: int) -> None:
        x, v = signal((65, 1001)), signal((1001,)).square()
        expected = scaled_signal.on(PROMPT)(x, v, True, *SETTINGS)
        chosen = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = scaled_signal.on(PROMPT)(x, v, True, *SETTINGS)
        finally:
            torch.set_num_threads(chosen)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("form", ["eager", "auto", PROMPT])
    def test_corrections_may_be_numbers(self, form: str) -> None:
        x, v = signal((200, 300)), signal((300,)).square()
        expected = scaled_signal.on(form)(x, v, False, *SETTINGS)
        found = scaled_signal.on(form)(x, v, False, 0.9, 0.3, *SETTINGS[2:])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("form", ["auto", PROMPT])
    def test_strides_and_dtypes_go_to_the_eager_form(self, form: str) -> None:
        x, v = signal((300, 200)).T, signal((300,)).square()
        check(scaled_signal.on(form)(x, v, False, *SETTINGS), truth(x, v, False), 1.0)
        found = scaled_signal.on(form)(x.double(), v.double(), False, *SETTINGS)
        assert all(part.dtype == torch.float64 for part in found)

    @native
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    def test_bad_columns_stay_bad_and_alone(self, bad: float) -> None:
        x, v = signal((200, 300)), signal((300,)).square()
        x[3, 7] = bad
        for form in ("eager", PROMPT):
            squares, _, blended, s, _ = scaled_signal.on(form)(x, v, False, *SETTINGS)
            assert squares.isfinite().logical_not().nonzero().flatten().tolist() == [7]
            assert not blended[7].isfinite()
            assert s[7].isnan() if bad != bad else s[7] == 0.5


@native
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e16])
def test_native_column_sums(shape: tuple[int, int], scale: float) -> None:
    x = signal(shape, scale)
    found = column_square_sum.on(PROMPT)(x, None)
    torch.testing.assert_close(found.double(), x.double().square().sum(0), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("form", ["eager", "auto", PROMPT])
@pytest.mark.parametrize("shape", [(129, 300), (5, 7), (1, 40_000)], ids=str)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_bfloat16_signals_are_observed_in_float32(
    form: str, shape: tuple[int, int], scale: float
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * scale).bfloat16()
    v = torch.rand(shape[1]) * scale**2
    settings = (True, 0.9, torch.tensor(0.3, dtype=torch.float64), 1e-40, 1e-38, 0.0, 1e30, False)
    *found, empty = scaled_signal.on(form)(x, v, *settings)
    *truth, _ = scaled_signal.eager(x.double(), v.double(), *settings)
    assert not empty.numel()
    squares = column_square_sum.on(form)(x, None)
    for one, other in zip((*found, squares), (*truth, truth[0]), strict=True):
        assert one.dtype == torch.float32
        size = float(other.abs().amax())
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-6 * size)
