"""The optimizer behind every recipe: the step, its checks, and what training loops expect.

It stands on two others: ``groups`` knows the parameters, their routes and recipes, and ``updates``
how they move. A subclass says which settings it has and which
:class:`~neurms.core.optimizers.recipe.Recipe` they make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from neurms.compiled.backends import use_backend
from neurms.core.ground.errors import NonFiniteError
from neurms.core.ground.interrupts import WholeStep
from neurms.core.ground.precision import without_autocast
from neurms.core.ground.spans import gradients_ready
from neurms.core.optimizers.checkpoint import restore, verified
from neurms.core.optimizers.groups import Params
from neurms.core.optimizers.plan import Plan, PlanRow, meta_like, skeleton, tensor_bytes
from neurms.core.optimizers.settings import check_common
from neurms.core.optimizers.updates import ParameterUpdates
from neurms.core.optimizers.work import Item, gathered, is_rehearsal, nonfinite_names
from neurms.core.routing import FALLBACK

__all__ = ["Params", "PreconditionedOptimizer"]


class PreconditionedOptimizer(ParameterUpdates):
    """Base class: a recipe for matrices and AdamW for the rest, in one optimizer object.

    Subclasses set :attr:`rule` and implement :meth:`recipe`; their ``__init__`` passes its own
    settings (which become parameter-group entries that schedulers and users may change) and the
    common ones on to this class.

    Args:
        params: A model (routed by module kind), parameters, named parameters or parameter groups.
            A group may name another rule of the library under ``"rule"``, or ``"fallback"``.
        settings: The rule's own settings, ``lr`` among them.
        common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        TypeError: Unknown setting, complex or integer parameter, a value of the wrong type.
        ValueError: A setting out of its range, a pattern of ``exclude`` that matches nothing.
    """

    pickled: ClassVar[tuple[str, ...]] = (
        "backend",
        "nonfinite",
        "low_precision",
        "skipped_steps",
        "_routes",
        "_exclude",
    )
    """Attributes that go along when an optimizer is pickled or deep-copied."""

    def __init__(
        self, params: Params, settings: Mapping[str, Any], common: Mapping[str, Any]
    ) -> None:
        chosen = check_common(self.rule, common)
        self.backend = chosen["backend"]
        self.nonfinite = chosen["nonfinite"]
        self.skipped_steps = 0
        super().__init__(params, settings, chosen)

    # ---------------------------------------------------------------- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss; called first, with gradients on.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            NonFiniteError: A gradient or statistic is NaN or infinite, or would make state so, and
                ``nonfinite="raise"``.
                Parameters and state are as they were before the call.
            TypeError: A gradient is sparse.
        """
        arguments = () if closure is None else (closure,)
        if _is_watched(self):
            return self._watched_step(*arguments)
        loss = self._step(*arguments)
        # A profiler that looks at few steps has no more than this.
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (self, *arguments), {})
        return loss

    # Keeps torch from wrapping it: its hooks and its profiler's span cost a tenth of a millisecond
    # where caches are cold, as they are after a backward pass, also when nobody listens.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients_ready()
        self._take(gathered(self.param_groups, self._routes))
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)

    def take_part(self) -> None:
        """Take part in what other ranks exchange in a step, on a rank that has no batch for it."""

    def _take(self, items: Sequence[Item]) -> bool:
        """Update the items' parameters, or return False and change nothing for a bad gradient."""
        if not self.state and is_rehearsal(items):
            self._prepare(items)
            return True
        if bad := self._bad_names(items):
            self._on_nonfinite(bad)
            return False
        device = items[0].parameter.device if items else torch.device("cpu")
        try:
            with use_backend(self.backend), without_autocast(device), WholeStep():
                self._update(items)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NonFiniteError(
                "a statistic of finite gradients overflowed or became singular, and this step was "
                "broken off half done; load the last checkpoint, then lower lr or clip gradients"
            ) from error
        return True

    def _bad_names(self, items: Sequence[Item]) -> list[str]:
        return nonfinite_names(items, self._greatest(items))

    def _greatest(self, items: Sequence[Item]) -> list[float]:
        """Return how large each gradient may be; AdamW's may overflow as they do in torch."""
        groups = {id(item.group): item.group for item in items if item.rule != FALLBACK}
        recipes = {key: self._recipe(group) for key, group in groups.items()}
        return [
            math.inf if item.rule == FALLBACK else recipes[id(item.group)].greatest(item.parameter)
            for item in items
        ]

    def _on_nonfinite(self, names: Sequence[str]) -> None:
        if self.nonfinite == "skip":
            self.skipped_steps += 1
            return
        raise NonFiniteError(
            f"the gradient of {', '.join(map(repr, names[:5]))} is NaN or infinite, or so large "
            "that what is kept of it would be; nothing was changed. "
            'Lower lr, clip gradients, or pass nonfinite="skip" to leave such steps out'
        )

    # ---------------------------------------------------------------- tables, copies, checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: torch's part and :attr:`pickled`."""
        own = {name: getattr(self, name) for name in self.pickled}
        return {**super().__getstate__(), **own, "_recipes": {}}

    def plan(self) -> Plan:
        """Return the table of what happens to each parameter, with predicted state bytes."""
        rows = []
        for group in self.param_groups:
            for parameter in group["params"]:
                route = self._routes[parameter]
                state = self.state_for(meta_like(parameter), route, group)
                moves = parameter.requires_grad and parameter.numel()
                rows.append(
                    PlanRow(
                        route.name,
                        route.kind,
                        route.rule,
                        route.reason if parameter.requires_grad else f"{route.reason} (frozen)",
                        tuple(parameter.shape),
                        tensor_bytes(state) if moves else 0,
                    )
                )
        return Plan(rows)

    @classmethod
    def predict(cls, model: nn.Module, **settings: Any) -> Plan:
        """Return the plan that the rule would have for ``model``, which is left as it is.

        Args:
            model: The model; only shapes, dtypes and module kinds are read.
            **settings: The rule's settings and the common ones.

        Returns:
            One row for each distinct parameter.
        """
        make: Callable[..., PreconditionedOptimizer] = cls
        # Constructing a rule that reads modules would put its taps on them.
        seen = skeleton(model) if cls.needs_modules else model
        return make(seen, **settings).plan()

    def state_bytes(self) -> int:
        """Return the measured bytes of all optimizer state held right now."""
        return sum(tensor_bytes(state) for state in self.state.values())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore settings and state exactly as saved, matching parameters by name where known.

        Args:
            state_dict: What :meth:`state_dict` returned, on any device, its groups in any order.

        Raises:
            CheckpointError: It belongs to another optimizer or model; nothing was changed.
        """
        state_dict = verified(self, state_dict)
        super().load_state_dict(state_dict)
        restore(self, state_dict)


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's profiler, or a hook other than the optimizer's own post hooks, is there."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )
