import pytest
import torch

from neurms.compiled._forms import has_cpp_compiler

inductor = pytest.mark.skipif(not has_cpp_compiler(), reason="inductor needs a C++ compiler")


@pytest.fixture(params=["eager", "torchscript", pytest.param("inductor", marks=inductor)])
def backend(request):
    """Every backend: for the one test of a kernel that fixes its meaning."""
    return request.param


@pytest.fixture(
    params=[
        "eager",
        "torchscript",
        pytest.param("inductor", marks=[inductor, pytest.mark.slow]),
    ]
)
def patient_backend(request):
    """Every backend, inductor only in the slow suite: for tests over many dtypes and shapes."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Eager kernels walk anything above 64 elements in tiles of at most 32."""
    monkeypatch.setattr("neurms.compiled._tiles.tile_elements", lambda: 32)


@pytest.fixture
def lr():
    return torch.tensor(0.05)
