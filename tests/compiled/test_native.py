"""Native kernels against their eager definitions in float64, and the choice between them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled import use_backend
from neurms.compiled.finite import GREATEST, within
from neurms.compiled.native import LEAST_ELEMENTS, compiler, suits
from neurms.compiled.native.load import SHIPPED
from neurms.compiled.row_update import row_normalized_update_
from neurms.compiled.two_sided import (
    scaled_square_sum,
    two_sided_fit,
    two_sided_scales,
)
from neurms.compiled.update import apply_updates_

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

SHAPES = [(256, 256), (257, 300), (3, 40_000), (40_000, 3), (1, 70_000), (1023, 65)]
ONE = torch.tensor(1.0, dtype=torch.float64)


def matrix(shape: tuple[int, int], scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


def move(
    form: Callable[..., Any], w: Tensor, g: Tensor, left: Tensor, right: Tensor, decay: float
) -> None:
    form([w], [g], [None], [left], [right], [0.1], [decay])


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    found: tuple[int, int] = request.param
    assert suits(matrix(found)), "the native form must be what these tests run"
    return found


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_two_sided_fit(shape: tuple[int, int], scale: float) -> None:
    gradient = matrix(shape, scale)
    q, s = two_sided_fit(gradient, 5)
    truth_q, truth_s = two_sided_fit.eager(gradient.double(), 5)
    torch.testing.assert_close(q.double(), truth_q, rtol=3e-6, atol=0)
    torch.testing.assert_close(s.double(), truth_s, rtol=3e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_two_sided_fit_of_a_matrix_stored_by_columns(shape: tuple[int, int], scale: float) -> None:
    gradient = matrix(shape, scale).mT
    q, s = two_sided_fit(gradient, 5)
    truth_q, truth_s = two_sided_fit.eager(gradient.double(), 5)
    torch.testing.assert_close(q.double(), truth_q, rtol=3e-6, atol=0)
    torch.testing.assert_close(s.double(), truth_s, rtol=3e-6, atol=0)


def test_two_sided_fit_by_columns_of_zeros_and_zero_rows() -> None:
    gradient = matrix((300, 256))
    gradient[7] = 0
    gradient[:, 9] = 0
    q, s = two_sided_fit(gradient.mT, 5)
    assert s[7] == 0
    assert q[9] == 0
    assert q.isfinite().all()
    q, s = two_sided_fit(torch.zeros(300, 256).mT, 5)
    assert not q.any()
    assert not s.any()


def test_updates_of_a_weight_stored_by_columns(shape: tuple[int, int]) -> None:
    w, gradient = matrix(shape).mT, matrix(shape, seed=1).mT
    left, right = matrix((w.shape[0], 1), seed=2)[:, 0], matrix((w.shape[1], 1), seed=3)[:, 0]
    wide = [x.double() for x in (w, gradient, left, right)]
    total = scaled_square_sum(gradient, left, right)
    torch.testing.assert_close(
        total.double(), scaled_square_sum.eager(*wide[1:]), rtol=3e-6, atol=0
    )
    version = w._version
    move(apply_updates_, w, gradient, left, right, 0.9)
    move(apply_updates_.eager, *wide, 0.9)
    assert w._version > version
    torch.testing.assert_close(w.double(), wide[0], rtol=1e-5, atol=1e-5)


def test_two_sided_fit_of_zeros_and_zero_rows() -> None:
    gradient = matrix((300, 256))
    gradient[7] = 0
    gradient[:, 9] = 0
    q, s = two_sided_fit(gradient, 5)
    assert q[7] == 0
    assert s[9] == 0
    assert q.isfinite().all()
    q, s = two_sided_fit(torch.zeros(300, 256), 5)
    assert not q.any()
    assert not s.any()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e25])
def test_row_normalized_update(shape: tuple[int, int], nesterov: bool, scale: float) -> None:
    w, gradient = matrix(shape, seed=1), matrix(shape, scale)
    momentum = matrix(shape, scale, seed=2)
    wide = [w.double(), momentum.double(), gradient.double()]
    before = gradient.clone()
    step, decay = ONE * 0.02, ONE * 0.999
    row_normalized_update_(w, momentum, gradient, 0.95, nesterov, step, decay, 1e-35)
    row_normalized_update_.eager(*wide, 0.95, nesterov, step, decay, 1e-35)
    torch.testing.assert_close(w.double(), wide[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(momentum.double(), wide[1], rtol=1e-6, atol=1e-6 * scale)
    assert torch.equal(gradient, before)


def test_row_of_zeros_stays() -> None:
    w, gradient = torch.ones(300, 256), matrix((300, 256))
    gradient[5] = 0
    row_normalized_update_(w, torch.zeros(300, 256), gradient, 0.9, True, ONE, ONE, 1e-12)
    assert torch.equal(w[5], torch.ones(256))


def test_scaled_square_sum_and_update(shape: tuple[int, int]) -> None:
    gradient, w = matrix(shape), matrix(shape, seed=1)
    left = torch.rand(shape[0]) + 0.1
    right = torch.rand(shape[1]) + 0.1
    wide = [x.double() for x in (w, gradient, left, right)]
    total = scaled_square_sum(gradient, left, right)
    torch.testing.assert_close(
        total.double(), scaled_square_sum.eager(*wide[1:]), rtol=1e-6, atol=0
    )
    version = w._version
    move(apply_updates_, w, gradient, left, right, 0.9)
    move(apply_updates_.eager, *wide, 0.9)
    assert w._version > version
    torch.testing.assert_close(w.double(), wide[0], rtol=1e-6, atol=1e-6)


def test_choice_goes_by_shape_dtype_and_strides() -> None:
    large = torch.zeros(256, LEAST_ELEMENTS // 256)
    assert suits(large)
    assert not suits(large[:-1])
    assert not suits(large.double())
    assert not suits(large.t())
    assert not suits(large, large.bfloat16())


def test_eager_backend_leaves_native_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the native library was asked for")

    monkeypatch.setattr("neurms.compiled.finite.library", refuse)
    large = [torch.zeros(LEAST_ELEMENTS)], [GREATEST]
    with use_backend("eager"):
        assert within(*large)
    with pytest.raises(AssertionError, match="native library"):
        within(*large)


@pytest.mark.skipif(SHIPPED.is_dir(), reason="the package holds kernels: it needs no compiler")
def test_without_a_compiler_warns_once_and_serves_eager(tmp_path: Path) -> None:
    code = """
