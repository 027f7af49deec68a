"""What NeuRMS's parameter groups may differ in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.routing import Route
from neurms.core.structures.gradient_moments import OF_AVERAGES
from neurms.core.unitwise.gradient_rule import check_average, partner_of
from neurms.core.unitwise.rule import STRUCTURE_SETTINGS, check_agc

__all__ = ["NO_ASCENT", "check_shared", "check_written"]

NO_ASCENT = (
    'maximize=True cannot go with update="backward", which writes descent steps; negate the loss, '
    'or use update="step"'
)

_OF_LAYERS = ("variant", "beta", *STRUCTURE_SETTINGS)
"""Settings of the statistics that a layer's weight and bias share."""

_OF_PROBED = ("momentum", "probes", "damping", *OF_AVERAGES)
"""The same of variant P."""


def check_written(group: Mapping[str, Any]) -> None:
    """Raise unless what a group asks for can be had where updates are written in backward.

    Raises:
        UnsupportedTrainingError: It ascends.
        ValueError: It clips, or wants what only a gradient can enter.
    """
    if group["maximize"]:
        raise UnsupportedTrainingError(NO_ASCENT)
    check_agc(group["agc"], "backward")
    check_average(group)


def check_shared(
    routes: Mapping[Tensor, Route], groups: Iterable[Mapping[str, Any]], rule: str
) -> None:
    """Raise unless groups agree on what a layer's weight and bias share.

    Args:
        routes: Of all parameters.
        groups: Complete.
        rule: NeuRMS's.

    Raises:
        ValueError: A bias's group has other settings for statistics than its weight's.
    """
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    own = [r for r in routes.values() if r.rule == rule and r.parameter.ndim < 2]
    for bias in own:
        weight = partner_of(bias, routes)
        if weight is None:
            continue
        theirs, its = of[id(weight.parameter)], of[id(bias.parameter)]
        # P's momentum averages the gradient that its moments are of, or makes what they are of.
        names = (*_OF_LAYERS, *(_OF_PROBED if its["variant"] == "P" else ()))
        odd = next((name for name in names if theirs[name] != its[name]), None)
        if odd is not None:
            raise ValueError(
                f"{odd}={its[odd]!r} in the group of {bias.name!r} and {odd}={theirs[odd]!r} in "
                f"that of {weight.name!r} cannot both hold, since a layer's weight and bias share "
                "their statistics; put the bias into a group with the same setting"
            )
