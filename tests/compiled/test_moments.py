import pytest
import torch

from neurms.compiled.backends import PROMPT
from neurms.compiled.moments import ema_, moment_factors, move_moments
from tests.core.unitwise.root_truth import inverse_root

FORMS = ["eager", "auto", PROMPT]


def factors(form, v, correction, *root):
    (s,) = moment_factors.on(form)([v], [correction], *root)
    return s


@pytest.fixture(params=[None, 2.5])
def kappa(request):
    return request.param


def truth(v, q, weight, correction, kappa):
    moved = 0.9 * v.double() + 0.1 * weight * q.double()
    s = inverse_root(moved / correction, v_min=1e-12)
    if kappa is None:
        return moved, s.clamp(0.5, 1.5)
    median = s.sort().values[(len(s) - 1) // 2] if len(s) else s
    return moved, s.clamp(median / kappa, median * kappa) if len(s) else s


def check(form, sizes, dtypes, kappa):
    moments = [torch.rand(n).pow(6).to(t) for n, t in zip(sizes, dtypes, strict=True)]
    squares = [torch.rand(n).to(t) * 7 for n, t in zip(sizes, dtypes, strict=True)]
    before = [v.clone() for v in moments]
    weights = [1 / 7 + i for i in range(len(sizes))]
    corrections = [1.0 / (1 + i) for i in range(len(sizes))]
    root = 0.9, 1e-8, 1e-12, 0.5, 1.5, kappa
    moved, made = move_moments.on(form)(moments, squares, weights, corrections, *root)
    again = moment_factors.on(form)(moved, corrections, *root[1:])
    assert isinstance(moved, list)
    assert isinstance(made, list)
    rows = zip(moments, squares, weights, corrections, strict=True)
    for i, (v, q, weight, correction) in enumerate(rows):
        assert torch.equal(v, before[i])
        expected_v, expected_s = truth(v, q, weight, correction, kappa)
        assert moved[i].dtype == made[i].dtype == v.dtype
        torch.testing.assert_close(moved[i].double(), expected_v, rtol=1e-6, atol=0)
        torch.testing.assert_close(made[i].double(), expected_s, rtol=1e-6, atol=0)
        torch.testing.assert_close(again[i], made[i], rtol=1e-6, atol=0)


class TestMoveMoments:
    def test_against_float64(self, backend, kappa):
        check(backend, [9, 1, 4, 0], [torch.float32] * 4, kappa)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("sizes", [[1], [8, 1025, 10], [40_000, 3], []])
    def test_lists(self, form, sizes, kappa):
        check(form, sizes, [torch.float32] * len(sizes), kappa)

    @pytest.mark.parametrize("form", FORMS)
    def test_mixed_lists(self, form, kappa):
        kinds = [torch.float32, torch.float64, torch.float32, torch.float64]
        check(form, [40_000, 5, 6, 7], kinds, kappa)

    @pytest.mark.parametrize("form", FORMS)
    def test_sums_over_ranks_are_float64(self, form):
        v, q = torch.rand(5), torch.rand(5).double()
        root = 0.9, 1e-8, 1e-12, 0.5, 1.5
        (moved,), (s,) = move_moments.on(form)([v], [q], [2.0], [0.5], *root)
        expected = truth(v, q, 2.0, 0.5, None)
        assert moved.dtype == torch.float32
        torch.testing.assert_close((moved.double(), s.double()), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("form", FORMS)
    def test_nan_stays_in_its_layer(self, form, kappa):
        moments = [torch.tensor([torch.nan, 1.0]), torch.ones(3)]
        squares = [torch.ones(2), torch.ones(3)]
        root = 0.9, 1e-8, 1e-12, 0.5, 1.5, kappa
        _, (bad, good) = move_moments.on(form)(moments, squares, [1.0] * 2, [1.0] * 2, *root)
        assert bad.isnan().tolist() == [True, kappa is not None]
        assert good.isfinite().all()

    def test_a_strided_vector_goes_by_itself(self):
        moments = [torch.rand(8)[::2], torch.rand(4)]
        squares = [torch.rand(4), torch.rand(4)]
        root = 0.9, 1e-8, 1e-12, 0.5, 1.5
        moved, _ = move_moments.on(PROMPT)(moments, squares, [1.0, 2.0], [1.0, 0.5], *root)
        for v, q, weight, one in zip(moments, squares, (1.0, 2.0), moved, strict=True):
            torch.testing.assert_close(one.double(), truth(v, q, weight, 1, None)[0])


class TestMomentFactors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_against_float64(self, backend, dtype):
        v = torch.logspace(-40, 30, 71, dtype=torch.float64).to(dtype)
        correction = 1 - 0.99**3
        expected = inverse_root(v.double() / correction, v_min=1e-12).clamp(1e-3, 100.0)
        for form in (backend, PROMPT):
            result = factors(form, v, correction, 1e-8, 1e-12, 1e-3, 100.0)
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)

    def test_bounds_are_reached(self, backend):
        v = torch.tensor([0.0, 1e-45, 1e-12, 1.0, 1e38])
        expected = torch.tensor([1e6, 1e6, 1e6, 1.0, 1e-2])
        for form in (backend, PROMPT):
            result = factors(form, v, 1.0, 0.0, 1e-12, 1e-2, torch.inf)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)

    def test_nan_is_not_clipped_away(self, backend):
        for form in (backend, PROMPT):
            result = factors(form, torch.tensor([torch.nan, 1.0]), 1.0, 0.0, 1e-12, 0.0, 9.0)
            assert bool(result[0].isnan())
            assert result[1] == 1

    def test_input_is_left_alone_and_empty_passes(self, backend):
        v = torch.tensor([4.0])
        factors(backend, v, 1.0, 1.0, 1e-12, 0.0, 1.0)
        assert v.item() == 4
        assert factors(backend, torch.ones(0), 1.0, 0.0, 1e-12, 0.0, 1.0).shape == (0,)


