"""Shampoo's recipe: tiles, merged dimensions, grafting, momentum, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurms import Shampoo
from neurms.core.structures.kronecker import Kronecker
from neurms.testing import gradients, run


def path(steps: torch.Tensor, **settings: Any) -> list[torch.Tensor]:
    """Return the updates, each divided by -lr."""
    parameter = torch.nn.Parameter(torch.zeros_like(steps[0]))
    optimizer = Shampoo([parameter], lr=1.0, **settings)
    updates = []
    for gradient in steps:
        parameter.data.zero_()
        parameter.grad = gradient.clone()
        optimizer.step()
        updates.append(-parameter.detach().clone())
    return updates


def test_two_factors() -> None:
    steps = gradients(6, 4, steps=4)
    expected, _ = run(Kronecker(eps=1e-6), steps)
    for ours, truth in zip(path(steps, merge_dims=False), expected, strict=True):
        torch.testing.assert_close(ours, truth)


def test_small_matrices_are_merged_into_vectors() -> None:
    steps = gradients(4, 3, steps=5)
    flat = steps.flatten(1)
    for t, ours in enumerate(path(steps, eps=1e-4), 1):
        full = flat[:t].T @ flat[:t] + 1e-4 * torch.eye(12, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(full)
        expected = vectors @ ((vectors.T @ flat[t - 1]) / values.sqrt())
        torch.testing.assert_close(ours.reshape(-1), expected, rtol=1e-6, atol=1e-8)
    merged, split = path(steps, block_size=12), path(steps, block_size=11)
    assert not torch.allclose(merged[1], split[1])


def test_tiles_are_preconditioned_and_grafted_by_themselves() -> None:
    steps = gradients(5, 7, steps=3)
    whole = path(steps, block_size=4, grafting="sgd")
    for rows in (slice(0, 4), slice(4, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            alone = path(steps[:, rows, columns], merge_dims=False, grafting="sgd")
            for a, b, gradient in zip(whole, alone, steps, strict=True):
                torch.testing.assert_close(a[rows, columns], b)
                torch.testing.assert_close(b.norm(), gradient[rows, columns].norm())


def test_averages_are_corrected_for_their_start() -> None:
    steps = gradients(4, 3, steps=1).repeat(5, 1, 1)
    for update in path(steps, betas=(0.9, 0.99), merge_dims=False):
        torch.testing.assert_close(update, path(steps[:1], merge_dims=False)[0])


def test_momentum_is_heavy_ball_on_the_update() -> None:
    steps = gradients(4, 3, steps=4)
    velocity = torch.zeros(4, 3, dtype=torch.float64)
    for plain, ours in zip(path(steps), path(steps, momentum=0.9), strict=True):
        velocity = 0.9 * velocity + plain
        torch.testing.assert_close(ours, velocity)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, 40 * 40 + 30 * 30),
        ({"interval": 5}, 2 * (40 * 40 + 30 * 30)),
        ({"grafting": "adam", "momentum": 0.9, "betas": (0.9, 0.99)}, 2500 + 3 * 1200),
        ({"block_size": 32}, 2 * 30 * 30 + 32 * 32 + 8 * 8),
        ({"block_size": 1200}, 1200 * 1200),
    ],
)
def test_planned_bytes(settings: dict[str, Any], numbers: int) -> None:
    weight = torch.nn.Parameter(torch.empty(40, 30, device="meta"))
    assert Shampoo([weight], **settings).plan().state_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (1.0, 1.0)}, r"betas\[0\]=1\.0"),
        ({"betas": (0.0, 1.5)}, r"betas\[1\]=1\.5"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"interval": 0}, "interval=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"grafting": "adan"}, "grafting='adan'"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shampoo([torch.nn.Parameter(torch.zeros(2, 2))], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": 0.9}, r"betas=0\.9"),
        ({"merge_dims": "yes"}, "merge_dims='yes'"),
    ],
)
def test_settings_of_the_wrong_kind(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Shampoo([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
