"""State bytes that rules would take for a Keras model, from its variables' shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from neurms.core.optimizers.memory import memory_report
from neurms.core.optimizers.plan import meta_like
from neurms.core.optimizers.registry import is_torch, optimizer_class
from neurms.integrations.keras.engine import make_engine
from neurms.integrations.keras.owners import Surroundings
from neurms.integrations.keras.routing import parameter_of, route_variables
from neurms.integrations.keras.settings import needs_taps, setting_defaults, takes_biases

__all__ = ["memory_forecast"]


def memory_forecast(
    variables: Sequence[Any], optimizer: Any, rules: Iterable[str]
) -> dict[str, int]:
    """Return the bytes of state by rule, at default settings; nothing is allocated or attached.

    Args:
        variables: A model's trainable variables, which have been built.
        optimizer: The optimizer that moves them, whichever it is.
        rules: Names as in :func:`neurms.available`; one that finds nothing to do is left out.
    """
    around = Surroundings.of(variables, optimizer)
    found = {}
    for rule in rules:
        with suppress(TypeError, ValueError):
            found[rule] = _bytes(rule, variables, around)
    return found


def _bytes(rule: str, variables: Sequence[Any], around: Surroundings) -> int:
    if is_torch(rule):
        stand_ins = [nn.Parameter(meta_like(parameter_of(v))) for v in variables]
        return memory_report(nn.ParameterList(stand_ins), rule).state_bytes
    head = optimizer_class(rule).default_head
    taps, biases = needs_taps(rule, setting_defaults(rule)), takes_biases(rule)
    entries = route_variables(variables, around, rule, head=head, taps=taps, biases=biases)
    return make_engine(rule, [e.route for e in entries], {"lr": 1e-3}).optimizer.plan().state_bytes
