"""Saving on one number of ranks and going on with another, by torch.distributed.checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import neurms
from tests.core.distributed.trainings import Network, batch, result, sharded, whole_state

BEFORE, AFTER = 3, 2


def _made(
    rule: str, settings: dict[str, Any], ranks: int, wrap: str, dtype: str = "float64"
) -> tuple[Any, Any, Any]:
    inner: nn.Module = Network().to(getattr(torch, dtype))
    if wrap == "fsdp":
        inner = sharded(inner, ranks)
    model = DistributedDataParallel(inner) if wrap == "ddp" else inner
    return inner, model, neurms.create(rule, inner, **settings)


def _steps(model: Any, optimizer: Any, rank: int, ranks: int, first: int, count: int) -> None:
    for step in range(first, first + count):
        x, whole = batch(step, model_dtype(model))
        x, y = (t.tensor_split(ranks)[rank] for t in (x, whole))
        # The mean of the whole batch, which three ranks cannot divide evenly.
        ((model(x) - y).square().sum() * (ranks / whole.numel())).backward()
        optimizer.step()
        optimizer.zero_grad()


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _states(inner: nn.Module, optimizer: Any, full: bool = False) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=full)
    return {
        "model": get_model_state_dict(inner, options=options),
        "optimizer": get_optimizer_state_dict(inner, optimizer, options=options),
    }


def save(
    rank: int,
    ranks: int,
    *,
    rule: str,
    settings: dict[str, Any],
    folder: str,
    wrap: str = "fsdp",
    dtype: str = "float64",
) -> Any:
    """Train, save, and train on."""
    inner, model, optimizer = _made(rule, settings, ranks, wrap, dtype)
    _steps(model, optimizer, rank, ranks, 0, BEFORE)
    dcp.save(_states(inner, optimizer), checkpoint_id=folder)
    saved = whole_state(inner, optimizer)
    _steps(model, optimizer, rank, ranks, BEFORE, AFTER)
    return {**result(inner, optimizer), "kept": saved}


def resume(
    rank: int,
    ranks: int,
    *,
    rule: str,
    settings: dict[str, Any],
    folder: str,
    wrap: str = "fsdp",
    dtype: str = "float64",
) -> Any:
    """Load into a fresh model and optimizer, and train on."""
    inner, model, optimizer = _made(rule, settings, ranks, wrap, dtype)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.zero_()
    states = _states(inner, optimizer)
    dcp.load(states, checkpoint_id=folder)
    set_model_state_dict(inner, states["model"])
    set_optimizer_state_dict(inner, optimizer, states["optimizer"])
    loaded = whole_state(inner, optimizer)
    _steps(model, optimizer, rank, ranks, BEFORE, AFTER)
    return {**result(inner, optimizer), "kept": loaded}


def full_states(rank: int, ranks: int, *, rule: str, settings: dict[str, Any]) -> Any:
    """Train sharded; return the whole state, and what a sharded optimizer makes of it."""
    inner, model, optimizer = _made(rule, settings, ranks, "fsdp")
    _steps(model, optimizer, rank, ranks, 0, BEFORE)
    states = _states(inner, optimizer, full=True)
    held = {
        name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        for name, state in states["optimizer"]["state"].items()
    }
    before = result(inner, optimizer)
    twin, _, other = _made(rule, settings, ranks, "fsdp")
    plain = {**states["optimizer"], "state": held}
    other.load_state_dict(plain)
    again = whole_state(twin, other)
    return {"state": before["state"], "full": list(held.values()), "again": again}