class TestRelativeFactors:
    @pytest.mark.parametrize("size", [7, 8])
    def test_against_float64(self, backend, size):
        v = torch.rand(size).pow(12)
        s = inverse_root(v.double() / 0.5, v_min=1e-12)
        median = s.sort().values[(size - 1) // 2]
        for form in (backend, PROMPT):
            result = factors(form, v, 0.5, 1e-8, 1e-12, 0.0, 0.0, 3.0)
            torch.testing.assert_close(
                result.double(), s.clamp(median / 3, median * 3), rtol=1e-6, atol=0
            )

    def test_is_free_of_the_losss_scale(self, backend):
        v = torch.rand(9)
        root = 1.0, 0.0, 1e-30, 0.0, 0.0, 2.0
        plain, scaled = (factors(backend, x, *root) for x in (v, v * 2.0**-20))
        torch.testing.assert_close(scaled, plain * 2.0**10, rtol=1e-6, atol=0)

    def test_dead_units_stay_near_the_median(self, backend):
        v = torch.tensor([1.0, 1.0, 1.0, 0.0])
        result = factors(backend, v, 1.0, 0.0, 1e-12, 0.0, 0.0, 10.0)
        torch.testing.assert_close(result, torch.tensor([1.0, 1.0, 1.0, 10.0]))

    def test_stacked_layers_have_medians_of_their_own(self):
        v = torch.tensor([[1.0, 1.0, 0.0], [4.0, 4.0, 0.0]])
        for form in ("eager", PROMPT):
            result = factors(form, v, 1.0, 0.0, 1e-12, 0.0, 0.0, 10.0)
            assert result.tolist() == [[1.0, 1.0, 10.0], [0.5, 0.5, 5.0]]

    def test_empty_and_single(self, patient_backend):
        root = 1.0, 0.0, 1e-12, 0.0, 0.0, 2.0
        assert factors(patient_backend, torch.ones(0), *root).shape == (0,)
        assert factors(patient_backend, torch.tensor([4.0]), *root).tolist() == [0.5]


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
