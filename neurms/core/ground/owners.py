"""Which module multiplies with a parameter, also where the weight is made of it.

Pruning and parametrizations keep the parameter elsewhere and under another name. What it is to its
layer does not change by that: the matrix behind a linear layer's weight is that layer's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Owner", "owners_of", "weight_behind"]


@dataclass(frozen=True)
class Owner:
    """A module that holds a parameter, or for which the parameter is kept.

    Args:
        module: The module.
        name: What the parameter is to it, such as ``"weight"``.
        made: How the module's own tensor is made of it: ``"pruned"``, ``"parametrized"``, or empty
            where the parameter itself is used.
        whole: Whether it stands for that tensor; False for the lesser of several parts, such as
            the lengths in weight normalization.
    """

    module: nn.Module
    name: str
    made: str = ""
    whole: bool = True


def owners_of(model: nn.Module) -> dict[int, list[Owner]]:
    """Return for each parameter, by its id, the distinct modules that it belongs to."""
    made_for = {
        id(parts): (module, name)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for name, parts in module.parametrizations.items()  # type: ignore[union-attr, operator]
    }
    owners: dict[int, list[Owner]] = {}
    for module in model.modules():
        for parameter, owner in _owned_by(module, made_for):
            owners.setdefault(id(parameter), []).append(owner)
    return owners


def weight_behind(module: nn.Module, parameter: Tensor) -> Owner | None:
    """Return what a parameter in a module's own dictionary is to it, None if it is not there."""
    return next((owner for own, owner in _owned_by(module, {}) if own is parameter), None)


def _owned_by(
    module: nn.Module, made_for: Mapping[int, tuple[nn.Module, str]]
) -> Iterator[tuple[Tensor, Owner]]:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if id(module) in made_for:
        layer, made_name = made_for[id(module)]
        parts = {name: p for name, p in own.items() if name.startswith("original")}
        largest = max(parts, key=lambda name: parts[name].numel(), default="")
        for name, parameter in parts.items():
            yield parameter, Owner(layer, made_name, "parametrized", name == largest)
        own = {name: p for name, p in own.items() if name not in parts}
    for name, parameter in own.items():
        yield parameter, _by_name(module, name)


def _by_name(module: nn.Module, name: str) -> Owner:
    """Return what the parameter of a name is, where torch's pruning and norms have renamed it."""
    base = name.removesuffix("_orig")
    if base != name and base not in module._parameters:
        masked = hasattr(module, f"{base}_mask")
        return Owner(module, base, "pruned" if masked else "parametrized")
    base = name[:-2]
    if name.endswith(("_g", "_v")) and {f"{base}_g", f"{base}_v"} <= module._parameters.keys():
        return Owner(module, base, "parametrized", name.endswith("_v"))
    return Owner(module, name)
