"""EigenAdam, SOAP, Alice, GaLore, Fira, APOLLO and LowRankSOAP as optimizers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms.core.optimizers.registry import create
from neurms.testing import gradients

FAMILY: dict[str, dict[str, Any]] = {
    "eigen_adam": {"interval": 3},
    "soap": {"interval": 2},
    "alice": {"rank": 3, "leading": 1, "interval": 4},
    "galore": {"rank": 3, "interval": 4},
    "fira": {"rank": 3, "interval": 4},
    "apollo": {"rank": 3, "interval": 4},
    "low_rank_soap": {"rank": 3, "leading": 2, "interval": 4, "basis_interval": 2},
}


def parameters(shape: tuple[int, ...] = (5, 8), count: int = 1) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: Tensor) -> None:
    for gradient in steps:
        for parameter in params:
            parameter.grad = gradient.clone()
        optimizer.step()


def trained(name: str, steps: Tensor, **settings: Any) -> Tensor:
    params = parameters(tuple(steps.shape[1:]))
    train(create(name, params, **{**FAMILY[name], **settings}), params, steps)
    return params[0].detach()


def state_floats(name: str, shape: tuple[int, int], **settings: Any) -> int:
    params = parameters(shape)
    optimizer = create(name, params, **settings)
    predicted = optimizer.plan().state_bytes  # type: ignore[attr-defined]
    train(optimizer, params, gradients(*shape, steps=1, dtype=torch.float32))
    assert optimizer.state_bytes() == predicted  # type: ignore[attr-defined]
    return int(predicted // 4)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 6)])
def test_state_follows_the_papers_formulas(shape: tuple[int, int]) -> None:
    short, long = sorted(shape)
    m, n = shape
    r = 4
    ranks = {"rank": r, "leading": 2}
    low_rank = 2 * long * r + short * r
    assert state_floats("eigen_adam", shape) == 2 * m * n + 2 * m * m
    assert state_floats("soap", shape) == 2 * m * n + 2 * m * m + 2 * n * n
    assert state_floats("alice", shape, **ranks) == low_rank + r * r + long + 1
    assert state_floats("alice", shape, **ranks, tracking=False) == low_rank + long + 1
    assert state_floats("alice", shape, **ranks, compensation=0.0) == low_rank + r * r
    assert state_floats("galore", shape, rank=r) == low_rank
    assert state_floats("fira", shape, rank=r) == low_rank + 1
    assert state_floats("fira", shape, rank=r, compensation=0.4) == low_rank
    assert state_floats("apollo", shape, rank=r) == 2 * long * r + 1
    assert state_floats("apollo", shape, rank=r, projection="svd") == low_rank + 1
    soap_inside = 2 * long * r + 2 * r * r + 2 * long * long
    expected = soap_inside + short * r + r * r + 2 * long + 1
    assert state_floats("low_rank_soap", shape, **ranks) == expected


@pytest.mark.parametrize("name", FAMILY)
def test_resumed_run_is_bit_identical(name: str) -> None:
    steps = gradients(5, 8, steps=10, dtype=torch.float32)
    whole = parameters()
    train(create(name, whole, **FAMILY[name]), whole, steps)
    half = parameters()
    optimizer = create(name, half, **FAMILY[name])
    train(optimizer, half, steps[:5])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    rest = [nn.Parameter(half[0].detach().clone())]
    resumed = create(name, rest, **FAMILY[name])
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    torch.manual_seed(99)
    train(resumed, rest, steps[5:])
    assert torch.equal(rest[0], whole[0])


@pytest.mark.parametrize("name", FAMILY)
def test_equal_matrices_are_batched_without_a_trace(name: str) -> None:
    shape, count = (5, 8), 3
    steps = [gradients(*shape, steps=6, seed=seed, dtype=torch.float32) for seed in range(count)]
    together = parameters(shape, count)
    optimizer = create(name, together, **FAMILY[name])
    for gradient in zip(*steps, strict=True):
        for parameter, own in zip(together, gradient, strict=True):
            parameter.grad = own.clone()
        optimizer.step()
    for index in range(count):
        alone = parameters(shape, count)
        single = create(name, [(f"param_{index}", alone[index])], **FAMILY[name])
        train(single, [alone[index]], steps[index])
        torch.testing.assert_close(together[index], alone[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", [(3, 4), (4, 1), (1, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_runs_on_odd_shapes_and_dtypes(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    settings = {k: v for k, v in FAMILY[name].items() if k not in ("rank", "leading")}
    parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = create(name, [parameter], lr=0.1, **settings)
    train(optimizer, [parameter], torch.randn(6, *shape).to(dtype))
    assert parameter.isfinite().all()
    assert (parameter != 1).any()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e16])
def test_extreme_gradients_take_bounded_steps(name: str, scale: float) -> None:
    steps = gradients(6, 9, steps=8, dtype=torch.float32) * scale
    parameter = nn.Parameter(torch.zeros(6, 9))
    train(create(name, [parameter], **{"lr": 1.0, **FAMILY[name]}), [parameter], steps)
    assert parameter.isfinite().all()
    assert parameter.abs().max() < 100


@pytest.mark.parametrize("name", ["alice", "apollo", "low_rank_soap"])
def test_seed_decides_the_draws(name: str) -> None:
    steps = gradients(5, 8, steps=3, dtype=torch.float32)
    first = trained(name, steps, seed=3)
    assert torch.equal(first, trained(name, steps, seed=3))
    assert not torch.equal(first, trained(name, steps, seed=4))


def test_alice_is_transposed_when_tall() -> None:
    steps = gradients(8, 5, steps=4, dtype=torch.float32)
    settings: dict[str, Any] = {"rank": 3, "leading": 3}
    tall, flat = nn.Parameter(torch.zeros(8, 5)), nn.Parameter(torch.zeros(5, 8))
    train(create("alice", [tall], **settings), [tall], steps)
    train(create("alice", [flat], **settings), [flat], steps.mT)
    torch.testing.assert_close(tall, flat.mT, rtol=1e-4, atol=1e-5)
    kept = nn.Parameter(torch.zeros(8, 5))
    optimizer = create("alice", [kept], transpose_tall=False, **settings)
    train(optimizer, [kept], steps)
    assert optimizer.state[kept]["basis"].shape == (8, 3)


def test_alice0_ignores_the_third_beta() -> None:
    steps = gradients(5, 8, steps=6, dtype=torch.float32)
    first = trained("alice", steps, tracking=False, betas=(0.9, 0.9, 0.999))
    second = trained("alice", steps, tracking=False, betas=(0.9, 0.9, 0.0))
    assert torch.equal(first, second)


@pytest.mark.parametrize("switching", ["complement", "full_basis", "gaussian_mix", "gaussian"])
@pytest.mark.parametrize("residual", ["optimal", "fira", "fira+"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 4)])
def test_alices_ablations_run_and_resume(
    switching: str, residual: str, shape: tuple[int, int]
) -> None:
    steps = gradients(*shape, steps=7, dtype=torch.float32)
    settings = {"switching": switching, "residual": residual, "interval": 3}
    first = trained("alice", steps, **settings)
    assert first.isfinite().all()
    assert torch.equal(first, trained("alice", steps, **settings))


def test_alices_residuals_are_firas_at_its_own_subspace() -> None:
    # One renewal and no draws: the parts of the update outside of the basis tell the rules apart.
    gradient = gradients(6, 9, steps=1)
    for kind, weight in (("fira+", 0.7), ("fira", None)):
        parameter = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
        optimizer = create(
            "alice", [parameter], lr=1.0, alpha=1.0, rank=2, leading=2, residual=kind,
            compensation=0.7,
        )  # fmt: skip
        train(optimizer, [parameter], gradient)
        basis = optimizer.state[parameter]["basis"]
        inside = basis @ (basis.mT @ -parameter.detach())
        outside = -parameter.detach() - inside
        z = basis.mT @ gradient[0]
        # w = m / sqrt(v) has entries of (1 - b1) / sqrt(1 - b2) in the first step.
        lengths = (2 * 0.1**2 / 0.1) ** 0.5 / z.norm(dim=0)
        truth = (gradient[0] - basis @ z) * lengths
        if weight is not None:
            truth *= weight * inside.norm() / truth.norm()
        torch.testing.assert_close(outside, truth, rtol=1e-6, atol=1e-9)


def test_alice_of_a_rank_one_gradient_takes_bounded_steps() -> None:
    # p is rounding noise in every column here; dividing by its root would be an update of 1e7.
    column, row = gradients(16, 1, steps=1)[0], gradients(1, 24, steps=1)[0]
    steps = (column @ row).float().expand(3, 16, 24)
    parameter = nn.Parameter(torch.zeros(16, 24))
    train(create("alice", [parameter], lr=1.0, rank=4, leading=4), [parameter], steps)
    assert parameter.abs().max() < 3.0


def test_eigen_adam_corrects_its_bias_on_request() -> None:
    steps = gradients(4, 4, steps=1, dtype=torch.float32)
    plain = trained("eigen_adam", steps, lr=1e-3) - parameters((4, 4))[0]
    corrected = trained("eigen_adam", steps, lr=1e-3, bias_correction=True) - parameters((4, 4))[0]
    ratio = (1 - 0.999) ** 0.5 / (1 - 0.9)
    torch.testing.assert_close(corrected, plain * ratio, rtol=1e-2, atol=1e-6)


def test_soap_moves_and_decays_from_the_second_step_on() -> None:
    steps = gradients(4, 4, steps=2, dtype=torch.float32)
    start = parameters((4, 4))[0].detach()
    assert torch.equal(trained("soap", steps[:1], weight_decay=0.5), start)
    assert not torch.equal(trained("soap", steps, weight_decay=0.5), start)


def test_apollo_mini_scales_the_whole_gradient() -> None:
    gradient = gradients(5, 8, steps=1, dtype=torch.float32)
    start = parameters((5, 8))[0].detach()
    settings = {"rank": 1, "scale_type": "tensor"}
    mini = trained("apollo", gradient, scale=128.0, **settings) - start
    plain = trained("apollo", gradient, scale=1.0, **settings) - start
    ratios = mini / gradient[0]
    torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), rtol=1e-3, atol=0)
    torch.testing.assert_close(mini, plain * 128.0**0.5, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("alice", {"rank": 0}, "rank=0"),
        ("alice", {"rank": 4, "leading": 5}, "leading=5 is greater than rank=4"),
        ("alice", {"interval": 0}, "interval=0"),
        ("alice", {"betas": (0.9, 0.9, 1.0)}, r"betas\[2\]=1.0"),
        ("alice", {"betas": (0.9, 0.9)}, "betas=.* must hold 3"),
        ("alice", {"alpha": -0.3}, "alpha=-0.3"),
        ("alice", {"compensation": -0.4}, "compensation=-0.4"),
        ("alice", {"gamma": 0.5}, "gamma=0.5"),
        ("alice", {"first_basis": "zero"}, "first_basis='zero'"),
        ("alice", {"seed": -1}, "seed=-1"),
        ("alice", {"switching": "full"}, "switching='full'"),
        ("alice", {"residual": "none"}, "residual='none'"),
        ("alice", {"switching": "gaussian", "rotate_moments": True}, "orthonormal"),
        ("alice", {"rotate_moments": {}}, "rotate_moments=.* is not known"),
        ("eigen_adam", {"interval": 0}, "interval=0"),
        ("eigen_adam", {"betas": (0.9, -0.1, 0.9)}, r"betas\[1\]=-0.1"),
        ("soap", {"betas": (0.9,)}, "betas=.* must hold 2"),
        ("soap", {"shampoo_beta": 1.0}, "shampoo_beta=1.0"),
        ("soap", {"max_preconditioned_dim": 0}, "max_preconditioned_dim=0"),
        ("galore", {"rank": 0}, "rank=0"),
        ("galore", {"scale": -1.0}, "scale=-1.0"),
        ("fira", {"scale": -1.0}, "scale=-1.0"),
        ("fira", {"compensation": -1.0}, "compensation=-1.0"),
        ("fira", {"eps": -1.0}, "eps=-1.0"),
        ("apollo", {"projection": "qr"}, "projection='qr'"),
        ("apollo", {"scale_type": "row"}, "scale_type='row'"),
        ("apollo", {"gamma": 0.0}, "gamma=0.0"),
        ("low_rank_soap", {"basis_interval": 0}, "basis_interval=0"),
        ("low_rank_soap", {"rank": 3, "leading": 4}, "leading=4"),
    ],
)
def test_bad_settings_name_the_argument(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, parameters(), **settings)
