"""Cosines of a basis before and after its renewal, against angles that are known."""

from __future__ import annotations

import math

import pytest
import torch

from neurms import Alice
from neurms.core.diagnostics.bases import basis_cosines, subspace_cosines
from neurms.testing import gradients


def test_a_known_turn_in_the_plane_of_two_directions() -> None:
    basis = torch.linalg.qr(gradients(7, 4, steps=1)[0])[0]
    angle = 0.3
    turned = basis.clone()
    turned[:, 1] = -(math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 3])
    expected = torch.tensor([1.0, math.cos(angle), 1.0], dtype=torch.float64)
    torch.testing.assert_close(basis_cosines(basis[:, :3], 5 * turned[:, :3]), expected)
    principal = subspace_cosines(basis[:, :3], turned[:, :3])
    torch.testing.assert_close(principal, expected.sort(descending=True).values)


def test_batches_and_zero_columns() -> None:
    basis = torch.linalg.qr(gradients(2, 6, 3, steps=1)[0])[0]
    assert basis_cosines(torch.zeros_like(basis), basis).count_nonzero() == 0
    torch.testing.assert_close(basis_cosines(basis, -basis), torch.ones(2, 3).double())
    torch.testing.assert_close(subspace_cosines(basis, basis.flip(-1)), torch.ones(2, 3).double())


def test_alice_keeps_its_leading_directions_and_switches_the_others() -> None:
    weight = torch.nn.Parameter(torch.zeros(40, 60, dtype=torch.float64))
    optimizer = Alice([weight], rank=8, leading=2, interval=3)
    scales = torch.logspace(0, -2, 40, dtype=torch.float64)[:, None]
    basis, found = None, []
    for gradient in gradients(40, 60, steps=12, seed=3) * scales.flip(0) ** 2:
        weight.grad = gradient
        optimizer.step()
        new = optimizer.state[weight]["basis"].clone()
        if basis is not None and not torch.equal(basis, new):
            found.append(basis_cosines(basis, new))
        basis = new
    cosines = torch.stack(found).mean(0)
    assert len(found) == 4
    assert cosines[0] > 0.9
    assert cosines[2:].max() < 0.7


def test_other_shapes_are_refused() -> None:
    for function in (basis_cosines, subspace_cosines):
        with pytest.raises(ValueError, match=r"new has shape \(3, 2\) and old \(3, 3\)"):
            function(torch.eye(3), torch.eye(3)[:, :2])
