"""Which layers NeuRMS taps, and by what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.owners import weight_behind
from neurms.core.ground.shards import is_sharded, row_shard
from neurms.core.routing import FALLBACK, Head, Route, RoutedModel, excluded, route_model
from neurms.core.taps.activity import activity_of

__all__ = ["Heads", "check_rows", "neurms_routes", "pairs"]


def neurms_routes(model: nn.Module, rule: str, head: Head, exclude: Sequence[str]) -> list[Route]:
    """Route a model for a rule that needs D and H, the head and the layers' biases included.

    Raises:
        ValueError: No layer of the model can be tapped, or a pattern of ``exclude`` matches
            nothing.
    """
    if isinstance(model, RoutedModel):
        return model.routes
    routes = [_tappable(route) for route in route_model(model, rule, head=head)]
    routes = excluded(routes, exclude)
    weights = {id(r.module): r for r in routes if not r.is_fallback}
    routes = [_with_weight(route, weights, rule) for route in routes]
    routes = excluded(routes, exclude)
    if not weights:
        kinds = sorted({route.kind for route in routes}) or [type(model).__name__]
        raise ValueError(
            f"model={type(model).__name__} has no layer that {rule} can tap (an untied Linear or "
            f"convolution that is not excluded); its parameters belong to {kinds}"
        )
    return routes


def _tappable(route: Route) -> Route:
    if route.is_fallback:
        return route
    if isinstance(route.module, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        reason = "inside nn.MultiheadAttention, whose projections are never called as layers"
        return replace(route, rule=FALLBACK, reason=reason)
    if route.module is not None and not _multiplies(route.module, route.parameter):
        return replace(route, rule=FALLBACK, reason="parametrized: D^T H is not its gradient")
    if route.module is None or activity_of(route.module) is None:
        return replace(route, rule=FALLBACK, reason=f"{route.kind} shows no error signal to tap")
    return route


def _multiplies(module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a module multiplies with a parameter itself, or with it under a mask."""
    owner = weight_behind(module, parameter)
    return owner is not None and owner.made != "parametrized"


def _with_weight(route: Route, weights: Mapping[int, Route], rule: str) -> Route:
    """Return a bias's route as its layer's rule has it."""
    owner = weights.get(id(route.module))
    if owner is None or route is owner or route.reason != "bias":
        return route
    if route.parameter.requires_grad and not owner.parameter.requires_grad:
        return replace(route, reason="bias of a frozen weight, whose error signal is not observed")
    return replace(route, rule=rule, reason=f"bias of {owner.name}: scaled by its s")


def pairs(routes: Iterable[Route]) -> list[tuple[Route, Tensor | None]]:
    """Return the weights among routes under the rule, each with its layer's bias."""
    own = list(routes)
    biases = {id(route.module): route.parameter for route in own if route.parameter.ndim < 2}
    return [(r, biases.get(id(r.module))) for r in own if r.parameter.ndim >= 2]


def check_rows(route: Route) -> None:
    """Raise unless ``route``'s parameter is whole, or sharded by its units.

    Raises:
        UnsupportedTrainingError: It is cut in another way, for which s has no part to act on.
    """
    if not is_sharded(route.parameter):
        return
    shard = row_shard(route.parameter, route.layout)
    # Two cuts of the rows are tensor parallelism beside FSDP2, whose layers show parts of D.
    if shard is None or len(shard.groups) > 1:
        raise UnsupportedTrainingError(
            f"{route.name!r} is sharded as {route.parameter.placements}; "  # type: ignore[attr-defined]
            "NeuRMS needs Shard(0) over one axis of the mesh (fully_shard's default) so that each "
            'rank holds whole units: shard it so, use variant="P", which takes any cut, or name it '
            "in exclude"
        )


class Heads:
    """Name patterns of weights -> numbers of heads whose outputs share one second moment.

    Args:
        patterns: As NeuRMS's ``heads`` has it, None for none.

    Raises:
        TypeError: It maps something else.
    """

    def __init__(self, patterns: Any) -> None:
        named = isinstance(patterns, Mapping) and all(isinstance(name, str) for name in patterns)
        if patterns is not None and not named:
            raise TypeError(
                f"heads={patterns!r} must map name patterns of weights to numbers of heads"
            )
        self._patterns: dict[str, Any] = dict(patterns or {})

    def of(self, route: Route) -> int:
        """Return the number of heads of a weight, 0 for one moment a unit."""
        own = (n for pattern, n in self._patterns.items() if fnmatchcase(route.name, pattern))
        return next(own, 0)

    def check(self, routes: Sequence[Route]) -> None:
        """Raise unless each pattern matches a weight, and divides the outputs of all it matches."""
        for pattern, heads in self._patterns.items():
            hits = [route for route in routes if fnmatchcase(route.name, pattern)]
            if not hits:
                names = [route.name for route in routes][:5]
                raise ValueError(f"heads={pattern!r} matches no weight; weights are {names}")
            for route in hits:
                units = route.layout.units
                if not isinstance(heads, int) or heads < 1 or units % heads:
                    raise ValueError(
                        f"heads[{pattern!r}]={heads!r} must divide the {units} outputs of "
                        f"{route.name!r}"
                    )
