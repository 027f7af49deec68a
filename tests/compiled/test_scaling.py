import pytest
import torch

from neurms.compiled.scaling import ema_, relative_scale_factors, scale_factors

ONE = torch.tensor(1.0)


class TestScaleFactors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_against_float64(self, backend, dtype):
        v = torch.logspace(-40, 30, 71, dtype=torch.float64).to(dtype)
        correction = torch.tensor(1 - 0.99**3, dtype=torch.float64)
        result = scale_factors.on(backend)(v, correction, 1e-8, 1e-12, 1e-3, 100.0)
        truth = (v.double() / correction + 1e-8).clamp(min=1e-12).pow(-0.5).clamp(1e-3, 100.0)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=0)

    def test_bounds_are_reached(self, backend):
        v = torch.tensor([0.0, 1e-45, 1e-12, 1.0, 1e38])
        result = scale_factors.on(backend)(v, ONE, 0.0, 1e-12, 1e-2, torch.inf)
        expected = torch.tensor([1e6, 1e6, 1e6, 1.0, 1e-2])
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)

    def test_nan_is_not_clipped_away(self, backend):
        result = scale_factors.on(backend)(torch.tensor([torch.nan, 1.0]), ONE, 0.0, 1e-12, 0, 9.0)
        assert bool(result[0].isnan())
        assert result[1] == 1

    def test_input_is_left_alone_and_empty_passes(self, backend):
        v = torch.tensor([4.0])
        scale_factors.on(backend)(v, ONE, 1.0, 1e-12, 0.0, 1.0)
        assert v.item() == 4
        assert scale_factors.on(backend)(torch.ones(0), ONE, 0.0, 1e-12, 0.0, 1.0).shape == (0,)


class TestRelativeScaleFactors:
    @pytest.mark.parametrize("size", [7, 8])
    def test_against_float64(self, backend, size):
        v = torch.rand(size).pow(12)
        result = relative_scale_factors.on(backend)(v, ONE * 0.5, 1e-8, 1e-12, 3.0)
        s = (v.double() / 0.5 + 1e-8).clamp(min=1e-12).pow(-0.5)
        median = s.sort().values[(size - 1) // 2]
        torch.testing.assert_close(
            result.double(), s.clamp(median / 3, median * 3), rtol=1e-6, atol=0
        )
        assert int((result < result.max()).sum()) > 0

    def test_is_free_of_the_losss_scale(self, backend):
        v = torch.rand(9)
        form = relative_scale_factors.on(backend)
        plain, scaled = (form(x, ONE, 0.0, 1e-30, 2.0) for x in (v, v * 2.0**-20))
        torch.testing.assert_close(scaled, plain * 2.0**10, rtol=1e-6, atol=0)

    def test_dead_units_stay_near_the_median(self, backend):
        v = torch.tensor([1.0, 1.0, 1.0, 0.0])
        result = relative_scale_factors.on(backend)(v, ONE, 0.0, 1e-12, 10.0)
        torch.testing.assert_close(result, torch.tensor([1.0, 1.0, 1.0, 10.0]))

    def test_empty_and_single(self, patient_backend):
        form = relative_scale_factors.on(patient_backend)
        assert form(torch.ones(0), ONE, 0.0, 1e-12, 2.0).shape == (0,)
        assert form(torch.tensor([4.0]), ONE, 0.0, 1e-12, 2.0).tolist() == [0.5]


class TestEma:
    @pytest.mark.parametrize("beta", [0.0, 0.3, 0.99, 0.9999])
    def test_against_float64(self, backend, beta):
        v, sample = torch.rand(20) * 1e-3, torch.rand(20)
        truth = beta * v.double() + (1 - beta) * sample.double()
        result = ema_.on(backend)(v, sample, beta)
        assert result.data_ptr() == v.data_ptr()
        torch.testing.assert_close(v.double(), truth, rtol=1e-6, atol=0)

    def test_converges_to_a_constant(self, backend):
        v, form = torch.zeros(3), ema_.on(backend)
        for _ in range(200):
            form(v, torch.full((3,), 5.0), 0.9)
        torch.testing.assert_close(v, torch.full((3,), 5.0), rtol=1e-5, atol=0)

    def test_mixed_dtypes(self, patient_backend):
        v = torch.ones(3)
        ema_.on(patient_backend)(v, torch.full((3,), 3.0, dtype=torch.float64), 0.5)
        assert v.tolist() == [2.0] * 3
