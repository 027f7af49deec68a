"""The plan: a table of what an optimizer does to every parameter, and what it will cost."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, overload

import torch
from torch import Tensor, nn

from neurms.core.ground.shards import is_sharded, local

__all__ = ["Plan", "PlanRow", "meta_like", "skeleton", "tensor_bytes"]


_HEADER = ("parameter", "module", "rule", "reason", "shape", "state bytes")


@dataclass(frozen=True)
class PlanRow:
    """One parameter's line of the plan; ``state_bytes`` counts optimizer state only.

    ``unformed_bytes`` is what its gradient would take, where ``update="backward"`` forms none.
    """

    name: str
    kind: str
    rule: str
    reason: str
    shape: tuple[int, ...]
    state_bytes: int
    unformed_bytes: int = 0


class Plan(Sequence[PlanRow]):
    """A printable, iterable table with one :class:`PlanRow` for each parameter.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> for row in neurms.RACS(model).plan():
        ...     print(row.name, row.rule, row.state_bytes)
        0.weight racs 52
        0.bias fallback 64
        1.weight fallback 128
        1.bias fallback 16
    """

    def __init__(self, rows: Sequence[PlanRow]) -> None:
        self._rows = tuple(rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state over all parameters."""
        return sum(row.state_bytes for row in self._rows)

    @property
    def unformed_bytes(self) -> int:
        """Bytes of gradients that are never formed, over all parameters."""
        return sum(row.unformed_bytes for row in self._rows)

    def without(self, gradients: Mapping[str, int]) -> Plan:
        """Return the plan where the gradients of some parameters, by name, are never formed.

        Args:
            gradients: Parameter name -> bytes of its gradient.
        """
        own = (replace(row, unformed_bytes=gradients.get(row.name, 0)) for row in self._rows)
        return Plan(tuple(own))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> PlanRow: ...
    @overload
    def __getitem__(self, index: slice) -> Plan: ...
    def __getitem__(self, index: int | slice) -> PlanRow | Plan:
        return Plan(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self._rows)

    def __str__(self) -> str:
        lines = [_HEADER, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join(_line(line, widths) for line in lines)

    def _cells(self) -> list[tuple[str, ...]]:
        body: list[tuple[str, ...]] = [
            (
                r.name,
                r.kind,
                r.rule,
                r.reason,
                "x".join(map(str, r.shape)) or "()",
                f"{r.state_bytes:,}",
            )
            for r in self._rows
        ]
        body.append(("total", "", "", "", "", f"{self.state_bytes:,}"))
        if self.unformed_bytes:
            body.append(("gradients never formed", "", "", "", "", f"{self.unformed_bytes:,}"))
        return body

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        head = "".join(f"<th>{name}</th>" for name in _HEADER)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self._cells()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def tensor_bytes(state: object) -> int:
    """Return this rank's bytes of all tensors in a (nested) state; numbers count nothing."""
    if isinstance(state, Tensor):
        return local(state).numel() * state.element_size()
    if isinstance(state, dict):
        return sum(tensor_bytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(tensor_bytes(value) for value in state)
    return 0


def meta_like(parameter: Tensor) -> Tensor:
    """Return a tensor like ``parameter`` without storage, sharded alike, to predict state on."""
    if is_sharded(parameter):
        return torch.empty_like(parameter, device="meta")
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose parameters and buffers have no storage."""
    stand_ins: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = nn.Parameter(meta_like(parameter), requires_grad=parameter.requires_grad)
        stand_ins[id(parameter)] = empty
    for buffer in model.buffers():
        stand_ins[id(buffer)] = meta_like(buffer)
    return copy.deepcopy(model, stand_ins)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    *text, number = cells
    padded = [cell.ljust(width) for cell, width in zip(text, widths, strict=False)]
    return "  ".join([*padded, number.rjust(widths[-1])]).rstrip()
