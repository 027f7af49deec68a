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

from neurms.core.catalog import HOMES as _HOMES
from neurms.version import __version__

if TYPE_CHECKING:
    from neurms.callbacks import metrics as metrics
    from neurms.callbacks.profiler import profile as profile
    from neurms.compiled.backends import use_backend as use_backend
    from neurms.compiled.native.load import warm_up as warm_up
    from neurms.core.catalog import *  # noqa: F403  (the rules)
    from neurms.core.distributed.joining import JoinableOptimizer as JoinableOptimizer
    from neurms.core.ground.errors import CheckpointError as CheckpointError
    from neurms.core.ground.errors import MissingParametersError as MissingParametersError
    from neurms.core.ground.errors import NeurmsError as NeurmsError
    from neurms.core.ground.errors import NonFiniteError as NonFiniteError
    from neurms.core.ground.errors import SparseGradientError as SparseGradientError
    from neurms.core.ground.errors import UnsupportedTrainingError as UnsupportedTrainingError
    from neurms.core.optimizers.base import PreconditionedOptimizer as PreconditionedOptimizer
    from neurms.core.optimizers.memory import memory_report as memory_report
    from neurms.core.optimizers.recipe import Recipe as Recipe
    from neurms.core.optimizers.registry import available as available
    from neurms.core.optimizers.registry import create as create
    from neurms.core.optimizers.registry import register as register
    from neurms.core.structures.base import Context as Context
    from neurms.core.structures.base import Structure as Structure
    from neurms.core.structures.base import Transform as Transform
    from neurms.core.unitwise.preconditioner import GradientPreconditioner as GradientPreconditioner

_EXPORTS = {
    **{home.rpartition(".")[2]: home.rpartition(".")[0] for home in _HOMES.values()},
    "create": "neurms.core.optimizers.registry",
    "available": "neurms.core.optimizers.registry",
    "register": "neurms.core.optimizers.registry",
    "memory_report": "neurms.core.optimizers.memory",
    "JoinableOptimizer": "neurms.core.distributed.joining",
    "PreconditionedOptimizer": "neurms.core.optimizers.base",
    "Recipe": "neurms.core.optimizers.recipe",
    "Transform": "neurms.core.structures.base",
    "Structure": "neurms.core.structures.base",
    "Context": "neurms.core.structures.base",
    "GradientPreconditioner": "neurms.core.unitwise.preconditioner",
    "warm_up": "neurms.compiled.native.load",
    "NeurmsError": "neurms.core.ground.errors",
    "MissingParametersError": "neurms.core.ground.errors",
    "NonFiniteError": "neurms.core.ground.errors",
    "SparseGradientError": "neurms.core.ground.errors",
    "UnsupportedTrainingError": "neurms.core.ground.errors",
    "CheckpointError": "neurms.core.ground.errors",
    "use_backend": "neurms.compiled.backends",
    "profile": "neurms.callbacks.profiler",
}

# Not in __all__: its metrics are torchmetrics', so that a star import must not load it.
_MODULES = {"metrics": "neurms.callbacks.metrics"}

__all__ = ["__version__", *_EXPORTS]


if not TYPE_CHECKING:  # else every name would be there

    def __getattr__(name: str) -> Any:
        """Import a public name from its home module at first use (PEP 562)."""
        if name in _MODULES:
            value = import_module(_MODULES[name])
        elif name in _EXPORTS:
            value = getattr(import_module(_EXPORTS[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names beside what is already loaded."""
    return sorted({*globals(), *__all__, *_MODULES})
