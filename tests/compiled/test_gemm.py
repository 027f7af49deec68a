import pytest
import torch
from torch import nn

from neurms.compiled.backends import PROMPT
from neurms.compiled.gemm import _multiplies, scaled_gemm_, update_gemm_
from neurms.compiled.native import addresses, bfloat16_engine, library, wide_float32
from neurms.compiled.update import apply_updates_


def assert_close64(result, truth, rtol=1e-6):
    torch.testing.assert_close(result.double(), truth, rtol=rtol, atol=rtol)


class TestUpdateGemm:
    @pytest.mark.parametrize("number", [float, lambda x: torch.tensor(x, dtype=torch.float64)])
    def test_against_float64(self, number):
        w, d, h = torch.randn(6, 4), torch.randn(9, 6), torch.randn(9, 4)
        truth = 0.9 * w.double() - 0.05 * d.double().t() @ h.double()
        result = update_gemm_(w, d, h, number(0.05), number(0.9))
        assert result is w
        assert_close64(w, truth)

    def test_is_a_linear_layers_sgd_step(self):
        layer, x = nn.Linear(4, 6), torch.randn(9, 4)
        z = layer(x)
        z.retain_grad()
        z.square().mean().backward()
        expected = layer.weight.detach() - 0.5 * layer.weight.grad
        update_gemm_(layer.weight, z.grad, x, 0.5)
        torch.testing.assert_close(layer.weight.detach(), expected)
        assert layer.weight.requires_grad

    def test_no_rows_only_decay(self):
        w = torch.ones(6, 4)
        update_gemm_(w, torch.ones(0, 6), torch.ones(0, 4), 1.0, 0.5)
        assert bool((w == 0.5).all())

    def test_transposed_kernel(self):
        kernel, d, h = torch.zeros(4, 6), torch.randn(9, 6), torch.randn(9, 4)
        update_gemm_(kernel.t(), d, h, 1.0)
        torch.testing.assert_close(kernel, -h.t() @ d)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_casts_to_the_weight(self, dtype):
        w, d, h = torch.zeros(6, 4), torch.randn(9, 6).to(dtype), torch.randn(9, 4).to(dtype)
        update_gemm_(w, d, h, 1.0)
        assert w.dtype == torch.float32
        assert_close64(w, -d.double().t() @ h.double(), 2e-6)

    def test_shapes_are_refused_before_anything_changes(self):
        w = torch.ones(6, 4)
        for d, h in [((9, 5), (9, 4)), ((9, 6), (9, 1)), ((9, 6), (8, 4)), ((9, 6), (2, 9, 4))]:
            with pytest.raises(ValueError, match=r"errors .*activations .*w"):
                update_gemm_(w, torch.ones(d), torch.ones(h), 1.0, 0.5)
        assert bool((w == 1).all())


def test_velocity_then_update_is_torchs_momentum():
    layer = nn.Linear(4, 6, bias=False)
    w, velocity = layer.weight.detach().clone(), torch.zeros(6, 4)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        d, h = torch.randn(9, 6), torch.randn(9, 4)
        layer.weight.grad = d.t() @ h
        sgd.step()
        update_gemm_(velocity, d, h, -1.0, 0.9)
        apply_updates_([w], [velocity], [None], [None], [None], [0.1], [1.0])
    torch.testing.assert_close(w, layer.weight.detach())


ONE = torch.tensor(1.0, dtype=torch.float64)
SHAPES = [(300, 200, 129), (16, 16, 32), (33, 47, 31), (5, 3, 1), (10, 1024, 128), (128, 65, 1000)]


def operands(m, n, rows, dtype=torch.float32):
    torch.manual_seed(m)
    d, h = torch.randn(rows, m).to(dtype), torch.randn(rows, n).to(dtype)
    return torch.randn(m, n), d, h, torch.rand(m) + 0.1, torch.rand(n) + 0.1


def truth_of(w, d, h, s, c, lr, decay, bfloat16=True):
    left = 1.0 if s is None else s.double()[:, None]
    right = 1.0 if c is None else c.double()
    d, h = (x.bfloat16() if bfloat16 else x for x in (d, h))
    return decay * w.double() - lr * left * (d.double().T @ h.double()) * right


def assert_near(found, truth, rows):
    """Within the rounding of float32 sums, which grows with their number."""
    size = float(truth.abs().amax())
    bound = max(1e-6, 1e-7 * rows**0.5) * size
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=bound)


PRECISIONS = [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)]
"""Of D and H, and whether they are multiplied as bfloat16."""

FACTORS = [(True, True), (True, False), (False, True), (False, False)]


