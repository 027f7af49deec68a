"""Small models, batches and training loops for the tests of NeuRMS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neurms import NeuRMS

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def wide() -> nn.Module:
    """A middle layer large enough for native kernels, beside which the others run natively too."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 200), nn.Tanh(), nn.Linear(200, 256), nn.ReLU(), nn.Linear(256, 3)
    )


def sequence() -> nn.Module:
    """Linear layers on (batch, tokens, features)."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))


def cnn() -> nn.Module:
    """Grouped, depthwise, strided, dilated."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=6, stride=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(6, 4, 2, dilation=2),
        MeanOverPositions(),
        nn.Linear(4, 3),
    )


def transposed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 2, bias=False),
        MeanOverPositions(),
    )


def signal() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose1d(6, 3, 3, stride=2),
        MeanOverPositions(),
    )


def volume() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 1, 3), stride=(1, 2, 1), groups=2),
        nn.Tanh(),
        nn.ConvTranspose3d(4, 3, 2),
        MeanOverPositions(),
    )


def images(rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(rows, 4, 7, 7, generator=generator),
        torch.randint(0, 3, (rows,), generator=generator),
    )


def vectors(rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scales = torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0])
    return (
        torch.randn(rows, 5, generator=generator) * scales,
        torch.randint(0, 3, (rows,), generator=generator),
    )


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 6, 5, generator=generator), torch.randint(0, 3, (4, 6))


def signals() -> tuple[Tensor, Tensor]:
    x, y = images()
    return x.flatten(2), y


def volumes() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 2, 4, 5, 4, generator=generator), torch.tensor([0, 2, 1])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, vectors),
    "sequence": (sequence, tokens),
    "cnn": (cnn, images),
    "transposed": (transposed, images),
    "signal": (signal, signals),
    "volume": (volume, volumes),
}


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    scores = model(x)
    return nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), y.reshape(-1))


def batches(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return ``count`` batches for :func:`mlp`."""
    x, y = vectors(count * rows)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    loss: Loss = cross_entropy,
) -> list[float]:
    """Take one step for each batch; return the losses."""
    losses = []
    for x, y in data:
        value = loss(model, x, y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def pair(make: Callable[[], nn.Module] = mlp, **settings: Any) -> tuple[nn.Module, NeuRMS]:
    """Return a model and its optimizer."""
    model = make()
    return model, NeuRMS(model, **{"variant": "U", **{"lr": 0.05, **settings}})


def snapshot(model: nn.Module, optimizer: NeuRMS) -> dict[str, Any]:
    """Return copies of weights, state and pending statistics."""
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "state": [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
            for p in model.parameters()
            if p in optimizer.state
        ],
        "pending": [
            (layer.pending.units, layer.pending.features, layer.pending.rows)
            for layer in optimizer.layers
        ],
    }


def assert_same(first: Any, second: Any) -> None:
    """Assert bit-for-bit equality of nested containers of tensors and numbers (NaN equals NaN)."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


def assert_close_models(first: nn.Module, second: nn.Module, rtol: float) -> None:
    """Assert that parameters agree to ``rtol`` of each tensor's largest entry."""
    pairs = zip(first.named_parameters(), second.parameters(), strict=True)
    for (name, a), b in pairs:
        a, b = a.detach().double(), b.detach().double()
        worst, largest = float((a - b).abs().max()), float(a.abs().max())
        assert worst <= rtol * largest, f"{name}: {worst / largest:.1e} apart"
