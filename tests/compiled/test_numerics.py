"""Every kernel on every backend against its definition in float64, at every magnitude."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import neurms.compiled
from neurms.compiled._forms import has_cpp_compiler
from neurms.compiled.backends import PROMPT, Kernel

ROUNDING = 1e-6
TINY = 2.0**-126  # what is below the least normal number may be rounded to a denormal or to zero
ONE = torch.tensor(1.0, dtype=torch.float64)
LINEAR = (1e-42, 1e-38, 1e-30, 1.0, 1e30)
SQUARED = (1e-42, 1e-30, 1e-16, 1.0, 1e12)  # sums of squares within float32
FOURTH = (1e-30, 1e-8, 1.0, 1e6)  # squares of squares

Make = Callable[[Tensor], tuple[Any, ...]]


class Case(NamedTuple):
    """Arguments of one kernel made of a matrix, the magnitudes that it allows, its tolerance."""

    make: Make
    scales: tuple[float, ...] = LINEAR
    rounding: float = ROUNDING


def like(g: Tensor, seed: int, *shape: int) -> Tensor:
    """Return numbers in [.5, 1.5), of the matrix's shape unless another is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape or g.shape, generator=generator) + 0.5


def units(g: Tensor) -> Tensor:
    return like(g, 1, g.shape[0])


def features(g: Tensor) -> Tensor:
    return like(g, 2, g.shape[1])


def magnitude(g: Tensor) -> float:
    return float(g.abs().amax()) if g.numel() else 1.0


ROOT = (1e-8, 1e-12, 1e-3, 1e3)  # eps, v_min, low, high

