"""State bytes of any optimizer, predicted from the model's shapes alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from neurms.core.optimizers.beside import ModelGroups
from neurms.core.optimizers.plan import Plan, PlanRow, meta_like, tensor_bytes
from neurms.core.optimizers.registry import create, is_torch, optimizer_class
from neurms.core.routing import route_model

__all__ = ["memory_report"]


def memory_report(model: nn.Module, name: str, **settings: Any) -> Plan:
    """Predict what an optimizer's state will take, without making it and without a step.

    State is allocated on the meta device, which has shapes and no storage; the model is only read.
    Frozen and empty parameters count nothing. What is predicted is exactly what
    ``optimizer.state_bytes()`` measures after every trainable parameter has had a gradient.

    Args:
        model: The model.
        name: One of :func:`neurms.available`, torch's own optimizers included.
        **settings: As for :func:`neurms.create`.

    Returns:
        A printable table, one row for each parameter; ``.state_bytes`` is the total.

    Raises:
        ValueError: No optimizer has that name, or a setting is out of its range.
        TypeError: ``model`` is no module, or the optimizer has no such setting.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 200), torch.nn.Linear(200, 10))
        >>> neurms.memory_report(model, "racs", head="rule").state_bytes
        3728
        >>> neurms.memory_report(model, "adamw").state_bytes
        177696
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be an nn.Module")
    if is_torch(name):
        return _torch_plan(model, name, settings)
    return optimizer_class(name).predict(model, **settings)


def _torch_plan(model: nn.Module, name: str, settings: dict[str, Any]) -> Plan:
    """Step one of torch's own optimizers on stand-ins without storage."""
    beside = ModelGroups.of(model, settings.pop("groups", None))
    own = {id(p): group for group in beside.groups for _, p in group["params"]}
    rows = []
    for route in route_model(model, name):
        stand_in = nn.Parameter(meta_like(route.parameter))
        group = {**own.get(id(route.parameter), {}), "params": [stand_in]}
        optimizer = create(name, [group], **settings)
        trained = route.parameter.requires_grad
        rows.append(
            PlanRow(
                route.name,
                route.kind,
                name,
                f"torch.optim.{type(optimizer).__name__}" + ("" if trained else " (frozen)"),
                tuple(route.parameter.shape),
                _stepped_bytes(optimizer, stand_in) if trained else 0,
            )
        )
    return Plan(rows)


def _stepped_bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    if isinstance(optimizer, torch.optim.Adafactor):
        # Its step reads a scalar off the weights, which meta tensors have not got.
        *batch, rows, columns = (1, 1, *parameter.shape)
        sums = rows + columns if parameter.ndim > 1 else columns
        return math.prod(batch) * sums * parameter.element_size() + torch.tensor(0.0).nbytes
    parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return tensor_bytes(optimizer.state[parameter])
