"""Copies and pickles of a tapped module: they hold nothing of ours.

A module's state is its ``__dict__``, hooks and all. While a tap is on it, the module says itself
what a copy or a pickle of it is made of, and leaves the taps out.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["leave_out", "own_again"]

_GETSTATE = "__getstate__"
_HOOKS = "_forward_hooks"
_OF_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _WithoutTaps:
    """A module's ``__getstate__``, as ``copy`` and ``pickle`` ask for it.

    Args:
        module: The module, whose attribute this is; held weakly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> Any:
        """Return the module's state without its taps, and without this."""
        module = self._module()
        if module is None:
            raise ReferenceError(
                "the module whose state is asked for no longer exists; copy it while it is there"
            )
        inherited = getattr(type(module), _GETSTATE, None)
        state = vars(module) if inherited is None else inherited(module)
        if not isinstance(state, dict):
            return state
        state = {name: value for name, value in state.items() if name != _GETSTATE}
        ours = {key for key, hook in module._forward_hooks.items() if is_private(hook)}
        for name in (_HOOKS, *_OF_HOOKS):
            if hooks := state.get(name):
                state[name] = type(hooks)((k, hook) for k, hook in hooks.items() if k not in ours)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> _WithoutTaps:
        # Whoever copies a module's dictionary by himself gets one that serves the copy.
        module = self._module()
        copied: Any = memo.get(id(module), module)
        return _WithoutTaps(copied)


def is_private(hook: object) -> bool:
    """Return whether a hook is one that copies of its module must not have."""
    return getattr(type(hook), "private", False) is True


def leave_out(module: nn.Module) -> None:
    """Have copies and pickles of a module leave its taps out; again does nothing."""
    if _GETSTATE not in vars(module):
        vars(module)[_GETSTATE] = _WithoutTaps(module)


def own_again(module: nn.Module) -> None:
    """Make a module what it was, once its last tap is gone."""
    if not any(map(is_private, module._forward_hooks.values())):
        vars(module).pop(_GETSTATE, None)
