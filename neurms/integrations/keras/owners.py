"""Which layer a variable belongs to, and which model an optimizer trains.

Keras hands an optimizer a list of variables, which know neither their layer nor their model.
Orientation and routing need the layer, taps need both. What links them is the layer's own list of
variables, so the living layers are looked through, once, when the optimizer is built.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

__all__ = ["Surroundings", "innermost", "leaves"]

_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


@dataclass(frozen=True)
class Surroundings:
    """The layers and models around an optimizer's variables.

    Args:
        owners: Variable id -> layers that have it among their own variables.
        attention: Ids of layers that are projections of an attention layer.
        models: Models that hold all of the variables. First comes the one that the optimizer's
            names and head are taken from: one compiled with it, else the smallest.
        names: Variable id -> names of the layers around it, from the model inwards, and its own.
    """

    owners: Mapping[int, Sequence[Any]]
    attention: frozenset[int]
    models: Sequence[Any]
    names: Mapping[int, str]

    @classmethod
    def of(cls, variables: Sequence[Any], optimizer: Any) -> Surroundings:
        """Look through the living layers for those that own ``variables``.

        Raises:
            RuntimeError: ``gc.freeze()`` hides the layers, without which every kernel would be
                taken for a bare variable.
        """
        wanted = {id(variable) for variable in variables}
        layers = _living_layers()
        owners: dict[int, list[Any]] = {}
        for layer in layers:
            for variable in _own(layer):
                owners.setdefault(id(variable), []).append(layer)
        if gc.get_freeze_count() and not wanted <= owners.keys():
            raise RuntimeError(
                "gc.freeze() hides the layers that the optimizer's variables belong to; build the "
                "optimizer (optimizer.build(model.trainable_variables)) before gc.freeze()"
            )
        blocks = (layer for layer in layers if isinstance(layer, _ATTENTION))
        attention = (id(part) for block in blocks for part in _inside(block))
        models = [m for m in layers if isinstance(m, keras.Model) and _holds(m, wanted)]
        models.sort(key=lambda model: (not _trains(model, optimizer), *_size(model)))
        names: dict[int, str] = {}
        for model in models[:1]:
            _name(model, "", names)
        return cls(owners, frozenset(attention), models, names)

    def owners_of(self, variable: Any) -> Sequence[Any]:
        """Return the layers that own a variable; none for a bare one."""
        return self.owners.get(id(variable), ())

    def name_of(self, variable: Any) -> str:
        """Return a variable's name in the model, which unlike its path a saved file keeps.

        The path of a Sequential model's variable begins with the model's name until the model has
        been saved and loaded.
        """
        return self.names.get(id(variable), variable.path)

    def variables(self, given: Sequence[Any]) -> list[Any]:
        """Return the trained model's variables, frozen ones included; without one, ``given``."""
        if not self.models:
            return list(given)
        return [variable for variable in self.models[0].weights if self.owners_of(variable)]


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside any LossScaleOptimizer around it."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def leaves(optimizer: Any, scaler: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield the optimizers that move variables inside of what a model was compiled with.

    Args:
        optimizer: An optimizer, a LossScaleOptimizer or MultiOptimizer around some, or None.
        scaler: The LossScaleOptimizer around it.

    Yields:
        Each optimizer, and what knows the scale of its loss: the LossScaleOptimizer, or itself.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        yield from leaves(optimizer.inner_optimizer, optimizer)
    elif isinstance(parts := getattr(optimizer, "optimizers", None), Sequence):
        # A MultiOptimizer, which Keras has from 3.13 on.
        for part in parts:
            yield from leaves(part, scaler)
    elif optimizer is not None:
        yield optimizer, scaler or optimizer


def _trains(model: Any, optimizer: Any) -> bool:
    return any(leaf is optimizer for leaf, _ in leaves(getattr(model, "optimizer", None)))


def _size(model: Any) -> tuple[Any, ...]:
    """Return what orders models: fewer variables first, then the outermost; alike in every run.

    The garbage collector lists objects in an order that changes from run to run.
    """
    names = [layer.name for layer in model._flatten_layers()]
    return (len(model.weights), -len(names), names)


def _living_layers() -> list[Any]:
    kinds: dict[type, bool] = {}
    layers = []
    for thing in gc.get_objects():
        # type(), not isinstance, which would ask lazy module proxies for their __class__.
        kind = type(thing)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, keras.layers.Layer)
        if kinds[kind]:
            layers.append(thing)
    return layers


def _own(layer: Any) -> Iterable[Any]:
    """Return the variables made to be trained that are the layer's own, now frozen or not."""
    found: Iterable[Any] = vars(layer).get("_trainable_variables", ())
    return found


def _inside(layer: Any) -> Iterable[Any]:
    found: Iterable[Any] = layer._flatten_layers(include_self=False)
    return found


def _name(layer: Any, prefix: str, names: dict[int, str]) -> None:
    for variable in _own(layer):
        names.setdefault(id(variable), prefix + variable.name)
    for child in layer._layers:
        _name(child, f"{prefix}{child.name}/", names)


def _holds(model: Any, wanted: set[int]) -> bool:
    return bool(wanted) and wanted <= {id(v) for v in model.weights}
