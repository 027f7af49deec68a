"""AdamW for the parameters that no rule takes, inside the same optimizer object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from neurms.core.ground.shards import local, local_state
from neurms.core.ground.spans import span
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.view import View
from neurms.core.routing import Route

__all__ = ["FallbackMover", "adamw_state", "adamw_update_", "fallback_rate"]

State = dict[str, Any]


class FallbackMover(Mover):
    """Moves what the fallback takes, the parameters of a group in one call."""

    def prepare(self, views: Sequence[View]) -> None:
        """Do nothing: AdamW minds no gradient that is finite, and overflows as torch's does."""

    def move(self, views: Sequence[View]) -> None:
        """Take one AdamW step for each parameter."""
        rest = list(views)
        while rest:
            group = rest[0].group
            own = [view for view in rest if view.group is group]
            rest = [view for view in rest if view.group is not group]
            with span("update", [view.parameter for view in own]):
                _move(own, group)

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> State:
        """Return AdamW's state."""
        return adamw_state(like)


def _move(views: Sequence[View], group: Mapping[str, Any]) -> None:
    targets = [
        view.parameter if view.kept is view.dtype and not view.sharded else view.target()
        for view in views
    ]
    gradients = [local(view.gradient) if view.sharded else view.gradient for view in views]
    states = [local_state(view.state) if view.sharded else view.state for view in views]
    adamw_update_(
        targets,
        [
            g if g.dtype is view.dtype else g.to(view.dtype)
            for view, g in zip(views, gradients, strict=True)
        ],
        states,
        lr=fallback_rate(group),
        betas=tuple(group["fallback_betas"]),
        weight_decay=group["fallback_weight_decay"],
    )
    for view, state, target in zip(views, states, targets, strict=True):
        # A sharded parameter's state is a copy there, which shares its tensors and no numbers.
        view.state["step"] = state["step"]
        if view.kept is not view.dtype:
            view.written(target)


def fallback_rate(group: Mapping[str, Any]) -> float:
    """Return AdamW's current rate: ``fallback_lr`` scaled as ``lr`` is to ``base_lr``.

    So it is 0 where ``lr`` is, ``fallback_lr`` at the rate that the optimizer was built with, and
    follows every schedule in between. ``base_lr`` is the optimizer's ``lr``; the rule's default
    where that is 0; and in a group that is the fallback's alone, whose ``lr`` is AdamW's own,
    ``fallback_lr``.
    """
    # In this order: at the base itself the quotient is 1, and nothing is rounded.
    return float(group["fallback_lr"] * (float(group["lr"]) / group["base_lr"]))


def adamw_state(parameter: Tensor) -> State:
    """Return AdamW's state for a parameter: two moments of its shape and a step count of 0."""
    dtype = parameter.dtype if parameter.dtype == torch.float64 else torch.float32
    return {
        "step": 0,
        "exp_avg": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format),
    }


def adamw_update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
) -> None:
    """Take one AdamW step in place through torch's own functional AdamW.

    Args:
        parameters: Tensors to update, in the dtype of their moments.
        gradients: Gradients of the same shapes.
        states: One :func:`adamw_state` for each parameter; steps and moments advance in place.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        weight_decay: Decoupled weight decay.
        eps: Added to the denominator.

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, as in
        torch.optim.AdamW.
    """
    triples = list(zip(parameters, gradients, states, strict=True))
    fused = _can_fuse(parameters, gradients, [state["exp_avg"] for state in states])
    for form in (True, False):
        chosen = [triple for triple, can in zip(triples, fused, strict=True) if can is form]
        if not chosen:
            continue
        adamw(
            [p for p, _, _ in chosen],
            [g for _, g, _ in chosen],
            [state["exp_avg"] for _, _, state in chosen],
            [state["exp_avg_sq"] for _, _, state in chosen],
            [],
            _counts([state["step"] for *_, state in chosen], [p.device for p, *_ in chosen]),
            fused=form,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
    for state in states:
        state["step"] += 1


def _counts(steps: Sequence[int], devices: Sequence[torch.device]) -> list[Tensor]:
    """Return step counts as torch wants them; ours are plain numbers, no bytes of the state."""
    counts = torch.tensor([float(step) for step in steps], device="cpu").unbind()
    return [
        count if device.type == "cpu" else count.to(device)
        for count, device in zip(counts, devices, strict=True)
    ]


def _can_fuse(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], moments: Sequence[Tensor]
) -> list[bool]:
    # The fused CPU kernel walks storage and never looks at strides (torch 2.13), so that they must
    # agree; the moments of a parameter with gaps in its storage are laid out without them.
    strides = [map(Tensor.stride, tensors) for tensors in (parameters, gradients, moments)]
    return [
        type(parameter) in (Tensor, torch.nn.Parameter)
        and parameter.device.type in ("cpu", "cuda")
        and stride == of_gradient == of_moment
        for parameter, stride, of_gradient, of_moment in zip(parameters, *strides, strict=True)
    ]
