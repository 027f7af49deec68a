"""Where a module keeps the parameter that it multiplies with, also after it was changed."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["held_weight", "is_remade"]


def held_weight(module: nn.Module, name: str) -> Tensor | None:
    """Return the parameter behind a module's ``name``, None if there is none or there are several.

    Pruning (``torch.nn.utils.prune``) moves it to ``name_orig``, a parametrization
    (``torch.nn.utils.parametrize``) to ``parametrizations.name.original``: the same parameter, of
    which the module multiplies with what a mask or a function makes. Traced by Dynamo.
    """
    own = module._parameters.get(name)
    if own is None:
        own = module._parameters.get(f"{name}_orig")
    if own is None and (made := _parametrization(module, name)) is not None:
        own = made._parameters.get("original")
    return own


def is_remade(module: nn.Module, name: str) -> bool:
    """Return whether a function, and no mask alone, makes the module's ``name`` of others."""
    if _parametrization(module, name) is not None:
        return True
    # The hook of torch.nn.utils.spectral_norm keeps its original where pruning does.
    return f"{name}_orig" in module._parameters and not hasattr(module, f"{name}_mask")


def _parametrization(module: nn.Module, name: str) -> nn.Module | None:
    made = module._modules.get("parametrizations")
    return None if made is None else made._modules.get(name)
