"""One registered Keras optimizer class for each rule, whoever wrote it.

They are made from the registry, so that a new rule is a Keras optimizer without a line here. Each
is an attribute of this module: a rule of the library under its torch name, ``neurms>NAME`` to
Keras's serialization; a rule of somebody else's, whose class may be called the same, under its own
snake_case name, ``neurms>rule:NAME``. ``model.compile(optimizer="racs")`` finds the short names,
save those of Keras's own optimizers.
"""

from __future__ import annotations

from typing import Any

import keras

from neurms.core.ground.errors import meant
from neurms.core.optimizers.registry import available, optimizer_class
from neurms.core.optimizers.rules import follow, rule_names
from neurms.integrations.keras.neurms import TappedOptimizer
from neurms.integrations.keras.optimizer import NeurmsOptimizer
from neurms.integrations.keras.settings import needs_taps

__all__ = ["CLASSES", "keras_class"]

CLASSES: dict[str, type[NeurmsOptimizer]] = {}
"""snake_case name -> class."""


def _make(rule: str) -> type[NeurmsOptimizer]:
    torch_class = optimizer_class(rule)
    base = TappedOptimizer if needs_taps(rule) else NeurmsOptimizer
    docstring = f"{torch_class.__name__} for Keras; its settings are those of the torch optimizer."
    ours = torch_class.__module__.startswith("neurms.")
    # Keras and pickle look a class up by its module and name.
    name = torch_class.__name__ if ours else f"rule:{rule}"
    body = {"rule": rule, "__doc__": docstring, "__module__": __name__, "__qualname__": name}
    made: Any = type(torch_class.__name__, (base,), body)
    register = keras.saving.register_keras_serializable("neurms", name)
    registered: type[NeurmsOptimizer] = register(made)
    globals()[name] = CLASSES[rule] = registered
    if not _is_keras_own(rule):
        # What model.compile(optimizer="racs") looks names up in.
        keras.saving.get_custom_objects()[rule] = registered
    return registered


def _is_keras_own(name: str) -> bool:
    """Return whether Keras gives a short name, such as ``muon``, to an optimizer of its own."""
    try:
        return type(keras.optimizers.get(name)).__module__.startswith("keras.")
    except ValueError:
        return False


follow(_make)


def keras_class(rule: str) -> type[NeurmsOptimizer]:
    """Return the Keras optimizer class of a rule.

    Raises:
        ValueError: No rule has that name.
    """
    if rule not in rule_names():
        near = meant(rule, available())
        raise ValueError(f"name={rule!r} is not known{near}; choose one of {available()}")
    return CLASSES[rule]
