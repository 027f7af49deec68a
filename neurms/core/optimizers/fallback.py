"""AdamW for the parameters that no rule takes, inside the same optimizer object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from neurms.core.ground.shards import local_state

__all__ = ["adamw_state", "adamw_update_"]

State = dict[str, Any]


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
    own = [local_state(state) for state in states]
    triples = list(zip(parameters, gradients, own, strict=True))
    for fused in (True, False):
        chosen = [triple for triple in triples if _can_fuse(*triple) == fused]
        if not chosen:
            continue
        adamw(
            [p for p, _, _ in chosen],
            [g for _, g, _ in chosen],
            [state["exp_avg"] for _, _, state in chosen],
            [state["exp_avg_sq"] for _, _, state in chosen],
            [],
            # torch wants step counts as tensors; ours are plain numbers, so that state bytes are
            # the method's.
            [torch.tensor(float(state["step"]), device=p.device) for p, _, state in chosen],
            fused=fused,
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


def _can_fuse(parameter: Tensor, gradient: Tensor, state: State) -> bool:
    # The fused CPU kernel walks storage and never looks at strides (torch 2.13), so that they must
    # agree; the moments of a parameter with gaps in its storage are laid out without them.
    return (
        type(parameter) in (Tensor, torch.nn.Parameter)
        and parameter.device.type in ("cpu", "cuda")
        and parameter.stride() == gradient.stride() == state["exp_avg"].stride()
    )
