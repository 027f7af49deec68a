"""What a generic case works on: a rule with settings, and models small enough for hundreds."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CASES", "Case", "Subject", "case", "same"]


@dataclass(frozen=True)
class Subject:
    """A rule with settings.

    Args:
        rule: Its name.
        info: What torch's machinery knows of it.
        settings: Settings, as one of the info's inputs has them.
        description: The input's description.
    """

    rule: str
    info: Any
    settings: dict[str, Any] = field(default_factory=dict)
    description: str = ""

    @property
    def reads_modules(self) -> bool:
        """Whether the rule wants a model and no parameters."""
        return bool(self.info.optim_cls.needs_modules)

    @property
    def reads_errors(self) -> bool:
        """Whether error signals enter, which come scaled where the loss is."""
        settings = {**self.info.optim_cls.default_settings(), **self.settings}
        return self.reads_modules and settings["variant"] != "P"

    def model(self, bias: bool = True) -> nn.Sequential:
        """Return a model of two layers, the same one each time."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 10, bias=bias))

    def optimizer(self, model: nn.Module, **more: Any) -> Any:
        """Return an optimizer of a model's parameters, or of the model."""
        params: Any = model if self.reads_modules else list(model.parameters())
        return self.info.optim_cls(params, **{**deepcopy(self.settings), **more})

    def trained(self, steps: int = 3, **more: Any) -> tuple[nn.Module, Any]:
        """Return a model and its optimizer after some steps."""
        model = self.model()
        optimizer = self.optimizer(model, **more)
        self.train(model, optimizer, steps)
        return model, optimizer

    def train(self, model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
        """Take steps whose inputs depend on their numbers alone."""
        for step in range(start, start + steps):
            optimizer.step(lambda step=step: self.loss(model, optimizer, step))

    def loss(self, model: nn.Module, optimizer: Any, step: int = 0) -> Tensor:
        """Return the loss after its backward pass."""
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        inputs = torch.randn(4, 5, generator=generator)
        loss: Tensor = model(inputs).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss


@dataclass(frozen=True)
class Case:
    """A generic case.

    Args:
        run: Raises unless the rule does what torch's optimizers do.
        once: Whether it is run with default settings only.
    """

    run: Callable[[Subject], None]
    once: bool = False

    def applies(self, subject: Subject) -> bool:
        """Return whether the case is for these settings."""
        return not self.once or subject.description == "default"


CASES: dict[str, Case] = {}


def case(*, once: bool = False) -> Callable[[Callable[[Subject], None]], Callable[..., None]]:
    """Register a function as a case under its own name."""

    def register(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CASES[run.__name__] = Case(run, once)
        return run

    return register


def same(a: nn.Module, b: nn.Module) -> None:
    """Raise unless two models have the same numbers."""
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
