"""The simplest rule there is, W <- W - lr G, to hold what surrounds every rule to Keras's SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

from neurms.core.optimizers import rules
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.transforms.momentum import Momentum

NAME = "plain"


class Plain(PreconditionedOptimizer):
    """SGD on matrices; its settings are there to be saved."""

    rule = NAME

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov}, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return what averages gradients, which without momentum is nothing."""
        return Recipe((Momentum(settings["momentum"], settings["nesterov"]),))


def keras_plain() -> type:
    """Register the rule for this process and return its Keras class."""
    from neurms.integrations.keras import classes

    with known():
        made = classes._make(NAME)
    # Not one of the library's, over which other tests run.
    del classes.CLASSES[NAME]
    return made


def known() -> Any:
    """Return a patch under which the registry knows the rule."""
    return mock.patch.dict(rules._LOADERS, {NAME: lambda: Plain})