CASES: dict[str, Case] = {
    "row_clip_": Case(lambda g: (g, like(g, 3) * 0.1, 0.5, 1e-3), SQUARED),
    "correlation_sums": Case(lambda g: (g, units(g), features(g)), FOURTH),
    "row_normalize": Case(lambda g: (g, 1e-35)),
    "newton_schulz": Case(lambda g: (g, 3, 3.4445, -4.7750, 2.0315), (1e-30, 1.0, 1e30), 2e-5),
    "whiten": Case(lambda g: (g, 3, 0.5), (1e-30, 1.0, 1e30), 2e-5),
    "column_square_sum": Case(lambda g: (g, None), SQUARED),
    "channel_square_sum": Case(lambda g: (g, 1, None), SQUARED),
    "row_normalized_update_": Case(
        lambda g: (like(g, 3), like(g, 4) * magnitude(g), g, 0.9, True, ONE * 0.1, ONE * 0.9, 1e-35)
    ),
    "row_normalized_updates_": Case(
        lambda g: (
            *([like(g, 3)], [like(g, 4) * magnitude(g)], [g]),
            *([0.1], [0.9], 0.9, False, 1e-35),
        )
    ),
    "row_normalized_moves_": Case(
        lambda g: ([like(g, 3)], [like(g, 4) * magnitude(g)], [0.1], [0.9], 1e-35)
    ),
    "square_sums": Case(lambda g: ([g, g[:5]],)),
    "probe_products": Case(
        lambda g: (g, like(g, 3, g.shape[0], 9), like(g, 4, 10, 5), like(g, 5, g.shape[1], 5)),
        # Sums of products of both signs.
        rounding=1e-5,
    ),
    "joint_square_sums": Case(
        lambda g: (
            [g, g[:5], g],
            [units(g) * magnitude(g), None, None],
            [g.shape[1] + 1, g.shape[1] + 1, g.shape[1]],
        )
    ),
    "average_square_sums": Case(
        lambda g: (
            [g, g[:5], g],
            [like(g, 3) * magnitude(g), like(g[:5], 4), like(g, 5) * magnitude(g)],
            [units(g) * magnitude(g), None, None],
            [like(g, 6, g.shape[0]) * magnitude(g), None, None],
            [g.shape[1] + 1, g.shape[1] + 1, g.shape[1]],
            *(0.36, 0.64),
        )
    ),
    "gradient_factors": Case(
        lambda g: (
            [units(g).double() * magnitude(g) ** 2],
            [features(g).double() * magnitude(g) ** 2],
            [like(g, 5, g.shape[0]) * magnitude(g)],
            [like(g, 6, g.shape[1]) * magnitude(g)],
            *([0.3], 0.9, 1.2, 0.5, True),
        ),
        (1e-30, 1.0, 1e30),
    ),
    "moment_factors": Case(
        lambda g: ([units(g) * magnitude(g), features(g)], [0.3, 1.0], *ROOT),
    ),
    "ema_": Case(lambda g: (units(g) * magnitude(g), like(g, 5, g.shape[0]) * magnitude(g), 0.9)),
    "move_moments": Case(
        lambda g: (
            [units(g), features(g)],
            [like(g, 5, g.shape[0]) * magnitude(g), like(g, 6, g.shape[1])],
            *([1 / 7, 2.0], [0.3, 1.0], 0.9, *ROOT),
        )
    ),
    "scaled_gemm_": Case(
        lambda g: (
            like(g, 3) * magnitude(g),
            like(g, 6, 33, g.shape[0]) * magnitude(g),
            like(g, 7, 33, g.shape[1]),
            units(g),
            features(g),
            *(ONE * 0.1, ONE * 0.9, None, None, False, True),
        )
    ),
    "scaled_signal": Case(lambda g: (g, features(g), True, 0.9, ONE * 0.3, *ROOT), SQUARED),
    "two_sided_fit": Case(lambda g: (g, 5), (1e-16, 1.0, 1e12), 3e-6),
    "two_sided_scales": Case(
        lambda g: ([g], [units(g)], [features(g) * magnitude(g) ** 2], [1.0], 5, 0.1),
        (1e-12, 1.0, 1e12),
        3e-6,
    ),
    "two_sided_once": Case(
        lambda g: ([g], [units(g) * magnitude(g) ** 2], [features(g)], [0.3], 0.9, True),
        (1e-12, 1.0, 1e12),
        3e-6,
    ),
    "scaled_square_sum": Case(lambda g: (g, units(g), features(g)), SQUARED),
    "apply_updates_": Case(
        lambda g: (
            [like(g, 3) * magnitude(g), like(g, 4, g.shape[0]) * magnitude(g), like(g, 5)],
            [g, g[:, :1].sum(1), g],
            [like(g, 4) * magnitude(g), None, None],
            [units(g), units(g), None],
            [features(g), None, None],
            *([0.1, 0.2, 0.3], [0.9, 1.0, 0.0], 0.8, 0.7, True, True, True),
        )
    ),
}
TRUTH_VALUES = ("within",)
# Held to float64 by a file of its own.
ELSEWHERE = ("move_square_sums", "gradient_steps_", "two_sided_steps_")


def found() -> dict[str, Kernel[..., Any]]:
    """Return every kernel of the package by name."""
    names = [module.name for module in pkgutil.iter_modules(neurms.compiled.__path__)]
    modules = [importlib.import_module(f"neurms.compiled.{name}") for name in names]
    named = [item for module in modules for item in vars(module).items()]
    kernels = [x for name, x in named if isinstance(x, Kernel) and not name.startswith("_")]
    return {kernel.__name__: kernel for kernel in kernels}  # type: ignore[attr-defined]


KERNELS = found()
CALLS = [(name, scale) for name, case in CASES.items() for scale in case.scales]


def test_no_kernel_is_left_out() -> None:
    assert set(KERNELS) == {*CASES, *TRUTH_VALUES, *ELSEWHERE}


