"""Small models, and training steps that a preconditioner is tried in."""

import torch
from torch import nn
from torch.nn import functional as F


def mlp(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def cnn(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(3 * 9, 3),
    ).to(dtype)


def language_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)).double()


def batches(model: nn.Module, steps: int = 4):
    generator = torch.Generator().manual_seed(2)
    first = next(model.parameters())
    shape = (6, 2, 4, 4) if first.ndim == 4 else (6, 5)
    for _ in range(steps):
        inputs = torch.randn(shape, dtype=first.dtype, generator=generator)
        yield inputs, torch.randint(0, 3, (6,), generator=generator)


def loss_of(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained_beside(model, optimizer, preconditioner, steps: int = 4) -> nn.Module:
    for batch in batches(model, steps):
        loss_of(model, batch).backward()
        assert preconditioner.precondition_(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(model, optimizer, steps: int = 4) -> nn.Module:
    for batch in batches(model, steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(first: nn.Module, second: nn.Module, **tolerance) -> None:
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def assert_same_state(first: dict, second: dict) -> None:
    assert first["skipped_steps"] == second["skipped_steps"]
    torch.testing.assert_close(first["layers"], second["layers"], rtol=0.0, atol=0.0)


def sgd(model: nn.Module, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, **settings)
