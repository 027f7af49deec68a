"""RMNP's step of several matrices in one call; of one, see test_native.py."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled import use_backend
from neurms.compiled.native import compiler
from neurms.compiled.row_update import row_normalized_updates_

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
