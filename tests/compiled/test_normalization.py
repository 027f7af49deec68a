"""Row normalisation on every backend, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled.backends import use_backend
from neurms.compiled.normalization import row_normalize


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 4, 6)])
def test_rows_have_norm_one(patient_backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x[..., 1, :] = 0.0
    with use_backend(patient_backend):
        out = row_normalize(x, 1e-12)
    truth = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-12)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-7)
    assert out[..., 1, :].count_nonzero() == 0
