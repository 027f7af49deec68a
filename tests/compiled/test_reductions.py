import functools
from unittest.mock import Mock

import pytest
import torch

from neurms.compiled.backends import PROMPT
from neurms.compiled.native import library
from neurms.compiled.reductions import channel_square_sum, column_square_sum
from neurms.compiled.signals import scaled_signal

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def column_truth(x, scale=1.0):
    wide = x.double().reshape(-1, x.shape[-1]) / scale
    return wide.square().sum(0)


def channel_truth(x, axis=1):
    return x.double().movedim(axis, 0).reshape(x.shape[axis], -1).square().sum(1)


def assert_matches(result, truth, rtol=1e-6):
    torch.testing.assert_close(result.double(), truth, rtol=rtol, atol=0.0)


class TestColumnSquareSum:
    def test_against_float64(self, backend):
        for rows in (1, 37, 5000):
            x = torch.randn(rows, 9)
            assert_matches(column_square_sum.on(backend)(x), column_truth(x))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, patient_backend, dtype):
        x = torch.randn(50, 6).to(dtype)
        result = column_square_sum.on(patient_backend)(x)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_matches(result, column_truth(x), 1e-13 if dtype == torch.float64 else 1e-6)

    def test_half_precision_is_squared_wide(self, backend):
        tiny = torch.full((3, 2), 2.0**-20, dtype=torch.float16)
        huge = torch.full((3, 2), 60000.0, dtype=torch.float16)
        for x in (tiny, huge):
            assert_matches(column_square_sum.on(backend)(x), column_truth(x))

    @pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
    def test_extreme_scales(self, patient_backend, size):
        x = torch.randn(20, 4) * size
        result = column_square_sum.on(patient_backend)(x)
        truth = column_truth(x)
        if size == 1e30:
            assert bool(result.isinf().all())
        else:
            torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=2e-45 * 20)
        wide = column_square_sum.on(patient_backend)(x.double())
        assert_matches(wide, truth, 1e-13)

    def test_loss_scale_divides_before_squaring(self, backend):
        x = torch.randn(30, 5) * 1e24
        scale = torch.tensor(2.0**60)
        result = column_square_sum.on(backend)(x, scale)
        assert_matches(result, column_truth(x, 2.0**60))

    def test_loss_scaled_half_precision(self, patient_backend):
        x = (torch.randn(30, 5) * 1e4).half()
        result = column_square_sum.on(patient_backend)(x, torch.tensor(65536.0))
        assert_matches(result, column_truth(x, 65536.0))

    def test_no_rows_give_zeros(self, backend):
        assert column_square_sum.on(backend)(torch.ones(0, 4)).tolist() == [0.0] * 4
        assert column_square_sum.on(backend)(torch.ones(4, 0)).shape == (0,)

    def test_every_leading_axis_counts_as_rows(self, patient_backend):
        x = torch.randn(3, 4, 5)
        assert_matches(column_square_sum.on(patient_backend)(x), column_truth(x))
        one = torch.randn(5)
        assert_matches(column_square_sum.on(patient_backend)(one), one.double().square())

    def test_any_strides(self, patient_backend):
        base = torch.randn(12, 10)
        for x in (base.t(), base[::2, 1::3], base[:, :1].expand(12, 4), base.reshape(3, 4, 10).mT):
            assert_matches(column_square_sum.on(patient_backend)(x), column_truth(x))

    def test_input_is_left_alone(self, backend):
        x = torch.randn(6, 3)
        kept = x.clone()
        column_square_sum.on(backend)(x, torch.tensor(2.0))
        assert torch.equal(x, kept)

    @pytest.mark.usefixtures("small_tiles")
    def test_tiles_add_up(self):
        for shape in [(33, 7), (1, 100), (200, 1)]:
            x = torch.randn(shape)
            assert_matches(column_square_sum.eager(x), column_truth(x))

    def test_a_large_tensor(self, patient_backend):
        x = torch.randn(2501, 601)
        assert_matches(column_square_sum.on(patient_backend)(x), column_truth(x))

    def test_nan_and_inf_come_through(self, backend):
        x = torch.ones(3, 3)
        x[1, 0], x[2, 1] = torch.nan, torch.inf
        result = column_square_sum.on(backend)(x)
        assert bool(result[0].isnan())
        assert bool(result[1].isinf())
        assert result[2] == 3


