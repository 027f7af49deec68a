"""Rules that put momentum first: their gradients may enter it in backward, and never be formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from neurms.core.ground.errors import CheckpointError, check_choice
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.in_backward import (
    UpdateMode,
    check_model,
    drop_outside_of_graphs,
    is_asked_by_scaler,
    refuse_copy,
    refuse_scaler,
    refuse_updated,
)
from neurms.core.optimizers.momentum_layers import Entry, MomentumLayers, check_gathers
from neurms.core.optimizers.momentum_mover import MomentumMover
from neurms.core.optimizers.mover import Mover, Share
from neurms.core.optimizers.plan import Plan
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.view import View
from neurms.core.routing import Route
from neurms.core.taps.products import Product

__all__ = ["MomentumFirst"]


class MomentumFirst(PreconditionedOptimizer):
    """Base class of rules that need no gradient once their momentum has it.

    With ``update="backward"`` the backward of each ``nn.Linear`` whose weight the rule takes writes
    (1 - mu) D^T H into M, and the step reads M alone. ``weight.grad`` is never formed. All other
    parameters keep theirs.

    Args:
        params: As for :class:`PreconditionedOptimizer`; a model for ``"backward"``.
        settings: The rule's own settings that groups may differ in.
        common: :class:`~neurms.core.optimizers.settings.CommonSettings`.
        update: ``"step"`` or ``"backward"``.
    """

    one_backward: ClassVar[bool] = False
    """Whether what enters M depends on all of a step's gradient, which must come at once."""
    update_mode: UpdateMode = "step"
    momentum_layers: MomentumLayers | None = None
    """The layers whose weights have no gradient."""

    def __init__(
        self,
        params: Params,
        settings: Mapping[str, Any],
        common: Mapping[str, Any],
        update: UpdateMode,
    ) -> None:
        check_choice("update", update, ("step", "backward"))
        if update == "backward":
            check_model("params", params, 'update="backward"', ' use update="step"')
            self.update_mode = update
            self.momentum_layers = MomentumLayers(self, once=self.one_backward)
        super().__init__(params, settings, common)
        if self.momentum_layers is not None:
            assert isinstance(params, nn.Module)
            self.momentum_layers.attach(params, self.routes.values(), self.rule)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the taps of ``update="backward"`` back after :meth:`detach`."""
        if self.momentum_layers is not None:
            self.momentum_layers.put()

    def detach(self) -> None:
        """Remove all taps from the model: weights have gradients again, and move by those."""
        if self.momentum_layers is not None:
            self.momentum_layers.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold; taps would be on no model.

        Raises:
            TypeError: There are taps.
        """
        if self.momentum_layers is not None:
            refuse_copy(type(self).__name__)
        return super().__getstate__()

    # ---------------------------------------------------------------- parts

    def _completed(self, param_group: Any) -> dict[str, Any]:
        group = super()._completed(param_group)
        if self.update_mode == "backward" and group["rule"] == self.rule:
            check_gathers(self.recipe_of(group).momentum)
        return group

    def _made_mover(self, kind: str) -> Mover:
        if kind == self.rule and self.momentum_layers is not None:
            return MomentumMover(self._recipes.of, self.momentum_layers)
        return super()._made_mover(kind)

    def replaced(self, old: Route, new: Route) -> None:
        """Have a tap follow its weight to the parameter in its place."""
        if self.momentum_layers is not None:
            self.momentum_layers.follow(old, new)

    def plan(self) -> Plan:
        """Return the table of what happens to each parameter, with the gradients that are saved."""
        plan, layers = super().plan(), self.momentum_layers
        return plan if layers is None else plan.without(layers.unformed())

    # ---------------------------------------------------------------- what layers ask for

    def view_of(self, parameter: Tensor) -> View:
        """Return a parameter's view, with its state of now."""
        # Asked by every layer in every backward; whether groups have changed, the step will see.
        return (self._work or self.work()).current(parameter)

    def open(self, view: View) -> None:
        """Make a parameter's state if it is not there."""
        self._make_states([view])

    def entry(self, view: View, recipe: Recipe, product: Product) -> Entry:
        """Return what a gradient that is not formed enters the momentum with."""
        momentum = recipe.momentum
        share = 1.0 - momentum.momentum if momentum.average else 1.0
        return -share if view.group["maximize"] else share, 0.0

    # ---------------------------------------------------------------- the step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; of one that is in a momentum already, say so."""
        if torch.compiler.is_dynamo_compiling():
            drop_outside_of_graphs(self, set_to_none)
            return
        if self.momentum_layers is not None:
            self.momentum_layers.forget()
            self.work()
        super().zero_grad(set_to_none)

    def _shares(self, views: Sequence[View]) -> list[Share]:
        """Return the views of each mover; the rule's own has work where no parameter has views."""
        shares = super()._shares(views)
        if self.momentum_layers is not None:
            own = self.mover_of(self.rule)
            if all(mover is not own for mover, _ in shares):
                shares.append((own, []))
        return shares

    def move(self, shares: Sequence[Share]) -> None:
        """Take the step; what momenta hold is taken then."""
        super().move(shares)
        if self.momentum_layers is not None:
            self.momentum_layers.clear()

    def on_nonfinite(self, names: Sequence[str]) -> None:
        """Leave a step out whose gradients or signals are bad, or raise."""
        updated: list[str] = []
        if self.momentum_layers is not None:
            updated = self.momentum_layers.updated
            self.momentum_layers.clear()
        if updated and self.nonfinite == "raise":
            refuse_updated(names, updated)
        super().on_nonfinite(names)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        if self.update_mode == "backward" and is_asked_by_scaler():
            refuse_scaler()
        return False

    # ---------------------------------------------------------------- checkpoints

    def _check_settled(self, what: str) -> None:
        """Raise where momenta hold a gradient that no step has taken."""
        begun = self.momentum_layers.begun if self.momentum_layers is not None else []
        if begun:
            raise CheckpointError(
                f"{what} between backward and the step: the momentum of {begun[0]!r} holds a "
                'gradient that no step has taken (update="backward"), which a checkpoint does not '
                "tell; call it after step(), or after zero_grad() to begin anew"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state.

        Raises:
            CheckpointError: Backward has begun a step that was not taken.
        """
        self._check_settled("state_dict()")
        return super().state_dict()

    def verified(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict found to be this optimizer's, and fit for its mode of updates."""
        self._check_settled("load_state_dict()")
        known = super().verified(state_dict)
        if self.update_mode == "backward":
            for group in known["param_groups"]:
                if group["rule"] == self.rule:
                    _check_saved(group)
        return known


def _check_saved(group: Mapping[str, Any]) -> None:
    for name, wanted in (("nesterov", "False"), ("momentum", "positive")):
        if bool(group[name]) is (name == "nesterov"):
            raise CheckpointError(
                f'the checkpoint was saved with {name}={group[name]!r}, and update="backward" '
                f'needs it {wanted}; set it so in the checkpoint\'s "param_groups", or resume with '
                'update="step"'
            )
