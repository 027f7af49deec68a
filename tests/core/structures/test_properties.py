"""What every rule promises whatever the gradient, searched for counterexamples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neurms.core.optimizers.registry import create
from tests.core.optimizers.training import GRADIENT_RULES

FEW = settings(deadline=None, max_examples=12, derandomize=True, database=None)
SMALL: dict[str, dict[str, Any]] = {
    "alice": {"rank": 2, "leading": 2},
    "apollo": {"rank": 2},
    "adapprox": {"rank": 2},
    "block_adam": {"block_size": 3},
    "fira": {"rank": 2},
    "galore": {"rank": 2},
    "low_rank_soap": {"rank": 2, "leading": 2},
    "shampoo": {"merge_dims": False},
    "shared_basis": {"rank": 2},
    "sketchy": {"rank": 2},
}
"""Ranks that cut something off a matrix of a few rows, and no random directions where avoidable."""

SCALE_FREE = ["alice", "lars", "muon", "nora", "racs", "rmnp", "swan"]
"""Rules without an eps that the gradient's size could be compared with."""

WITH_EPS = {
    *("adapprox", "apollo", "block_adam", "eigen_adam", "fira", "galore", "lamb"),
    *("low_rank_soap", "shampoo", "shared_basis", "sketchy", "soap"),
}
"""Rules that the unit of the gradient matters to, if only a little."""

DRAWS = {"apollo", "low_rank_soap"}
"""Rules whose random projection knows the order of units and features."""

EIGENBASES = {"eigen_adam", "soap"}
"""Rules that act by entries in an eigenbasis, which a singular statistic does not determine."""

MIXES_FEATURES = {"nora", "swan"}
"""Rules that add to a row a multiple of its weights, or of ones: zero columns do move."""

shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))
seeds = st.integers(0, 2**16)


def sample(shape: tuple[int, int], seed: int, steps: int = 3) -> Tensor:
    """Gradients in float64 whose spectra are well apart."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    return noise * torch.logspace(0.5, -0.5, shape[1], dtype=torch.float64)


def moved(name: str, steps: Tensor, **others: Any) -> Tensor:
    """Return how far a matrix of ones moves under a rule, after each step."""
    parameter = nn.Parameter(torch.ones_like(steps[0]))
    optimizer = create(name, [parameter], **{**SMALL.get(name, {}), **others})
    path = []
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
        path.append(parameter.detach() - 1.0)
    return torch.stack(path)


@pytest.mark.parametrize("name", GRADIENT_RULES)
@FEW
@given(shape=shapes, seed=seeds, exponent=st.integers(-12, 12), growth=st.integers(-6, 6))
def test_updates_are_finite_at_any_scale(
    name: str, shape: tuple[int, int], seed: int, exponent: int, growth: int
) -> None:
    steps = sample(shape, seed) * 10.0**exponent
    last = max(-12, min(12, exponent + growth))
    steps[1:] *= 10.0 ** (last - exponent)
    path = moved(name, steps.float())
    assert path.isfinite().all()


@pytest.mark.parametrize("name", GRADIENT_RULES)
@FEW
@given(shape=st.tuples(st.integers(2, 7), st.integers(2, 7)), seed=seeds, data=st.data())
def test_zero_rows_and_columns_hardly_move(
    name: str, shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    row, column = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    steps = sample(shape, seed)
    steps[:, row] = 0
    steps[:, :, column] = 0
    path = moved(name, steps)
    assert path.isfinite().all()
    # Rotations leave rounding errors there, never an update of the others' size.
    most = float(path.abs().max())
    assert float(path[:, row].abs().max()) <= 1e-5 * most
    if name not in MIXES_FEATURES:
        assert float(path[:, :, column].abs().max()) <= 1e-5 * most


@pytest.mark.parametrize("name", GRADIENT_RULES)
def test_zero_gradients_move_nothing(name: str) -> None:
    assert moved(name, torch.zeros(3, 4, 5)).count_nonzero() == 0


@pytest.mark.parametrize("name", GRADIENT_RULES)
@FEW
@given(shape=shapes, seed=seeds)
def test_the_same_twice(name: str, shape: tuple[int, int], seed: int) -> None:
    steps = sample(shape, seed).float()
    assert torch.equal(moved(name, steps), moved(name, steps))


def test_every_rule_is_free_of_scale_or_has_an_eps() -> None:
    assert sorted([*SCALE_FREE, *WITH_EPS]) == sorted(GRADIENT_RULES), "which set is yours in?"


@pytest.mark.parametrize("name", SCALE_FREE)
@FEW
@given(shape=shapes, seed=seeds, doublings=st.integers(-20, 20))
def test_the_unit_of_the_gradient_does_not_matter(
    name: str, shape: tuple[int, int], seed: int, doublings: int
) -> None:
    # These leave a single feature to AdamW, whose eps minds the unit.
    assume(name not in MIXES_FEATURES or shape[1] > 1)
    steps = sample(shape, seed)
    torch.testing.assert_close(
        moved(name, steps * 2.0**doublings), moved(name, steps), rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize("name", [name for name in GRADIENT_RULES if name not in DRAWS])
@FEW
@given(shape=shapes, seed=seeds, data=st.data())
def test_permuted_units_move_alike(
    name: str, shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    if name in EIGENBASES:
        shape = (shape[0], shape[0])
    order = data.draw(st.permutations(range(shape[0])))
    steps = sample(shape, seed)
    path, permuted = moved(name, steps), moved(name, steps[:, order])
    torch.testing.assert_close(permuted, path[:, order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "name", [name for name in GRADIENT_RULES if name not in DRAWS | {"block_adam"}]
)
@FEW
@given(shape=shapes, seed=seeds, data=st.data())
def test_permuted_features_move_alike(
    name: str, shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    if name in EIGENBASES:
        shape = (shape[1], shape[1])
    order = data.draw(st.permutations(range(shape[1])))
    steps = sample(shape, seed)
    path, permuted = moved(name, steps), moved(name, steps[:, :, order])
    torch.testing.assert_close(permuted, path[:, :, order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", GRADIENT_RULES)
@FEW
@given(shape=shapes, seed=seeds)
def test_layouts_that_store_the_same_matrix_agree(
    name: str, shape: tuple[int, int], seed: int
) -> None:
    m, n = shape
    linear = nn.Linear(n, m, bias=False, dtype=torch.float64)
    transposed = nn.ConvTranspose1d(n, m, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.T[..., None])
    rules = [
        create(name, layer, head="rule", **SMALL.get(name, {})) for layer in (linear, transposed)
    ]
    start = linear.weight.detach().clone()
    for gradient in sample(shape, seed):
        linear.weight.grad = gradient.clone()
        transposed.weight.grad = gradient.T[..., None].clone()
        for rule in rules:
            rule.step()
    if n > 1:  # of a row of one entry Nora and SWAN leave nothing
        assert not torch.equal(linear.weight, start)
    torch.testing.assert_close(transposed.weight[..., 0].T, linear.weight, rtol=1e-9, atol=1e-12)
