"""Several layers in one native call are the same layers one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.native import compiler
from neurms.compiled.signals import moment_factors_
from neurms.compiled.together import all_within_each, moment_factors_each_, scaled_updates_each_
from neurms.compiled.update import scaled_momentum_update_, scaled_update_

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

SHAPES = ((300, 200), (7, 300), (1, 1), (65, 33))


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_moments_and_factors_are_the_kernels() -> None:
    moments = [torch.rand(m) for m, _ in SHAPES]
    squares = [torch.rand(m) * 7 for m, _ in SHAPES]
    weights, corrections = [0.5, 2.0, 3.0, 1 / 7], [1.0, 0.19, 0.3, 0.9]
    expected_moments = [v.clone() for v in moments]
    root = (1e-8, 1e-12, 0.1, 1.5)
    expected = [
        moment_factors_.on(PROMPT)(v, q, scalar(weight), 0.9, scalar(correction), *root)
        for v, q, weight, correction in zip(
            expected_moments, squares, weights, corrections, strict=True
        )
    ]
    versions = [v._version for v in moments]
    found = moment_factors_each_(moments, squares, weights, corrections, 0.9, *root)
    for one, other in zip([*found, *moments], [*expected, *expected_moments], strict=True):
        assert torch.equal(one, other)
    assert all(v._version > before for v, before in zip(moments, versions, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_updates_are_the_kernels(
    momentum: float, coupled: bool, factored: bool, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    weights, gradients, velocities = ([torch.randn(s) for s in SHAPES] for _ in range(3))
    left = [torch.rand(m) for m, _ in SHAPES]
    right = [torch.rand(n) if factored else None for _, n in SHAPES]
    expected = [w.clone() for w in weights]
    expected_velocities = [v.clone() for v in velocities]
    decays = [1.0, 0.5, 0.9, 1.0]
    for w, v, g, s, c, decay in zip(
        expected, expected_velocities, gradients, left, right, decays, strict=True
    ):
        rates = scalar(0.1), scalar(decay)
        if momentum:
            move = scaled_momentum_update_.on(PROMPT)
            move(w, v, g, s, c, rates[0], scalar(momentum), rates[1], coupled)
        else:
            scaled_update_.on(PROMPT)(w, g, s, c, *rates)
    versions = [w._version for w in weights]
    scaled_updates_each_(
        weights,
        gradients,
        velocities if momentum else None,
        left,
        right,
        decays,
        0.1,
        momentum,
        coupled,
    )
    torch.set_num_threads(before)
    for one, other in zip(weights, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(velocities, expected_velocities, strict=True):
        assert torch.equal(one, other)
    assert all(w._version > seen for w, seen in zip(weights, versions, strict=True))


def test_biases_are_columns_and_absent_factors_one() -> None:
    bias, gradient, s = torch.randn(300), torch.randn(300), torch.rand(300)
    truth = bias.double() - 0.1 * s.double() * gradient.double()
    plain = bias.double() - 0.1 * gradient.double()
    other = bias.clone()
    scaled_updates_each_(
        [bias, other], [gradient, gradient], None, [s, None], [None, None], [1.0, 1.0], 0.1
    )
    torch.testing.assert_close(bias.double(), truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other.double(), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -2.0])
@pytest.mark.parametrize("position", [0, 70_000, 99_999])
def test_each_has_its_own_bound(bad: float, position: int) -> None:
    tensors = [torch.full((3,), 5.0), torch.ones(100_000), torch.zeros(0)]
    assert all_within_each(tensors, [5.0, 1.0, 0.0])
    assert not all_within_each(tensors, [4.0, 1.0, 0.0])
    tensors[1][position] = bad
    assert not all_within_each(tensors, [5.0, 1.0, 0.0])
