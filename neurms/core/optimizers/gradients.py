"""Whether a step's gradients are good, which ranks that share them decide together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from neurms.compiled.finite import within
from neurms.core.ground.shards import is_sharded, local, mesh_of
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.view import View

__all__ = ["bad_names", "hold_nothing", "is_rehearsal", "nonfinite_names"]


def bad_names(views: Sequence[View], movers: Sequence[Mover]) -> list[str]:
    """Return the names of gradients, and of what movers look at, that are not good.

    One look at all of it is enough where it is good, as nearly always, and lies on the CPU.
    """
    tensors, bounds = [view.gradient for view in views], [view.bound for view in views]
    for mover in movers:
        more, theirs = mover.look_at()
        tensors += more
        bounds += theirs
    if all([type(x) is Tensor and x.is_cpu for x in tensors]) and within(tensors, bounds):
        return []
    found = nonfinite_names(views)
    return found + [name for mover in movers for name in mover.bad_names()]


def nonfinite_names(views: Sequence[View]) -> list[str]:
    """Return the names of parameters whose gradient holds a NaN, or is beyond the view's bound.

    A norm reads each gradient once at memory speed and is no less than any element; only where it
    is above the bound are elements looked at. Ranks that share sharded gradients agree on the
    answer, so that all of them take the step or none. Fake gradients are taken for good ones.
    """
    real = [view for view in views if not isinstance(view.gradient, FakeTensor)]
    if not real:
        return []
    names = _on_any_rank(real, set(_bad_here(real)))
    return [view.route.name for view in real if view.route.name in names]


def hold_nothing(views: Sequence[View]) -> bool:
    """Return whether these parameters hold no numbers: fake tensors, or the meta device.

    Whoever takes a step on those wants to know what it allocates; no number says where to move.
    """
    # One tells of all: no model is there in part.
    return bool(views) and views[0].hollow


def is_rehearsal(views: Sequence[View]) -> bool:
    """Return whether a step has no rate and no gradient, so that only state is wanted of it.

    This is how torch.distributed.checkpoint makes an optimizer allocate what it will load.
    """
    if not views or any(float(view.group["lr"]) for view in views):
        return False
    moving = {view.route.name for view in views if bool(local(view.gradient).any())}
    return not _on_any_rank(views, moving)


def _on_any_rank(views: Sequence[View], names: set[str]) -> set[str]:
    """Return ``names`` and what other ranks have named among the views that are sharded."""
    meshes: dict[Any, list[View]] = {}
    for view in views:
        if is_sharded(view.gradient):
            meshes.setdefault(mesh_of(view.gradient), []).append(view)
    for mesh, own in meshes.items():
        names = names | _agreed(mesh, own, names)
    return names


def _agreed(mesh: Any, views: Sequence[View], names: Collection[str]) -> set[str]:
    """Return which views any rank of a mesh has named, by one all-reduce for each of its axes."""
    flags = torch.tensor(
        [view.route.name in names for view in views],
        dtype=torch.int32,
        device=views[0].gradient.device,
    )
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(flags, group=mesh.get_group(axis))
    return {view.route.name for view, bad in zip(views, flags.tolist(), strict=True) if bad}


def _bad_here(views: Sequence[View]) -> list[str]:
    """Return the names of parameters whose gradient, where this rank holds it, is out of bounds."""
    by_device: dict[torch.device, list[tuple[str, Tensor, float]]] = {}
    for view in views:
        part = local(view.gradient)
        own = (view.route.name, part, min(view.bound, torch.finfo(_wide(part)).max))
        by_device.setdefault(part.device, []).append(own)
    suspects = []
    for device, parts in by_device.items():
        whole = [part for _, part, _ in parts], [bound for *_, bound in parts]
        if device.type == "cpu" and within(*whole):
            continue
        small = torch.stack([_norm(part) <= bound for _, part, bound in parts]).tolist()
        suspects += [own for own, good in zip(parts, small, strict=True) if not good]
    return [
        name
        for name, part, bound in suspects
        if not bool((part.to(_wide(part)).abs() <= bound).all())
    ]


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=_wide(tensor))
    return norm


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
