"""Taps that live as long as a training step, and no longer.

Keras tells an optimizer neither when training begins nor when it ends or fails. Its trainer does
make a function of one step, though, and calls it in ``fit`` and in ``train_on_batch``. Wrapped,
that function has taps attached before a step and taken off behind it, whatever happens in between:
no evaluation sees them, no saved model holds them, no failure leaves them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import keras

from neurms.integrations.keras.owners import leaves

__all__ = ["TapsSteps", "loss_scale_of", "tap_training"]

_MAKER = "make_train_function"
_FEW = 100
"""Entries of a list or dict up to which it is searched for optimizers, at every step."""


@runtime_checkable
class TapsSteps(Protocol):
    """An optimizer that has taps to attach for the length of a step."""

    def training_step(self, scaler: Any) -> AbstractContextManager[None]:
        """Attach the taps; ``scaler`` knows the scale of the loss, see :func:`.owners.leaves`."""


class TappedStep:
    """A model's train function with the taps of its optimizers around it."""

    def __init__(self, model: Any, step: Callable[[Any], Any]) -> None:
        self._model = weakref.ref(model)
        self._step = step

    def __call__(self, data: Any) -> Any:
        """Run one training step."""
        with ExitStack() as taps:
            for optimizer, scaler in _optimizers(self._model()):
                taps.enter_context(optimizer.training_step(scaler))
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


def _optimizers(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each optimizer that the model holds and that taps, with what scales its loss.

    A GAN has two, as attributes or in a list, a MultiOptimizer any number. A train step of the
    user's own may also use the optimizers that parts of the model were compiled with.
    """
    if model is None:
        return
    holders = [model]
    if getattr(model.train_step, "__func__", None) is not keras.Model.train_step:
        holders += [m for m in model._flatten_layers(include_self=False) if _is_model(m)]
    seen = set()
    for holder in holders:
        for optimizer, scaler in _held(list(vars(holder).values())):
            if isinstance(optimizer, TapsSteps) and id(optimizer) not in seen:
                seen.add(id(optimizer))
                yield optimizer, scaler


def _is_model(layer: Any) -> bool:
    return isinstance(layer, keras.Model)


def _held(values: Iterable[Any], depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """Yield the optimizers among values, and in their lists and dicts unless those hold much."""
    for value in values:
        if isinstance(value, keras.optimizers.Optimizer):
            yield from leaves(value)
        elif depth and isinstance(value, (dict, list, tuple, set)) and len(value) <= _FEW:
            parts = value.values() if isinstance(value, dict) else value
            yield from _held(list(parts), depth - 1)
