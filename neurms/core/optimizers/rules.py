"""The rules that are known by name, whoever wrote them.

A table that others fill: :mod:`neurms.core.catalog` with the rules of this library, and
:func:`neurms.register` with those of somebody else. It imports nothing of the package, so that a
parameter group can look up another rule than its optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["announce", "follow", "rule_class", "rule_names"]

_LOADERS: dict[str, Callable[[], type[Any]]] = {}
_FOLLOWERS: list[Callable[[str], object]] = []


def announce(name: str, load: Callable[[], type[Any]]) -> None:
    """Make a rule known by its snake_case name; its class is loaded when it is first asked for."""
    _LOADERS[name] = load
    for hear in _FOLLOWERS:
        hear(name)


def follow(hear: Callable[[str], object]) -> None:
    """Call ``hear`` with the name of every rule: those that are known now, and each later one."""
    _FOLLOWERS.append(hear)
    for name in rule_names():
        hear(name)


def rule_names() -> list[str]:
    """Return the names of all rules that are known, in the order in which they became so."""
    return list(_LOADERS)


def rule_class(name: str) -> type[Any]:
    """Return the optimizer class of a rule.

    Raises:
        ValueError: No rule has that name.
    """
    if name not in _LOADERS:
        raise ValueError(f"rule={name!r} is not known; choose one of {rule_names()}")
    return _LOADERS[name]()
