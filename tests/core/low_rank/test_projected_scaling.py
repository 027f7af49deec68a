"""APOLLO's scaling of the raw gradient by factors measured on a projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.low_rank.projected_scaling import ProjectedScaling, ScaleType
from neurms.core.low_rank.subspaces import RandomSubspace, SingularSubspace
from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.projected_diagonal import ProjectedDiagonal
from neurms.testing import TransformContract, gradients, run

ADAM = ProjectedDiagonal((0.9, 0.999), 1e-6)


class TestSingular(TransformContract):
    transform = ProjectedScaling(ADAM, SingularSubspace(2))
    tolerance = 1e-6


class TestRandom(TransformContract):
    transform = ProjectedScaling(ADAM, RandomSubspace(2, interval=2))
    # A random projection knows positions, not rows; the channels do permute, but not the others.
    permutes_units = permutes_features = False


class TestTensorwise(TransformContract):
    transform = ProjectedScaling(ADAM, SingularSubspace(1), "tensor")
    tolerance = 1e-6


def transcription(steps: Tensor, scale_type: ScaleType) -> list[Tensor]:
    """Return APOLLO's scaled gradients (m < n) with the first gradient's two singular vectors."""
    basis = torch.linalg.svd(steps[0], full_matrices=False)[0][:, :2]
    m = v = torch.zeros(2, steps.shape[-1], dtype=torch.float64)
    updates = []
    for gradient in steps:
        z = basis.mT @ gradient
        m, v = 0.9 * m + 0.1 * z, 0.999 * v + 0.001 * z**2
        w = m / (v.sqrt() + 1e-6)
        if scale_type == "tensor":
            updates.append(gradient * w.norm() / (z.norm() + 1e-8))
        else:
            updates.append(gradient * w.norm(dim=0) / (z.norm(dim=0) + 1e-8))
    return updates


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("tall", [False, True])
def test_equals_a_transcription(scale_type: ScaleType, tall: bool) -> None:
    steps = gradients(4, 6, steps=5)
    structure = ProjectedScaling(ADAM, SingularSubspace(2), scale_type)
    updates, _ = run(structure, steps.mT if tall else steps)
    for ours, theirs in zip(updates, transcription(steps, scale_type), strict=True):
        torch.testing.assert_close(ours.mT if tall else ours, theirs)


def test_precondition_is_diagonal_on_columns() -> None:
    structure = ProjectedScaling(ADAM, SingularSubspace(2))
    _, state = run(structure, gradients(4, 6, steps=3))
    gradient = gradients(4, 6, steps=1, seed=2)[0]
    update = structure.precondition(gradient, state, Context(4))
    z = state["basis"].mT @ gradient
    w = z / (state["exp_avg_sq"].sqrt() + 1e-6)
    factors = w.norm(dim=0) / z.norm(dim=0)
    torch.testing.assert_close(update, gradient @ torch.diag(factors), rtol=1e-6, atol=1e-9)


def test_state_bytes() -> None:
    meta = torch.empty(6, 10, device="meta")
    random = ProjectedScaling(ADAM, RandomSubspace(3)).init(meta)
    assert tensor_bytes(random) == 4 * 2 * 3 * 10
    singular = ProjectedScaling(ADAM, SingularSubspace(3)).init(meta)
    assert tensor_bytes(singular) == 4 * (2 * 3 * 10 + 6 * 3)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="scale_type='row'"):
        ProjectedScaling(ADAM, SingularSubspace(2), "row")  # type: ignore[arg-type]
