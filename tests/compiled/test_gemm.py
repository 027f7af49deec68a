import pytest
import torch
from torch import nn

from neurms.compiled.gemm import accumulate_gemm_, update_gemm_
from neurms.compiled.update import scaled_update_


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


def test_accumulate_gemm_then_update_is_torchs_momentum():
    layer = nn.Linear(4, 6, bias=False)
    w, velocity = layer.weight.detach().clone(), torch.zeros(6, 4)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        d, h = torch.randn(9, 6), torch.randn(9, 4)
        layer.weight.grad = d.t() @ h
        sgd.step()
        accumulate_gemm_(velocity, d, h, 0.9)
        scaled_update_(w, velocity, None, None, torch.tensor(0.1))
    torch.testing.assert_close(w, layer.weight.detach())
