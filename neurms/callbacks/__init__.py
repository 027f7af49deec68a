"""Callbacks and the profiler, for Lightning, Keras and plain loops.

An index: each name is imported from its own module at first use, so that Keras users need no
Lightning and the other way round. The Keras callbacks have the same names and live in
``neurms.callbacks.keras``, Hugging Face's profiler in ``neurms.callbacks.transformers``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurms.callbacks.lightning import NeuRMSCallback as NeuRMSCallback
    from neurms.callbacks.profiler.lightning import PreconditionerProfiler as PreconditionerProfiler

_EXPORTS = {
    "NeuRMSCallback": "neurms.callbacks.lightning",
    "PreconditionerProfiler": "neurms.callbacks.profiler.lightning",
}

__all__ = [*_EXPORTS]


if not TYPE_CHECKING:  # else every name would be there

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
