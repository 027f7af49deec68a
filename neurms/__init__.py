"""Optimizers that precondition a layer by the statistics of its units and features.

A weight is seen as a matrix of units (outputs) x features (inputs), and each method here scales or
rotates its gradient by a few vectors or small matrices kept per layer. The names below are the
public index; each is imported from its own module at first use, so that `import neurms` loads
torch and nothing of Lightning, Keras, matplotlib, rich or torchmetrics.

Example:
    >>> import neurms
    >>> isinstance(neurms.__version__, str)
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  (its absence must surface here, not at the first attribute)

if TYPE_CHECKING:
    from neurms.compiled.backends import use_backend as use_backend
    from neurms.core.optimizers.memory import memory_report as memory_report
    from neurms.core.optimizers.neurms import NeuRMS as NeuRMS
    from neurms.core.optimizers.racs import RACS as RACS
    from neurms.core.optimizers.registry import available as available
    from neurms.core.optimizers.registry import create as create

__version__ = "0.1.0"

_EXPORTS = {
    "NeuRMS": "neurms.core.optimizers.neurms",
    "RACS": "neurms.core.optimizers.racs",
    "create": "neurms.core.optimizers.registry",
    "available": "neurms.core.optimizers.registry",
    "memory_report": "neurms.core.optimizers.memory",
    "use_backend": "neurms.compiled.backends",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name from its home module at first use (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names beside what is already loaded."""
    return sorted({*globals(), *__all__})
