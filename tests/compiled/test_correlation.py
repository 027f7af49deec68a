import pytest
import torch

from neurms.compiled.correlation import correlation_from_sums, correlation_sums


def truth_of(g, v, u):
    """The five sums and numpy-style Pearson correlation, with the outer product formed."""
    x = g.double().square()
    if g.dim() == 4:
        groups, units, inputs, taps = g.shape
        y = torch.einsum("gu,gf->guf", v.double().view(groups, -1), u.double().view(groups, -1))
        y = y[..., None].expand(groups, units, inputs, taps)
    else:
        y = torch.outer(v.double(), u.double())
    sums = torch.stack([t.sum() for t in (x, x * x, y, y * y, x * y)])
    pair = torch.stack((x.flatten(), y.flatten()))
    return sums, torch.corrcoef(pair / pair.mean(1, keepdim=True))[0, 1]


def check(form, g, v, u):
    sums, rho = truth_of(g, v, u)
    result = form(g, v, u)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, sums, rtol=1e-10, atol=0)
    torch.testing.assert_close(correlation_from_sums(result, g.numel()), rho, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 6), (2, 3, 4, 5)])
def test_against_the_outer_product(backend, shape):
    groups = shape[0] if len(shape) == 4 else 1
    v, u = (
        torch.rand(groups * shape[-3] if groups > 1 else 9),
        torch.rand(groups * shape[2] if groups > 1 else 6),
    )
    check(correlation_sums.on(backend), torch.randn(shape), v, u)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(patient_backend, dtype):
    check(
        correlation_sums.on(patient_backend),
        torch.randn(9, 6).to(dtype),
        torch.rand(9),
        torch.rand(6),
    )


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_scales(backend, size):
    g = torch.randn(9, 6) * size
    check(correlation_sums.on(backend), g, torch.rand(9) * size, torch.rand(6))


def test_any_strides(patient_backend):
    g = torch.randn(6, 9).t()
    check(correlation_sums.on(patient_backend), g, torch.rand(9), torch.rand(6))


@pytest.mark.parametrize("shape", [(33, 7), (1, 40, 3, 2), (40, 1, 3, 2)])
@pytest.mark.usefixtures("small_tiles")
def test_tiles(shape):
    if len(shape) == 4:
        v, u = torch.rand(shape[0] * shape[1]), torch.rand(shape[0] * shape[2])
    else:
        v, u = torch.rand(shape[0]), torch.rand(shape[1])
    check(correlation_sums.eager, torch.randn(shape), v, u)


def test_a_large_gradient(patient_backend):
    g = torch.randn(1201, 1003)
    check(correlation_sums.on(patient_backend), g, torch.rand(1201), torch.rand(1003))


def test_row_blocks_add_up():
    g, v, u = torch.randn(9, 6), torch.rand(9), torch.rand(6)
    parts = correlation_sums(g[:4], v[:4], u) + correlation_sums(g[4:], v[4:], u)
    torch.testing.assert_close(parts, correlation_sums(g, v, u))


def test_a_factored_gradient_correlates_fully(backend):
    a, b = torch.rand(9) + 0.1, torch.rand(6) + 0.1
    sums = correlation_sums.on(backend)(torch.outer(a, b), a.square(), b.square())
    torch.testing.assert_close(correlation_from_sums(sums, 54).item(), 1.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("g", "v"),
    [
        (torch.zeros(7, 5), torch.rand(7)),
        # The variance of this constant comes out as 1e-16 of its square, not as 0.
        (torch.full((7, 5), 0.1), torch.rand(7)),
        (torch.randn(7, 5), torch.full((7,), 0.1)),
        (torch.zeros(0, 5), torch.zeros(0)),
    ],
    ids=["zero gradient", "constant gradient", "constant moments", "empty"],
)
def test_undefined_is_nan(backend, g, v):
    sums = correlation_sums.on(backend)(g, v, torch.ones(5))
    assert bool(correlation_from_sums(sums, g.numel()).isnan())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="every feature"):
        correlation_sums.eager(torch.ones(3, 2), torch.ones(3), torch.ones(3))
