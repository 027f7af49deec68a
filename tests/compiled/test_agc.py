import pytest
import torch

from neurms.compiled.agc import row_clip_


def truth_of(update, weight, agc, floor=1e-3):
    rows, targets = update.double().flatten(0, -2), weight.double().flatten(0, -2)
    if update.dim() == 4:
        rows = update.double().flatten(0, 1).flatten(1)
        targets = weight.double().flatten(0, 1).flatten(1)
    clipped = [
        row * min(1.0, agc * max(target.norm().item(), floor) / max(row.norm().item(), 1e-300))
        for row, target in zip(rows, targets, strict=True)
    ]
    return torch.stack(clipped).reshape(update.shape)


@pytest.mark.parametrize("shape", [(8, 5), (2, 4, 3, 2)])
def test_against_float64(backend, shape):
    update, weight = torch.randn(shape), torch.randn(shape)
    update[:, 0] *= 0.01
    truth = truth_of(update, weight, 0.3)
    kept = weight.clone()
    assert 0 < int((truth == update.double()).sum()) < update.numel()
    result = row_clip_.on(backend)(update, weight, 0.3)
    assert result.data_ptr() == update.data_ptr()
    torch.testing.assert_close(update.double(), truth, rtol=1e-6, atol=0)
    assert torch.equal(weight, kept)


def test_zero_rows(backend):
    update, weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 2)
    row_clip_.on(backend)(update, weight, 0.5, 1e-2)
    torch.testing.assert_close(update, torch.tensor([[0.0, 0.0], [3e-3, 4e-3]]))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_leave_float32(patient_backend, size):
    update, weight = torch.randn(4, 3) * size, torch.randn(4, 3)
    truth = truth_of(update, weight, 0.1)
    row_clip_.on(patient_backend)(update, weight, 0.1)
    torch.testing.assert_close(update.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(patient_backend, dtype):
    update, weight = torch.randn(4, 3).to(dtype), torch.randn(4, 3).to(dtype)
    truth = truth_of(update, weight, 0.1)
    row_clip_.on(patient_backend)(update, weight, 0.1)
    assert update.dtype == dtype
    rtol = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(update.double(), truth, rtol=rtol, atol=0)


@pytest.mark.parametrize("shape", [(33, 7), (1, 40, 3, 2), (40, 1, 3, 2)])
@pytest.mark.usefixtures("small_tiles")
def test_tiles(shape):
    update, weight = torch.randn(shape), torch.randn(shape)
    truth = truth_of(update, weight, 0.3)
    row_clip_.eager(update, weight, 0.3)
    torch.testing.assert_close(update.double(), truth, rtol=1e-6, atol=0)


def test_nan_rows_stay_visible(backend):
    update = torch.tensor([[torch.nan, 1.0], [3.0, 4.0]])
    row_clip_.on(backend)(update, torch.ones(2, 2), 0.5)
    assert bool(update[0].isnan().all())
    assert bool(update[1].isfinite().all())


def test_shapes_are_refused():
    with pytest.raises(ValueError, match="update of shape"):
        row_clip_.eager(torch.ones(2, 3), torch.ones(3), 0.1)