import warnings, torch
from neurms.compiled.two_sided import two_sided_fit
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    g = torch.ones(300, 300)
    two_sided_fit(g, 5); two_sided_fit(g, 5)
print([str(w.message) for w in seen if w.category is RuntimeWarning])
"""
    environment = {"PATH": str(tmp_path), "NEURMS_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert result.stdout.count("no C++ compiler was found") == 1
    assert result.stdout.count("native CPU kernels are not available") == 1


STRUCTURES = {
    "noise": lambda m, n: matrix((m, n)),
    "columns of many sizes": lambda m, n: matrix((m, n)) * torch.logspace(-6, 0, n),
    "rows and columns of many sizes": lambda m, n: (
        matrix((m, n)) * torch.logspace(-4, 0, n) * torch.logspace(-5, 0, m)[:, None]
    ),
    "low rank": lambda m, n: matrix((m, 3), seed=1) @ matrix((3, n), seed=2),
    "heavy tails": lambda m, n: matrix((m, n)) * matrix((m, n), seed=1).abs() ** 4,
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("fresh", [0.1, 1.0])
def test_two_sided_scales(structure: str, by_columns: bool, fresh: float) -> None:
    gradient = STRUCTURES[structure](257, 300)
    gradient = gradient.mT if by_columns else gradient
    q, s = torch.rand(gradient.shape[0]), torch.rand(gradient.shape[1])
    lists = [gradient], [q], [s], [0.7]
    assert all(two_sided_scales._serve(*lists)), "the native form must be what this tests"
    found = two_sided_scales(*lists, 5, fresh)
    truth = two_sided_scales.eager([gradient.double()], [q.double()], [s.double()], [0.7], 5, fresh)
    for (one,), (other,) in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=0)


def test_two_sided_scales_of_several_are_those_of_each() -> None:
    """By rows and by columns, small and large, which threads take in different ways."""
    shapes = [(40, 60), (257, 300), (33, 21), (300, 200)]
    gradients = [matrix(shape, seed=k) for k, shape in enumerate(shapes)]
    gradients[2:] = [gradient.mT for gradient in gradients[2:]]
    q, s = ([torch.rand(g.shape[side]) for g in gradients] for side in (0, 1))
    corrections = [1.0, 0.5, 0.7, 2.0]
    found = two_sided_scales(gradients, q, s, corrections, 5, 0.1)
    for k, one in enumerate(zip(*found, strict=True)):
        wide = [[own[k].double()] for own in (gradients, q, s)]
        truth = two_sided_scales.eager(*wide, [corrections[k]], 5, 0.1)
        for part, (other,) in zip(one, truth, strict=True):
            torch.testing.assert_close(part.double(), other, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("by_columns", [False, True])
def test_norm_shows_a_bad_element(bad: float, by_columns: bool) -> None:
    gradient = matrix((257, 300))
    gradient[100, 200] = bad
    gradient = gradient.mT if by_columns else gradient
    q, s = torch.zeros(gradient.shape[0]), torch.zeros(gradient.shape[1])
    *_, (norm,) = two_sided_scales([gradient], [q], [s], [1.0], 5, 0.1)
    assert not norm.isfinite()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_row_normalized_update_stored_by_columns(
    shape: tuple[int, int], nesterov: bool, scale: float
) -> None:
    w, gradient = matrix(shape, seed=1).mT, matrix(shape, scale).mT
    momentum = matrix(shape, scale, seed=2).mT
    wide = [w.double(), momentum.double(), gradient.double()]
    step, decay = ONE * 0.02, ONE * 0.999
    row_normalized_update_(w, momentum, gradient, 0.95, nesterov, step, decay, 1e-35)
    row_normalized_update_.eager(*wide, 0.95, nesterov, step, decay, 1e-35)
    torch.testing.assert_close(w.double(), wide[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(momentum.double(), wide[1], rtol=1e-6, atol=1e-6 * scale)


def test_what_is_written_natively_is_seen_by_autograd() -> None:
    w = matrix((256, 256))
    before = w._version
    row_normalized_update_(w, torch.zeros_like(w), matrix((256, 256)), 0.9, True, ONE, ONE, 1e-12)
    assert w._version > before


@pytest.mark.parametrize("backend", ["inductor", "torchscript"])
def test_gradients_are_checked_whatever_the_backend(backend: str) -> None:
    with use_backend(backend):
        assert within([torch.ones(3), torch.ones(LEAST_ELEMENTS)], [GREATEST] * 2)
        assert not within([torch.tensor([float("nan")])], [GREATEST])


def test_compiler_obeys_cxx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "my-cxx"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert compiler() == str(mine)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    assert compiler() is None
