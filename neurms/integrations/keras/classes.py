"""One registered Keras optimizer class for each rule of the library.

They are made from the registry, so that a new rule is a Keras optimizer without a line here. Each
is an attribute of this module under its torch name, ``neurms>NAME`` to Keras's serialization.
"""

from __future__ import annotations

from typing import Any

import keras

from neurms.core.optimizers.registry import available, is_torch, optimizer_class
from neurms.integrations.keras.neurms import TappedOptimizer
from neurms.integrations.keras.optimizer import NeurmsOptimizer
from neurms.integrations.keras.settings import needs_taps

__all__ = ["CLASSES", "keras_class"]


def _made(rule: str) -> type[NeurmsOptimizer]:
    torch_class = optimizer_class(rule)
    base = TappedOptimizer if needs_taps(rule) else NeurmsOptimizer
    docstring = f"{torch_class.__name__} for Keras; its settings are those of the torch optimizer."
    body = {"rule": rule, "__doc__": docstring, "__module__": __name__}
    made: Any = type(torch_class.__name__, (base,), body)
    registered: type[NeurmsOptimizer] = keras.saving.register_keras_serializable("neurms")(made)
    return registered


CLASSES = {rule: _made(rule) for rule in available() if not is_torch(rule)}
"""snake_case name -> class."""

# Keras looks a class up by its module and name, too.
globals().update({made.__name__: made for made in CLASSES.values()})


def keras_class(rule: str) -> type[NeurmsOptimizer]:
    """Return the Keras optimizer class of a rule.

    Raises:
        ValueError: No rule has that name.
    """
    if rule not in CLASSES:
        raise ValueError(f"name={rule!r} is not known; choose one of {available()}")
    return CLASSES[rule]
