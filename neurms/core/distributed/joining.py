"""Uneven inputs: an optimizer beside a model in torch's ``Join`` context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from neurms.core.ground.errors import UnsupportedTrainingError

if TYPE_CHECKING:
    from neurms.core.optimizers.base import PreconditionedOptimizer

__all__ = ["JoinableOptimizer"]


class JoinableOptimizer(Joinable):
    """Lets ranks run out of batches at different times: ``Join([model, JoinableOptimizer(...)])``.

    A rank without batches takes part in what the optimizers of the others exchange, and when all
    are done it gets the state of a rank that went on longest, as the model gets its weights: else
    replicas would go on from equal weights with unequal statistics.

    Args:
        optimizer: One of this library's optimizers, of the model's parameters.
        model: The model; it stands before the optimizer in ``Join``'s list, and makes its calls
            first in each iteration.

    Raises:
        UnsupportedTrainingError: NeuRMS's variant B, whose ranks talk to each other in the middle
            of backward, where a rank without batches cannot follow; or ``distribute="owner"``, for
            the owner of a matrix may be the first without batches.

    Example:
        >>> import neurms
        >>> from torch.distributed.algorithms.join import Join
        >>> def epoch(model, optimizer, batches):
        ...     with Join([model, JoinableOptimizer(optimizer, model)]):
        ...         for x, y in batches:
        ...             optimizer.zero_grad()
        ...             (model(x) - y).square().mean().backward()
        ...             optimizer.step()
    """

    def __init__(self, optimizer: PreconditionedOptimizer, model: DistributedDataParallel) -> None:
        super().__init__()
        if any(group.get("variant") == "B" for group in optimizer.param_groups):
            raise UnsupportedTrainingError(
                'variant="B" sums its statistics over ranks inside backward, which a rank that has '
                'run out of batches cannot do; use variant="U" or "F", or batches of equal number'
            )
        if optimizer.sharing.form == "owner":
            raise UnsupportedTrainingError(
                'distribute="owner" has each matrix moved by one rank, which may have run out of '
                'batches; use distribute="replicate", or batches of equal number'
            )
        self.optimizer = optimizer
        self.model = model

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return what a rank does that has run out of batches."""
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        """The device of the parameters."""
        device: torch.device = self.optimizer.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The group that the model's ranks form."""
        return self.model.process_group


class _Hook(JoinHook):
    def __init__(self, joinable: JoinableOptimizer) -> None:
        self.joinable = joinable

    def main_hook(self) -> None:
        # The model has just learnt from the other ranks whether this iteration ends in a step.
        if self.joinable.model.require_forward_param_sync:
            self.joinable.optimizer.take_part()

    def post_hook(self, is_last_joiner: bool) -> None:
        distributed, group = torch.distributed, self.joinable.join_process_group
        rank = torch.tensor(
            [distributed.get_rank() if is_last_joiner else -1], device=self.joinable.join_device
        )
        distributed.all_reduce(rank, distributed.ReduceOp.MAX, group=group)
        broadcast_state(self.joinable.optimizer, int(rank), group)


@torch.no_grad()
def broadcast_state(optimizer: PreconditionedOptimizer, source: int, group: Any = None) -> None:
    """Give every rank the optimizer state of one, which may know parameters that others do not.

    Args:
        optimizer: The optimizer, with the same groups on every rank.
        source: Global rank whose state all will have.
        group: Process group; None is all ranks.
    """
    parameters = [(p, own) for own in optimizer.param_groups for p in own["params"]]
    device = parameters[0][0].device
    known = [
        optimizer.state[p].get("step", -1) if p in optimizer.state else -1 for p, _ in parameters
    ]
    seeds = [
        optimizer.state[p].get("seed", -1) if p in optimizer.state else -1 for p, _ in parameters
    ]
    counts = torch.tensor([known, seeds], device=device)
    torch.distributed.broadcast(counts, source, group=group)
    for (parameter, own), step, seed in zip(parameters, *counts.tolist(), strict=True):
        if step < 0:
            optimizer.state.pop(parameter, None)
            continue
        state: dict[str, Any] = optimizer.state[parameter]
        if not state:
            state.update(optimizer.state_for(parameter, optimizer.routes[parameter], own))
        state["step"] = step
        state.pop("seed", None)
        if seed >= 0:
            state["seed"] = seed
        for key in sorted(key for key, value in state.items() if isinstance(value, Tensor)):
            torch.distributed.broadcast(state[key], source, group=group)