class TestChannelSquareSum:
    def test_against_float64(self, backend):
        x = torch.randn(3, 5, 4, 6)
        assert_matches(channel_square_sum.on(backend)(x), channel_truth(x))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, patient_backend, dtype):
        x = torch.randn(4, 3, 7).to(dtype)
        result = channel_square_sum.on(patient_backend)(x)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_matches(result, channel_truth(x), 1e-13 if dtype == torch.float64 else 1e-6)

    @pytest.mark.parametrize(
        ("shape", "axis"),
        [((2, 3), 1), ((3, 4), 0), ((3, 4, 5), 0), ((2, 4, 5, 3), -1), ((2, 3, 2, 2, 2), 1)],
    )
    def test_axes(self, patient_backend, shape, axis):
        x = torch.randn(shape)
        result = channel_square_sum.on(patient_backend)(x, axis)
        assert_matches(result, channel_truth(x, axis))

    def test_memory_formats(self, patient_backend):
        x = torch.randn(3, 5, 4, 6)
        for y in (x.contiguous(memory_format=torch.channels_last), x[:, ::2], x.mT, x[::2, :, 1:]):
            assert_matches(channel_square_sum.on(patient_backend)(y), channel_truth(y))

    def test_empty(self, backend):
        assert channel_square_sum.on(backend)(torch.ones(0, 3, 4, 4)).tolist() == [0.0] * 3
        assert channel_square_sum.on(backend)(torch.ones(2, 3, 0, 4)).tolist() == [0.0] * 3

    def test_loss_scale(self, backend):
        x = torch.randn(2, 3, 4, 4) * 1e24
        result = channel_square_sum.on(backend)(x, 1, torch.tensor(2.0**60))
        assert_matches(result, channel_truth(x.double() / 2.0**60))

    @pytest.mark.usefixtures("small_tiles")
    def test_tiles_add_up(self):
        x = torch.randn(7, 3, 5, 2)
        for y in (x, x.contiguous(memory_format=torch.channels_last)):
            assert_matches(channel_square_sum.eager(y), channel_truth(y))
        assert_matches(channel_square_sum.eager(x, 0), channel_truth(x, 0))

    def test_a_large_tensor(self, patient_backend):
        x = torch.randn(33, 8, 64, 65)
        assert_matches(channel_square_sum.on(patient_backend)(x), channel_truth(x))


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def natively(request, monkeypatch):
    """Have a sum that would run eagerly fail, where there are native ones."""
    if library() is None:
        pytest.skip("no native kernels here")

    for sums in (channel_square_sum, column_square_sum):
        refuse = Mock(side_effect=AssertionError("ran eagerly"))
        monkeypatch.setattr(sums, "eager", functools.wraps(sums.eager)(refuse))
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestNative:
    @pytest.mark.parametrize(
        "shape",
        [
            (20, 16, 32, 32),
            (40, 64, 4, 4),  # planes of a few registers
            (300, 3, 7, 7),  # with a rest
            (2, 3, 101, 99),  # of several blocks
            (1, 1, 200, 200),
            (700, 50, 1, 1),
            (9, 8, 5, 10, 13),
            (11, 3, 1013),
        ],
    )
    def test_channels_in_either_memory_format(self, dtype, shape):
        x = torch.randn(shape).to(dtype)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        for y in (x, last):
            assert_matches(channel_square_sum.on("auto")(y), channel_truth(y))

    def test_channels_of_one_image(self, dtype):
        x = torch.randn(5, 90, 80).to(dtype)
        assert_matches(channel_square_sum.on("auto")(x, 0), channel_truth(x, 0))

    @pytest.mark.parametrize("columns", [1, 3, 10, 16, 31, 32, 33, 64, 100, 1500])
    def test_columns_few_and_many(self, dtype, columns):
        for rows in (2**15 // columns + 1, 2**15 // columns + 38):
            x = torch.randn(rows, columns).to(dtype)
            assert_matches(column_square_sum.on("auto")(x), column_truth(x))

    def test_nan_and_inf_stay_in_their_channel(self, dtype):
        x = torch.ones(20, 16, 32, 32, dtype=dtype)
        x[3, 0, 31, 31], x[19, 15, 0, 0] = torch.nan, torch.inf
        result = channel_square_sum.on("auto")(x)
        assert bool(result[0].isnan())
        assert bool(result[15].isinf())
        assert result[1:15].tolist() == [20 * 1024.0] * 14


@pytest.mark.parametrize("form", ["eager", PROMPT])
def test_nothing_sums_to_zero(form: str) -> None:
    """Layers without inputs or outputs, and batches without rows: whole numbers divide nothing."""
    for rows, columns in ((5, 0), (0, 3), (0, 0), (200, 0), (0, 300)):
        for dtype in (torch.float32, torch.bfloat16):
            found = column_square_sum.on(form)(torch.ones(rows, columns, dtype=dtype), None)
            assert torch.equal(found.float(), torch.zeros(columns))
    for shape in ((2, 0, 3, 3), (0, 3, 2, 2), (2, 3, 0, 2)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.ones(shape).to(memory_format=memory)
            found = channel_square_sum.on(form)(x, 1, None)
            assert torch.equal(found, torch.zeros(shape[1]))


@pytest.mark.parametrize("form", ["eager", PROMPT])
def test_a_signal_of_no_columns_is_scaled(form: str) -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    x = torch.ones(5, 0)
    made = scaled_signal.on(form)(x, torch.zeros(0), True, 0.9, one, 1e-8, 1e-12, 1e-3, 1e3)
    assert [part.numel() for part in made] == [0] * len(made)
