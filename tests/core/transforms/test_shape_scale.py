"""The factor of the shape, against torch.optim.Muon's."""

from __future__ import annotations

import pytest
import torch
from torch.optim._muon import _adjust_lr

from neurms.core.structures.base import Context
from neurms.core.transforms.shape_scale import ShapeScale
from neurms.testing import TransformContract


class TestShapeScale(TransformContract):
    transform = ShapeScale()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("name", ["original", "match_rms_adamw"])
def test_equals_torch(name: str, shape: tuple[int, int]) -> None:
    update = ShapeScale(name)(torch.ones(shape), {}, Context(1))  # type: ignore[arg-type]
    truth = torch.full(shape, _adjust_lr(1.0, name, torch.Size(shape)))
    torch.testing.assert_close(update, truth)


def test_none_is_no_factor() -> None:
    update = torch.ones(6, 2)
    assert ShapeScale(None)(update, {}, Context(1)) is update


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="adjust_lr='rms' is not known"):
        ShapeScale("rms")  # type: ignore[arg-type]
