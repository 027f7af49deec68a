"""Kernels as operators in graphs of torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled._forms import has_cpp_compiler
from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.moments import moment_factors, move_moments
from neurms.compiled.reductions import column_square_sum
from neurms.compiled.row_update import row_normalized_update_
from neurms.compiled.signals import scaled_signal
from neurms.compiled.two_sided import (
    scaled_square_sum,
    two_sided_fit,
    two_sided_scales,
)
from neurms.compiled.update import apply_updates_

ONE = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def positive(*shape: int) -> Tensor:
    return normal(*shape).abs() + 0.1


CASES: list[tuple[Kernel[Any, Any], tuple[Any, ...]]] = [
    (column_square_sum, (normal(6, 5),)),
    (
        row_normalized_update_,
        (normal(6, 5), positive(6, 5), normal(6, 5), 0.9, True, ONE * 0.1, ONE * 0.9, 1e-12),
    ),
    (two_sided_fit, (normal(6, 5), 5)),
    (two_sided_scales, ([normal(6, 5)], [positive(6)], [positive(5)], [1.0], 5, 0.1)),
    (scaled_square_sum, (normal(6, 5), positive(6), positive(5))),
    (
        move_moments,
        (
            *([positive(6), positive(4)], [positive(6) + 1, positive(4)], [1.0, 0.5], [0.5, 1.0]),
            *(0.9, 1e-8, 1e-12, 0.0, 100.0, None),
        ),
    ),
    (moment_factors, ([positive(6), positive(4)], [0.5, 1.0], 1e-8, 1e-12, 0.0, 0.0, 2.0)),
    (scaled_signal, (normal(6, 5), positive(5), False, 0.9, ONE, 1e-8, 1e-12, 0.0, 100.0)),
]
IDS = [kernel.__name__ for kernel, _ in CASES]  # type: ignore[attr-defined]


def copied(arguments: Any) -> Any:
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(copied(x) for x in arguments)
    return arguments.clone() if isinstance(arguments, Tensor) else arguments


@pytest.mark.parametrize(("counted", "arguments"), CASES, ids=IDS)
def test_operator_says_the_truth_about_itself(
    counted: Kernel[Any, Any], arguments: tuple[Any, ...]
) -> None:
    made = getattr(torch.ops.neurms, counted.__name__).default  # type: ignore[attr-defined]
    torch.library.opcheck(made, copied(arguments))


@pytest.mark.parametrize(("counted", "arguments"), CASES, ids=IDS)
def test_graph_holds_the_operator_and_computes_the_same(
    counted: Kernel[Any, Any], arguments: tuple[Any, ...]
) -> None:
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda *args: counted(*args), backend=backend, fullgraph=True)
    ours, theirs = copied(arguments), copied(arguments)
    results = compiled(*ours), counted.eager(*theirs)
    assert f"neurms.{counted.__name__}.default" in targets  # type: ignore[attr-defined]
    torch.testing.assert_close(*results)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other)


def updates(measure: bool) -> tuple[Any, ...]:
    weights = [normal(6, 5), normal(6)]
    gradients, velocities = [positive(6, 5), positive(6)], [positive(6, 5), None]
    factors = [positive(6), positive(6)], [positive(5), None]
    rates = [0.1, 0.2], [0.9, 1.0], 0.9, 0.5, False, True
    return weights, gradients, velocities, *factors, *rates, measure


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_updates_are_one_operator(backend: str, measure: bool) -> None:
    """Their operator has a signature of its own: graphs hold no absent tensors to write into."""
    if backend == "inductor" and not has_cpp_compiler():
        pytest.skip("needs a C++ compiler")
    ours, theirs = updates(measure), updates(measure)
    compiled = torch.compile(lambda *args: apply_updates_(*args), backend=backend, fullgraph=True)
    results = compiled(*ours), apply_updates_.eager(*theirs)
    torch.testing.assert_close(*results)
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        for one, its in zip(mine, other, strict=True):
            assert one is None or torch.equal(one, its) or torch.allclose(one, its, rtol=1e-6)


def test_rates_that_are_tensors_are_traced() -> None:
    compiled = torch.compile(
        lambda w, g, rate: apply_updates_([w], [g], [None], [None], [None], [rate], [1.0]),
        backend="aot_eager",
        fullgraph=True,
    )
    w = torch.ones(3)
    compiled(w, torch.ones(3), torch.tensor(0.25))
    assert w.tolist() == [0.75] * 3


def test_operator_takes_the_native_form_of_a_large_matrix() -> None:
    w, momentum, gradient = normal(256, 256), positive(256, 256), normal(256, 256) + 1
    ours, theirs = (w.clone(), momentum.clone()), (w.double(), momentum.double())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(w: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        return row_normalized_update_(w, momentum, gradient, 0.9, True, ONE, ONE, 1e-12) + 1

    row_normalized_update_.eager(*theirs, gradient.double(), 0.9, True, ONE, ONE, 1e-12)
    result = step(*ours, gradient)
    torch.testing.assert_close(result.double(), theirs[0] + 1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-6, atol=1e-6)


def test_kernel_without_a_native_form_is_traced_through() -> None:
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    plain = kernel(column_square_sum.eager)
    compiled = torch.compile(lambda x: plain(x), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(normal(4, 3)), normal(4, 3).square().sum(0))
    assert not any("neurms" in target for target in targets)
