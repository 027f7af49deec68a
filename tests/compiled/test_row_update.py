"""RMNP's step of several matrices in one call; of one, see test_native.py."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled import use_backend
from neurms.compiled.native import compiler
from neurms.compiled.row_update import row_normalized_moves_, row_normalized_updates_

SETTINGS = [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 0.9, 0.8, 0.7, 0.6], 0.9


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_many_small_matrices_in_one_call(backend: str, nesterov: bool) -> None:
    shapes = [(64, 65), (5, 3), (128, 128), (1, 1), (300, 70)]
    generator = torch.Generator().manual_seed(0)
    columns = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    for column in columns:
        column[2] = column[2].mT
    wide = [[x.double() for x in column] for column in columns]
    if backend == "auto" and compiler():
        assert all(row_normalized_updates_._serve(*columns)), "natively, all in one call"
    with use_backend(backend):
        row_normalized_updates_(*columns, *SETTINGS, nesterov, 1e-12)
    for w, m, g, rate, decay in zip(*wide, *SETTINGS[:2], strict=True):
        m.mul_(0.9).add_(g, alpha=0.1)
        ahead = 0.1 * g + 0.9 * m if nesterov else m
        w.mul_(decay).sub_(rate * ahead / ahead.norm(dim=1, keepdim=True))
    for ones, others in zip(columns, wide, strict=True):
        for one, other in zip(ones, others, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


def test_no_matrices() -> None:
    row_normalized_updates_([], [], [], [], [], 0.9, True, 1e-12)
    row_normalized_moves_([], [], [], [], 1e-12)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_a_momentum_that_holds_the_gradient(backend: str, scale: float) -> None:
    """Rows of odd lengths, longer than a chunk, of zeros, and a matrix that is not plain."""
    shapes = [(64, 65), (5, 3), (128, 128), (1, 1), (300, 700)]
    generator = torch.Generator().manual_seed(0)
    weights, momenta = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    momenta = [m * scale for m in momenta]
    momenta[4][7] = 0
    weights[2] = weights[2].mT
    wide = [[x.double() for x in column] for column in (weights, momenta)]
    before = [m.clone() for m in momenta]
    if backend == "auto" and compiler():
        served = row_normalized_moves_._serve(weights, momenta)
        assert served == [True, True, False, True, True]
    versions = [w._version for w in weights]
    with use_backend(backend):
        row_normalized_moves_(weights, momenta, *SETTINGS[:2], 1e-35)
    for w, m, rate, decay in zip(*wide, *SETTINGS[:2], strict=True):
        lengths = m.norm(dim=1, keepdim=True)
        w.mul_(decay).sub_(rate * torch.where(lengths > 0, m / lengths, 0.0))
    assert all(torch.equal(one, other) for one, other in zip(momenta, before, strict=True))
    for one, other in zip(weights, wide[0], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)
    assert all(w._version > v for w, v in zip(weights, versions, strict=True))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_it_is_the_second_half_of_the_update(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    w, m, g = (torch.randn(200, 300, generator=generator) for _ in range(3))
    twin, ahead = w.clone(), m.lerp(g, 0.1)
    with use_backend(backend):
        row_normalized_updates_([w], [m], [g], [0.1], [0.9], 0.9, False, 1e-12)
        row_normalized_moves_([twin], [ahead], [0.1], [0.9], 1e-12)
    torch.testing.assert_close(w, twin, rtol=1e-5, atol=1e-6)
