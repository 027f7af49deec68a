"""Taps that live as long as a training step, and no longer.

Keras tells an optimizer neither when training begins nor when it ends or fails. Its trainer does
make a function of one step, though, and calls it in ``fit`` and in ``train_on_batch``. Wrapped,
that function has taps attached before a step and taken off behind it, whatever happens in between:
no evaluation sees them, no saved model holds them, no failure leaves them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import keras

from neurms.integrations.keras.owners import innermost

__all__ = ["TapsSteps", "loss_scale_of", "tap_training"]

_MAKER = "make_train_function"


@runtime_checkable
class TapsSteps(Protocol):
    """An optimizer that has taps to attach for the length of a step."""

    def training_step(self, wrapper: Any) -> AbstractContextManager[None]:
        """Attach the taps; ``wrapper`` is the optimizer as the model has it."""


class TappedStep:
    """A model's train function with the taps of its optimizers around it."""

    def __init__(self, model: Any, step: Callable[[Any], Any]) -> None:
        self._model = weakref.ref(model)
        self._step = step

    def __call__(self, data: Any) -> Any:
        """Run one training step."""
        with ExitStack() as taps:
            for wrapper in _optimizers(self._model()):
                taps.enter_context(innermost(wrapper).training_step(wrapper))
            return self._step(data)


def tap_training(model: Any) -> None:
    """Have the model's train functions, the present and the future ones, run with taps.

    The model keeps one attribute of its own for it, which does nothing for other optimizers.
    """
    if _MAKER not in vars(model):
        # A bound method, so that no copy of the model trains the original. Past Keras's tracking.
        vars(model)[_MAKER] = MethodType(_make_train_function, model)
    if getattr(model, "train_function", None) is not None:
        _wrap(model)


def loss_scale_of(wrapper: Any) -> Any:
    """Return the factor of the loss now: a LossScaleOptimizer's, or ``loss_scale_factor``, or 1."""
    if isinstance(wrapper, keras.optimizers.LossScaleOptimizer):
        return wrapper.dynamic_scale.value if wrapper.built else float(wrapper.initial_scale)
    return float(wrapper.loss_scale_factor or 1.0)


def _make_train_function(model: Any, force: bool = False) -> Any:
    type(model).make_train_function(model, force)
    return _wrap(model)


def _wrap(model: Any) -> Any:
    step = model.train_function
    if not isinstance(step, TappedStep):
        model.train_function = TappedStep(model, step)
    return model.train_function


def _optimizers(model: Any) -> Iterator[Any]:
    """Yield the optimizers that the model holds (a GAN's has two) and that tap."""
    if model is None:
        return
    held = (v for v in list(vars(model).values()) if isinstance(v, keras.optimizers.Optimizer))
    yield from (wrapper for wrapper in held if isinstance(innermost(wrapper), TapsSteps))