class TestScaledGemm:
    @pytest.mark.parametrize("form", ["eager", "auto", PROMPT, "torchscript"])
    @pytest.mark.parametrize(("dtype", "low"), PRECISIONS)
    @pytest.mark.parametrize(
        "factors", [(True, True), (True, False), (False, True), (False, False)]
    )
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_is_the_scaled_product(self, form, dtype, low, factors, shape):
        w, d, h, s, c = operands(*shape, dtype)
        s, c = (x if given else None for x, given in zip((s, c), factors, strict=True))
        truth = truth_of(w, d, h, s, c, 0.05, 0.9, low)
        before = w._version
        rates = ONE * 0.05, ONE * 0.9
        assert scaled_gemm_.on(form)(w, d, h, s, c, *rates, None, None, False, low) is w
        assert w._version > before
        assert_near(w, truth, shape[2])

    @pytest.mark.parametrize("form", ["eager", "auto", PROMPT, "torchscript"])
    @pytest.mark.parametrize("coupled", [False, True])
    @pytest.mark.parametrize("low", [False, True])
    @pytest.mark.parametrize(
        "factors", [(True, True), (True, False), (False, True), (False, False)]
    )
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_with_a_velocity(self, form, coupled, low, factors, shape):
        w, d, h, s, c = operands(*shape)
        s, c = (x if given else None for x, given in zip((s, c), factors, strict=True))
        velocity = torch.randn(w.shape)
        v = truth_of(velocity, d, h, s, c, -1.0, 0.8, low)
        left = s.double()[:, None] if coupled and s is not None else 1.0
        right = c.double() if coupled and c is not None else 1.0
        truth = 0.9 * w.double() - 0.05 * left * v * right
        rates = ONE * 0.05, ONE * 0.9
        scaled_gemm_.on(form)(w, d, h, s, c, *rates, velocity, ONE * 0.8, coupled, low)
        assert_near(velocity, v, shape[2])
        assert_near(w, truth, shape[2])

    def test_bfloat16_is_near_the_product_of_what_was_rounded(self):
        w, d, h, *_ = operands(300, 200, 129)
        exact = -(d.double().T @ h.double())
        moved = torch.zeros_like(w)
        scaled_gemm_(moved, d, h, None, None, ONE, ONE, bfloat16=True)
        error = (moved.double() - exact).norm() / exact.norm()
        assert 1e-4 < error < 2**-8

    @pytest.mark.parametrize("engine", [1, 2, 3])
    @pytest.mark.parametrize("rounded", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_engine(self, engine, rounded, shape):
        kernels = library()
        if kernels is None:
            pytest.skip("no C++ compiler on this machine")
        w, d, h, s, c = operands(*shape, torch.bfloat16 if rounded else torch.float32)
        truth = truth_of(w, d, h, s, c, 0.05, 0.9, engine < 3)
        start = w.clone()
        done = kernels.neurms_update_gemm(
            addresses([w, None, d, h, s, c]),
            *(*w.shape, len(d), rounded, 0.05, 0.9, 0.0, False, engine, 2),
        )
        if not done:
            assert torch.equal(w, start)
            if rounded and engine == 3:
                return
            pytest.skip(f"this processor has no engine {engine}")
        assert_near(w, truth, shape[2])

    @pytest.mark.parametrize("low", [False, True])
    def test_threads_do_not_change_it(self, low):
        results = []
        before = torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            w, *rest = operands(300, 200, 129)
            results.append(scaled_gemm_(w, *rest, ONE, ONE, bfloat16=low))
        torch.set_num_threads(before)
        if low or wide_float32():
            assert torch.equal(*results)
        else:
            torch.testing.assert_close(*results)

    @pytest.mark.parametrize("low", [False, True])
    def test_a_bad_number_shows(self, low):
        w, d, h, s, c = operands(300, 200, 129)
        d[7, 11] = float("nan")
        h[100, 150] = float("inf")
        scaled_gemm_(w, d, h, s, c, ONE, ONE, bfloat16=low)
        assert w[11].isnan().all()
        assert not w[:, 150].isfinite().any()
        others = w[torch.arange(300) != 11][:, torch.arange(200) != 150]
        assert others.isfinite().all()

    def test_choice_goes_by_what_is_stored(self):
        if not bfloat16_engine():
            pytest.skip("no engine for bfloat16 on this processor")
        w, d, h, s, c = operands(300, 200, 129)
        rest = ONE, ONE, None, None, False, True
        assert _multiplies(w, d, h, s, c, *rest)
        assert _multiplies(w, d.bfloat16(), h.bfloat16(), s, None, *rest)
        assert _multiplies(w, d, h, s, c, ONE, ONE, w.clone(), ONE, True, True)
        for others in (
            (w, d.bfloat16(), h, s, c),
            (w.double(), d, h, s, c),
            (w, d.T.contiguous().T, h, s, c),
            (w, d[:0], h[:0], s, c),
        ):
            assert not _multiplies(*others, *rest)
        assert not _multiplies(w, d, h, s, c, ONE, ONE, w.T, ONE, False, True)

    @pytest.mark.parametrize("wide", [False, True])
    def test_float32_goes_to_vectors_where_they_are_wider(self, wide, monkeypatch):
        monkeypatch.setattr("neurms.compiled.gemm.wide_float32", lambda: wide)
        w, d, h, s, c = operands(300, 200, 129)
        assert _multiplies(w, d, h, s, c, ONE, ONE) is wide
        assert _multiplies(w, d, h, None, None, ONE, ONE, w.clone(), ONE, True) is wide
        for others in (
            (w, d.bfloat16(), h.bfloat16(), s, c),
            (w, d.bfloat16(), h, s, c),
            (w.double(), d, h, s, c),
            (w, d, h, s.double(), c),
            (w, d.T.contiguous().T, h, s, c),
            (w[:31], d[:, :31].contiguous(), h, s[:31], c),
            (w, d[:0], h[:0], s, c),
        ):
            assert not _multiplies(*others, ONE, ONE)
