"""Rounding to bfloat16: exact where it can be, unbiased where it cannot."""

from __future__ import annotations

import pytest
import torch

from neurms.core.ground.precision import compute_dtype, round_stochastically, write_


def neighbours(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers next to a positive float32, below and above."""
    bits = value.view(torch.int32) & -65536
    return bits.view(torch.float32), (bits + 65536).view(torch.float32)


def test_statistics_are_float32_except_for_float64() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert compute_dtype(torch.zeros(1, dtype=dtype)) == torch.float32
    assert compute_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounds_to_a_neighbour_and_on_average_to_the_value(sign: float) -> None:
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    low, high = neighbours(value[:1])
    rounded = round_stochastically(sign * value, torch.Generator().manual_seed(0)).float() * sign
    assert set(rounded.unique().tolist()) == {float(low), float(high)}
    share = (rounded == high).float().mean()
    # Standard error of the share is .001.
    assert abs(float(share) - 0.3) < 0.005


def test_what_bfloat16_holds_is_kept() -> None:
    value = torch.randn(1000).bfloat16().float()
    value[:3] = torch.tensor([0.0, -0.0, 2.0**-130])
    assert torch.equal(round_stochastically(value).float(), value)


def test_nonfinite_values_pass() -> None:
    value = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = round_stochastically(value)
    assert rounded[:2].tolist() == [float("inf"), -float("inf")]
    assert rounded[2].isnan()


def test_same_generator_same_bits() -> None:
    value = torch.randn(6, 4).t()
    first, second = (
        round_stochastically(value, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == value.shape


@pytest.mark.parametrize("rounding", ["nearest", "master"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest(rounding: str, dtype: torch.dtype) -> None:
    value = torch.randn(100)
    parameter = torch.zeros(100, dtype=dtype)
    write_(parameter, value, rounding)  # type: ignore[arg-type]
    assert torch.equal(parameter, value.to(dtype))


def test_small_steps_survive_on_average() -> None:
    parameter = torch.ones(5000, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        write_(parameter, parameter.float() - 1e-4, "stochastic", generator)
    assert abs(float(parameter.float().mean()) - (1 - 20e-4)) < 2e-4
