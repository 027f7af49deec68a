"""Models, batches and loops for rules whose gradients enter their momentum in backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neurms import LARS, RMNP, Muon, Nora
from neurms.core.optimizers.momentum_first import MomentumFirst

RULES: dict[str, Callable[..., MomentumFirst]] = {
    "rmnp": RMNP,
    "muon": Muon,
    "nora": Nora,
    "lars": LARS,
}
AVERAGES = ("rmnp", "muon", "nora")
"""Rules to which a batch may come in parts."""


def network(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """Layers below and above the size from which kernels are native; a norm; an odd convolution."""
    torch.manual_seed(1)
    layers = [
        nn.Conv1d(2, 5, 3),
        nn.Flatten(),
        nn.Linear(30, 200, bias),
        nn.Tanh(),
        nn.Linear(200, 200, bias),
        nn.LayerNorm(200),
        nn.Tanh(),
        nn.Linear(200, 4, bias),
    ]
    return nn.Sequential(*layers).to(dtype)


LINEAR = ("2.weight", "4.weight", "7.weight")


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The data of one step, the same in every run."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(12, 2, 8, generator=generator).to(dtype)
    return inputs, torch.randint(4, (12,), generator=generator)


def made(name: str, model: nn.Module, **settings: Any) -> MomentumFirst:
    """A rule without Nesterov's look-ahead, with the model's head under it."""
    defaults = {"lr": 0.02, "momentum": 0.8, "head": "rule", "nesterov": False}
    if name == "lars":
        defaults["lr"] = 1.0
    return RULES[name](model, **{**defaults, **settings})


def backward(model: nn.Module, step: int, parts: int = 1) -> None:
    """Take a step's backward, its batch in parts."""
    dtype = next(model.parameters()).dtype
    inputs, targets = batch(step, dtype)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        (nn.functional.cross_entropy(model(x).double(), y) / parts).backward()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], parts: int = 1
) -> None:
    """Train on :func:`batch` for the given step numbers."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, parts)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Copies of all parameters and of all state."""
    state = {n: dict(optimizer.state.get(p, {})) for n, p in model.named_parameters()}
    return copy.deepcopy((dict(model.state_dict()), state))


def assert_same(one: Any, other: Any) -> None:
    """Raise unless two snapshots agree bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_close(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    """Raise unless the parameters of two models are nearly the same."""
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def pair(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> list[Any]:
    """Return two equal models with their optimizers: in backward, and at the step."""
    made_of = []
    for update in ("backward", "step"):
        model = network(dtype)
        made_of.append((model, made(name, model, update=update, **settings)))
    return made_of
