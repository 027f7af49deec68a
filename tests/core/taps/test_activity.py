import pytest
import torch
from torch import nn

from neurms.compiled.reductions import axes_square_sum
from neurms.core.taps import Activity, activity_of

# layer, shape of H, axes of D and H that are summed away (the truth, spelled out per case)
CASES = {
    "linear": (nn.Linear(3, 4), (5, 3), (0,)),
    "linear, one sample": (nn.Linear(3, 4), (3,), ()),
    "linear, tokens": (nn.Linear(3, 4), (2, 5, 3), (0, 1)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9), (0, 2)),
    "conv1d, one sample": (nn.Conv1d(4, 6, 3), (4, 9), (1,)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 5), (0, 2, 3)),
    "conv2d, one sample": (nn.Conv2d(4, 6, 3), (4, 7, 5), (1, 2)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), (0, 2, 3)),
    "conv2d, depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), (0, 2, 3)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3), (0, 2, 3, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), (0, 2)),
    "transposed 2d, groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), (0, 2, 3)),
    "transposed 3d, one sample": (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3), (1, 2, 3)),
}


def squares(tensor: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return tensor.double().square().sum(axes) if axes else tensor.double().square()


@pytest.mark.parametrize("case", CASES)
def test_channels_of_every_kind_of_layer(case: str) -> None:
    layer, shape, axes = CASES[case]
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    errors = torch.randn_like(layer(inputs))
    activity = activity_of(layer)
    assert activity is not None
    units, rows = axes_square_sum(errors, activity.unit_axes)
    features, feature_rows = activity.feature_square_sum(inputs)
    torch.testing.assert_close(units.double(), squares(errors, axes), rtol=1e-6, atol=0)
    torch.testing.assert_close(features.double(), squares(inputs, axes), rtol=1e-6, atol=0)
    assert (rows, feature_rows) == (errors.numel() // len(units), inputs.numel() // len(features))


@pytest.mark.parametrize("case", CASES)
def test_scale_units_multiplies_each_unit(case: str) -> None:
    layer, shape, axes = CASES[case]
    errors = torch.randn_like(layer(torch.randn(shape)))
    activity = activity_of(layer)
    assert activity is not None
    units = axes_square_sum(errors, activity.unit_axes)[0]
    factors = torch.arange(1.0, len(units) + 1)
    scaled = activity.scale_units(errors, factors)
    assert scaled.shape == errors.shape
    torch.testing.assert_close(squares(scaled, axes).float(), units * factors**2)


def test_channels_last_memory() -> None:
    errors = torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)
    units, rows = axes_square_sum(errors, (-3,))
    assert rows == 50
    torch.testing.assert_close(units.double(), squares(errors, (0, 2, 3)), rtol=1e-6, atol=0)


def test_several_unit_axes_in_the_weights_order() -> None:
    errors = torch.randn(2, 3, 4, 5)  # batch, heads, positions, head width
    activity = Activity(unit_axes=(-1, -3))
    units, rows = axes_square_sum(errors, activity.unit_axes)
    expected = errors.double().square().sum((0, 2)).T.flatten()
    torch.testing.assert_close(units.double(), expected, rtol=1e-6, atol=0)
    assert rows == 8
    factors = torch.arange(15.0)
    expected = errors * factors.reshape(5, 3).T[None, :, None, :]
    torch.testing.assert_close(activity.scale_units(errors, factors), expected)


def test_embedding_counts_its_tokens() -> None:
    activity = activity_of(nn.Embedding(5, 3))
    assert activity is not None
    counts, rows = activity.feature_square_sum(torch.tensor([[0, 1, 1], [4, 1, 0]]))
    assert counts.tolist() == [2, 3, 0, 0, 1]
    assert rows == 6


def test_unknown_module_and_axes_from_the_front() -> None:
    assert activity_of(nn.LayerNorm(3)) is None
    with pytest.raises(ValueError, match=r"unit_axes=\(1,\).*count from the end"):
        Activity(unit_axes=(1,))


def test_half_precision_factors_beyond_the_range_of_half() -> None:
    errors = torch.full((2, 1), 1e-4, dtype=torch.float16)
    scaled = Activity().scale_units(errors, torch.tensor([1e6]))
    assert scaled.dtype == torch.float16
    torch.testing.assert_close(scaled.float(), torch.full((2, 1), 1e2), rtol=1e-2, atol=0)
