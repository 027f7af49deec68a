"""Faults that strike in the middle of a training step, the same for every front end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurms.core.optimizers import fallback
from neurms.core.unitwise import moves

Act = Callable[[Tensor], Tensor]


class Saboteur:
    """What a layer of the network does to what passes; nothing unless a fault is under way."""

    def __init__(self) -> None:
        self.act: Act | None = None

    def __call__(self, passing: Tensor) -> Tensor:
        """Return what goes on."""
        return passing if self.act is None else self.act(passing)


@dataclass
class Parts:
    """Where a network can be hurt."""

    middle: Saboteur = field(default_factory=Saboteur)
    end: Saboteur = field(default_factory=Saboteur)
    model: Any = None
    weight: Tensor | None = None
    """A parameter that has a gradient."""


class TrainingFault(Exception):  # noqa: N818
    """What the sabotaged model raises."""


def _raise(_: Any = None) -> Any:
    raise TrainingFault("something went wrong in the model")


def _press(_: Any = None) -> Any:
    signal.raise_signal(signal.SIGINT)


def _poisoned(value: float) -> Act:
    def act(passing: Tensor) -> Tensor:
        return passing + torch.zeros_like(passing).index_fill(0, torch.tensor(0), value)

    return act


def _in_forward(what: Act) -> Act:
    return lambda passing: (what(passing), passing)[1]


def _in_backward(what: Act) -> Act:
    def act(passing: Tensor) -> Tensor:
        # A tensor of its own, so that no tap's hook sits on the same one.
        passing = passing * 1.0
        passing.register_hook(what)
        return passing

    return act


@contextmanager
def _acting(saboteur: Saboteur, act: Act) -> Iterator[None]:
    saboteur.act = act
    try:
        yield
    finally:
        saboteur.act = None


@contextmanager
def _bad_gradient(parts: Parts) -> Iterator[None]:
    assert parts.weight is not None
    handle = parts.weight.register_hook(lambda gradient: gradient * float("nan"))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _interrupted_step(parts: Parts) -> Iterator[None]:
    places = [(fallback, "adamw_update_"), (moves, "write_moves_")]
    kept = [getattr(module, name) for module, name in places]

    def pressing(original: Callable[..., Any], pressed: list[bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not pressed:
                pressed.append(True)
                _press()
            return original(*args, **kwargs)

        return call

    pressed: list[bool] = []
    for (module, name), original in zip(places, kept, strict=True):
        setattr(module, name, pressing(original, pressed))
    try:
        yield
    finally:
        for (module, name), original in zip(places, kept, strict=True):
            setattr(module, name, original)


@contextmanager
def _hooks_removed(parts: Parts) -> Iterator[None]:
    for module in parts.model.modules() if isinstance(parts.model, nn.Module) else ():
        module._forward_hooks.clear()
    yield


FAULTS: dict[str, Callable[[Parts], Any]] = {
    "NaN in the loss": lambda parts: _acting(parts.end, _poisoned(float("nan"))),
    "infinity in the loss": lambda parts: _acting(parts.end, _poisoned(float("inf"))),
    "NaN in a gradient": _bad_gradient,
    "infinity in D": lambda parts: _acting(
        parts.middle, _in_backward(lambda d: d.index_fill(0, torch.tensor(0), float("inf")))
    ),
    "NaN in H": lambda parts: _acting(parts.middle, _poisoned(float("nan"))),
    "exception in forward": lambda parts: _acting(parts.middle, _raise),
    "exception in backward": lambda parts: _acting(parts.middle, _in_backward(_raise)),
    "Ctrl-C in forward": lambda parts: _acting(parts.middle, _in_forward(_press)),
    "Ctrl-C in backward": lambda parts: _acting(parts.middle, _in_backward(_press)),
    "Ctrl-C in the step": _interrupted_step,
    "hooks removed by the user": _hooks_removed,
}
"""What strikes while a step runs; each is a context that surrounds the step."""