@pytest.fixture(
    params=[
        "eager",
        "auto",
        PROMPT,
        "torchscript",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not has_cpp_compiler(), reason="needs a C++ compiler"),
            ],
        ),
    ]
)
def form(request: pytest.FixtureRequest) -> str:
    """Every way in which a kernel can run; ``PROMPT`` takes the native one at any size."""
    name: str = request.param
    return name


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wide(argument: Any) -> Any:
    """Return a copy in float64 of a tensor, or of those in a list."""
    if isinstance(argument, list):
        return [wide(item) for item in argument]
    return argument.double().clone() if isinstance(argument, Tensor) else argument


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def outcomes(result: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Return what a call has returned, and what it may have written into."""
    return [*tensors_in(result), *tensors_in(arguments)]


def check(name: str, form: str, gradient: Tensor) -> None:
    """Compare all results with float64's, to within rounding of the largest in each tensor."""
    kernel, case = KERNELS[name], CASES[name]
    arguments = case.make(gradient)
    exact = tuple(wide(argument) for argument in arguments)
    found = outcomes(kernel.on(form)(*arguments), arguments)
    truths = outcomes(kernel.eager(*exact), exact)
    for value, truth in zip(found, truths, strict=True):
        assert value.shape == truth.shape
        size = float(truth.abs().amax()) if truth.numel() else 0.0
        torch.testing.assert_close(
            value.double(), truth, rtol=case.rounding, atol=case.rounding * size + TINY
        )


def matrix(*shape: int, scale: float = 1.0) -> Tensor:
    """Return a matrix whose columns differ in size, so that its singular values do."""
    generator = torch.Generator().manual_seed(sum(shape))
    spread = torch.linspace(0.5, 2.0, shape[1]) if shape[1] else torch.ones(0)
    return torch.randn(shape, generator=generator) * spread * scale


@pytest.mark.parametrize(("name", "scale"), CALLS)
def test_magnitudes(form: str, name: str, scale: float) -> None:
    check(name, form, matrix(9, 7, scale=scale))


@pytest.mark.parametrize(("name", "scale"), CALLS)
def test_magnitudes_in_large_matrices(form: str, name: str, scale: float) -> None:
    check(name, form, matrix(210, 160, scale=scale))


@pytest.mark.parametrize(
    ("shape", "count"), [((1, 40_000), 1), ((40_000, 1), 1), ((201, 333), 1), ((201, 333), 2)]
)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("newton_schulz", "whiten")])
def test_threads_and_shapes(form: str, name: str, shape: tuple[int, int], count: int) -> None:
    if name.startswith("two_sided") and 40_000 in shape:
        pytest.skip("sums of 40,000 numbers by BLAS, which only the native form does without")
    with threads(count):
        check(name, form, matrix(*shape))


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("newton_schulz", "whiten")])
def test_one_element_and_none(form: str, name: str, shape: tuple[int, int]) -> None:
    if name == "scaled_signal" and not shape[0]:
        pytest.skip("a signal has at least one row")
    if name.startswith("two_sided") and 0 in shape:
        pytest.skip("a fit has no peak to find without entries")
    check(name, form, matrix(*shape))


@pytest.mark.parametrize("shape", [(9, 7), (210, 160)], ids=str)
@pytest.mark.parametrize("view", ["columns", "slice"])
@pytest.mark.parametrize("name", CASES)
def test_strides(form: str, name: str, view: str, shape: tuple[int, int]) -> None:
    m, n = shape
    stored = matrix(n, m).mT if view == "columns" else matrix(m, 2 * n)[:, ::2]
    assert not stored.is_contiguous()
    check(name, form, stored)


@pytest.mark.parametrize("value", [1e-42, 1.0, 1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (210, 160)], ids=str)
def test_truth_values(form: str, shape: tuple[int, int], value: float) -> None:
    x = torch.full(shape, -value)
    finite = value < float("inf")
    within = KERNELS["within"].on(form)
    bound = max(value, 1e-15) if finite else 3e38
    assert within([x], [bound]) is finite
    assert within([x * 1.1], [bound]) is (value == 1e-42)
    assert within([torch.zeros(3), x], [0.0, bound]) is finite
