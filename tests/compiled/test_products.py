"""Products by oneDNN where the processor gains by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neurms.compiled import products
from neurms.compiled.orthogonalization import newton_schulz
from neurms.compiled.products import LEAST_PRODUCTS, addmm_, product

there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not there, reason="this torch has no oneDNN")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.ravel()])[1:].view(x.shape),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Call oneDNN on any processor, and note its operands."""
    seen: list[tuple[Tensor, Tensor]] = []
    own = products._multiplied

    def noted(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x, y))
        return own(x, y)

    monkeypatch.setattr(products, "wide_float32", lambda: True)
    monkeypatch.setattr(products, "_multiplied", noted)
    return seen


def _operands(m: int = 160, k: int = 200, n: int = 144) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(m, k), torch.randn(k, n)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@needs_onednn
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_it_is_as_near_as_the_plain_product(calls: list[object], left: str, right: str) -> None:
    x, y = _operands()
    x, y = LAYOUTS[left](x), LAYOUTS[right](y)
    exact = x.double() @ y.double()
    first = product(x, y)
    assert len(calls) == 1
    assert _error(first, exact) <= 4 * _error(x @ y, exact)
    assert all(torch.equal(product(x, y), first) for _ in range(20))


@needs_onednn
@pytest.mark.parametrize("keep", [0.0, 1.0, 0.9])
@pytest.mark.parametrize("share", [1.0, -0.3])
def test_it_is_added(calls: list[object], keep: float, share: float) -> None:
    x, y = _operands()
    wide = torch.full((160, 300), torch.nan) if keep == 0 else torch.randn(160, 300)
    total = wide[:, 10:154]
    exact = share * (x.double() @ y.double())
    if keep:
        exact += keep * total.double()
    plain = total.clone().addmm_(x, y, beta=keep, alpha=share)
    assert addmm_(total, x, y, keep, share) is total
    assert len(calls) == 1
    assert _error(total, exact) <= 4 * _error(plain, exact)


@needs_onednn
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(calls: list[object], bad: float) -> None:
    x, y = _operands()
    x[3, 5] = bad
    found = product(x, y)
    assert calls
    assert not found[3].isfinite().any()
    assert found[:3].isfinite().all()
    assert found[4:].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((64, 64), (64, 64)),
        ((0, 4096), (4096, 4096)),
        ((4096, 0), (0, 4096)),
        ((1, 2048), (2048, 2048)),
        ((2048, 2048), (2048, 1)),
        ((2, 160, 200), (2, 200, 144)),
    ],
)
def test_small_thin_empty_and_batched_ones_are_plain(
    calls: list[object], shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    x, y = torch.randn(shape), torch.randn(other)
    assert torch.equal(product(x, y), x @ y)
    assert not calls


def test_other_dtypes_are_plain(calls: list[object]) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        x, y = (part.to(dtype) for part in _operands())
        assert torch.equal(product(x, y), x @ y)
    assert not calls


def test_other_processors_keep_the_plain_product(
    calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "wide_float32", lambda: False)
    x, y = _operands()
    assert x.numel() * y.shape[1] >= LEAST_PRODUCTS
    assert torch.equal(product(x, y), x @ y)
    assert not calls


def test_gradients_are_recorded_by_plain_products(calls: list[object]) -> None:
    x, y = _operands()
    x.requires_grad_()
    product(x, y).sum().backward()
    assert not calls
    torch.testing.assert_close(x.grad, y.sum(1).expand_as(x))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_torchs_flag_switches_it_off(calls: list[object]) -> None:
    x, y = _operands()
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(product(x, y), x @ y)
    assert not calls


def test_autocast_keeps_its_precision(calls: list[object]) -> None:
    x, y = _operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, y).dtype is torch.bfloat16
    assert not calls


def test_shapes_that_do_not_fit_are_refused_as_ever(calls: list[object]) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        product(torch.ones(200, 200), torch.ones(300, 200))
    assert not calls


@needs_onednn
def test_newton_schulz_takes_it_and_its_script_does_not(calls: list[object]) -> None:
    matrix = torch.randn(512, 512)
    settings = (5, 3.4445, -4.775, 2.0315)
    script = newton_schulz.on("torchscript")(matrix, *settings)
    assert not calls
    found = newton_schulz(matrix, *settings)
    assert len(calls) == 5 * (4 + 4 + 1)
    torch.testing.assert_close(found, script, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_with_gaps_is_closed_up(turned: bool) -> None:
    """OneDNN multiplies one with gaps in a plain loop: .25 s for a panel of .2 ms."""
    whole = torch.randn(6, 8)
    for part in (whole[:, :3], whole[:, ::2], whole[::2]):
        part = part.mT if turned else part
        found = products._dense(part)
        assert found.is_contiguous() or found.mT.is_contiguous()
        assert torch.equal(found, part)
    assert products._dense(whole) is whole
    turned_whole = whole.mT
    assert products._dense(turned_whole) is turned_whole
