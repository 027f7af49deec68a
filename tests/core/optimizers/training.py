"""Small models and loops that the optimizer tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.registry import available, create, is_torch, optimizer_class

RULES = [name for name in available() if not is_torch(name)]
GRADIENT_RULES = [name for name in RULES if not optimizer_class(name).needs_modules]
SETTINGS = {
    "alice": {"rank": 3, "leading": 2, "interval": 2},
    "apollo": {"rank": 2, "interval": 2},
    "block_adam": {},
    "eigen_adam": {"interval": 2},
    "fira": {"rank": 2, "interval": 2},
    "galore": {"rank": 2, "interval": 2},
    "low_rank_soap": {"rank": 3, "leading": 2, "interval": 2},
    "shared_basis": {"lr": 1e-2, "rank": 2},
    "sketchy": {"rank": 2},
    "adapprox": {"rank": 2},
    "soap": {"interval": 2},
}
"""Settings that make a rule do something within a few steps of a tiny model."""


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a parameter of random numbers, 4 x 3 unless another shape is asked for."""
    return nn.Parameter(torch.randn(shape or (4, 3)).to(dtype))


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A convolution, two hidden linear layers of one shape, a norm and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.LayerNorm(6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Linear(6, 3),
    ).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The data of one step, the same in every run."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(5, 2, 4, 4, generator=generator).to(dtype)
    return inputs, torch.randint(3, (5,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range | int) -> None:
    """Train on :func:`batch` for the given step numbers."""
    dtype = next(model.parameters()).dtype
    for step in range(steps) if isinstance(steps, int) else steps:
        inputs, targets = batch(step, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs).float(), targets).backward()
        optimizer.step()


def make(name: str, model: nn.Module, **settings: object) -> PreconditionedOptimizer:
    """Make one of the library's optimizers with settings that suit :func:`small_model`."""
    optimizer = create(name, model, **{**SETTINGS.get(name, {}), **settings})
    assert isinstance(optimizer, PreconditionedOptimizer)
    return optimizer


def random_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    """Give every parameter a random gradient, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def assert_same_state(first: object, second: object) -> None:
    """Compare nested state bit for bit, types and dtypes included."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor)
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys()
        for key in first:
            assert_same_state(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert isinstance(second, (list, tuple))
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_state(a, b)
    else:
        assert first == second
