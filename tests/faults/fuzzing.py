"""What the fuzz tests feed to constructors and to ``load_state_dict``."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from neurms.core.optimizers.registry import optimizer_class
from neurms.core.optimizers.settings import COMMON_DEFAULTS

ODD: list[Any] = [
    *(0, 1, 2, 5, -1, 10**6, True, False, None),
    *(0.0, -0.0, 0.5, 0.999, 1.0, 1.5, -0.1, 1e-30, 1e30, math.nan, math.inf, -math.inf),
    *("", "step", "backward", "eager", "skip", "rule", "master", b"x", "0.9"),
    *((), (0.9,), (0.9, 0.9), [0.9, 0.999], (0.9, 0.9, 0.9), (2.0, "x"), ("0.*",), ("nothing",)),
    *({}, {"2.weight": 2}, {"x": 1}, {0: 0}, object(), len, lambda: 1.0, set(), range(3)),
    *(1j, torch.tensor(0.5), torch.tensor([0.5, 0.5]), torch.tensor(math.nan), torch.ones(2, 2)),
]
"""Values that a setting may meet: in range, out of range, of another type."""


def setting_names(rule: str) -> list[str]:
    """Return the names of every keyword argument of a rule."""
    own = [*inspect.signature(optimizer_class(rule).__init__).parameters]
    return [name for name in own if name not in ("self", "params", "model", "common")] + [
        *COMMON_DEFAULTS
    ]


def odd_settings(rule: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of one to three settings with odd values."""
    names = st.sampled_from([*setting_names(rule), "no_such_setting"])
    return st.dictionaries(names, st.sampled_from(ODD), min_size=1, max_size=3)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every entry of a nested state dict."""
    found = [at] if at else []
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    for key, child in children:
        found += paths(child, (*at, key))
    return found


def _tensor_damage(tensor: Tensor) -> list[Any]:
    return [
        tensor.double() if tensor.dtype != torch.float64 else tensor.float(),
        tensor.to(torch.int32),
        tensor.unsqueeze(0),
        tensor.flatten()[:-1],
        torch.full_like(tensor, math.nan),
        torch.full_like(tensor, -math.inf),
        tensor.to_sparse() if tensor.ndim else tensor.item(),
        tensor.numpy(),
        tensor.to("meta"),
    ]


def damaged(state_dict: dict[str, Any], pick: Callable[[int], int]) -> Any:
    """Return a copy of a state dict with one entry gone, renamed, replaced or added.

    Args:
        state_dict: What an optimizer returned.
        pick: Returns a number below its argument.
    """
    state_dict = copy.deepcopy(state_dict)
    everywhere = paths(state_dict)
    *way, key = everywhere[pick(len(everywhere))]
    holder: Any = state_dict
    for part in way:
        holder = holder[part]
    if isinstance(holder, tuple):
        return state_dict
    value = holder[key]
    action = pick(4)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[("odd", 7)[pick(2)]] = holder.pop(key)
    elif action == 2 and isinstance(holder, dict):
        holder[("more", 99, None)[pick(3)]] = value
    else:
        values = [*ODD, *(_tensor_damage(value) if isinstance(value, Tensor) else ())]
        holder[key] = values[-1 - pick(len(values))]
    return state_dict
