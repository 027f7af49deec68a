"""The engine of NeuRMS: tapped layers, their statistics in the step, their state in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Never

import torch
from torch import Tensor, nn

from neurms.compiled.finite import within
from neurms.core.ground.errors import CheckpointError, NonFiniteError, UnsupportedTrainingError
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import is_sharded, local, local_state, row_shard
from neurms.core.ground.spans import span
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.work import Item
from neurms.core.routing import FALLBACK, Head, Route
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.guard import GradientGuard
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.joint_commit import commit_each
from neurms.core.unitwise.joint_update import Move, moves_plainly, write_updates_
from neurms.core.unitwise.layer_update import Product, write_gemm_update_, write_update_
from neurms.core.unitwise.layers import UnitwiseLayers, neurms_routes
from neurms.core.unitwise.statistics import LossReduction
from neurms.core.unitwise.tapped import Gemm, TappedLayer, Variant

__all__ = ["UnitwiseOptimizer"]

_UNSEEN = "its layer was never seen in a backward pass"


class UnitwiseOptimizer(PreconditionedOptimizer):
    """An optimizer whose rule reads D and H of tapped layers; :class:`NeuRMS` has the settings.

    It is what :class:`~neurms.core.unitwise.tapped.TappedLayer` calls its owner.

    Args:
        model: The model whose layers are tapped.
        settings: Settings of the parameter group.
        common: :class:`~neurms.core.optimizers.settings.CommonSettings`.
        loss_reduction: How the loss reduces over rows.
        update: Whether linear layers move at the ``"step"`` or during ``"backward"``.
        gemm: What the latter multiplies in.
        loss_scale: Returns the factor that the loss carries, or None.
        heads: Name pattern of weights -> number of heads that share second moments.
    """

    default_head: ClassVar[Head] = "rule"
    needs_modules = True
    layers_class: ClassVar[type[UnitwiseLayers]] = UnitwiseLayers
    """What holds the tapped layers; adapters to other frameworks bring taps of their own."""

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Any],
        common: Mapping[str, Any],
        *,
        loss_reduction: LossReduction,
        update: Literal["step", "backward"],
        gemm: Gemm,
        loss_scale: Callable[[], Tensor | float] | None,
        heads: Mapping[str, int] | None,
    ) -> None:
        self.loss_reduction: LossReduction = loss_reduction
        self.loss_scale = loss_scale
        self.update_mode = update
        self.gemm: Gemm = gemm
        self._layers = self.layers_class(self, heads)
        self._guard: GradientGuard | None = None
        self._structures: dict[int, tuple[dict[str, Any], UnitFeatureDiagonal]] = {}
        self._group_table: tuple[list[int], dict[int, dict[str, Any]]] = ([], {})
        super().__init__(model, settings, common)
        self._layers.attach(
            [route for route in self._routes.values() if route.rule == self.rule],
            features=settings["variant"] == "F",
            in_backward=update == "backward",
            model=model,
        )
        if update == "backward":
            self._guard = self._layers.guard_gradients(self._routes)

    # ---------------------------------------------------------------- routing and taps

    def _route(self, model: nn.Module, head: Head) -> list[Route]:
        return neurms_routes(model, self.rule, head, self._exclude)

    def _routes_of(self, group: dict[str, Any]) -> list[Route]:
        routes = super()._routes_of(group)
        new = [r.name for r in routes if r.rule == self.rule and r.parameter not in self._routes]
        if new:
            raise TypeError(
                f"parameter {new[0]!r} comes without its module, which {self.rule} has to tap; "
                "build the optimizer from a model that holds it, or give its group "
                '"rule": "fallback"'
            )
        return routes

    def detach(self) -> None:
        """Remove all taps from the model; layers go on with the statistics they have."""
        self._layers.detach()
        if self._guard is not None:
            self._guard.detach()

    def __getstate__(self) -> Never:
        """Refuse copies and pickles, whose taps would be on no model."""
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be copied or pickled: it is tied to its model by taps. Save "
            f"optimizer.state_dict(), build {name} on the copied model, and load it there"
        )

    # ---------------------------------------------------------------- what layers ask for

    def structure_of(self, layer: TappedLayer) -> UnitFeatureDiagonal:
        """Return the structure that the layer's parameter group makes."""
        group = self._group_of(layer.weight)
        known = self._structures.get(id(group))
        # Asked several times a step; users may change any setting between two of them.
        if known is None or known[0] != group:
            structure = self._recipe(group).transforms[0]
            assert isinstance(structure, UnitFeatureDiagonal)
            known = self._structures[id(group)] = (dict(group), structure)
        return known[1]

    def variant_of(self, layer: TappedLayer) -> Variant:
        """Return the variant of the layer's parameter group."""
        variant: Variant = self._group_of(layer.weight)["variant"]
        return variant

    def state_of(self, layer: TappedLayer) -> dict[str, Any]:
        """Return the state of the layer's weight, empty before its first step."""
        state: dict[str, Any] = self.state.get(layer.weight, {})
        return state

    def current_loss_scale(self) -> Tensor | float | None:
        """Return what ``loss_scale`` returns, or None."""
        if self.loss_scale is None:
            return None
        scale = self.loss_scale()
        # A tensor is not looked into: that would wait for the device in every layer's backward.
        if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
            raise ValueError(f"loss_scale() returned {scale!r}; it must be positive and finite")
        return scale

    def write_in_backward(
        self, layer: TappedLayer, errors: Tensor, activations: Tensor, sums: Sums
    ) -> None:
        """Write W -= lr (D S)^T H C into the weight, or into its velocity first."""
        if not self._layers.accepts(layer, sums, self.nonfinite, activations):
            return
        group = self._group_of(layer.weight)
        state = self._state_with_velocity(layer.weight, group)
        factors = layer.foreseen(sums)
        layer.add(sums)
        weight = layer.weight
        product = Product(errors, activations, layer.scaled, self.gemm, layer.backend)
        with torch.no_grad(), span("update", [weight]):
            if weight.dtype is torch.float32:
                write_gemm_update_(weight, product, factors, state, group)
                return
            item = Item(0, layer.route, group, weight)
            target = self._target(item)
            write_gemm_update_(target, product, factors, state, group)
            self._written(item, target)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        identities = [id(group) for group in self.param_groups]
        if identities != self._group_table[0]:
            table = {id(p): group for group in self.param_groups for p in group["params"]}
            self._group_table = (identities, table)
        # By identity: a tensor's own hash is a call of Python's, and this is asked often.
        return self._group_table[1][id(parameter)]

    # ---------------------------------------------------------------- the step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and with them the statistics that no step has taken."""
        self._layers.clear()
        if self._guard is not None:
            self._guard.forget()
        super().zero_grad(set_to_none)

    def take_part(self) -> None:
        """Contribute no rows to the statistics of a step that other ranks take."""
        self._layers.clear()
        self._layers.synchronize()
        self._layers.clear()

    def _bad_names(self, items: Sequence[Item]) -> list[str]:
        if self._guard is not None:
            self._guard.check()
            self._refuse_second_gradient(items)
        self._layers.refuse_removed({item.parameter for item in items})
        # Before anything is judged, so that all ranks judge alike.
        self._layers.synchronize()
        gradients = [item.gradient for item in items]
        if not all(item.rule in (self.rule, FALLBACK) for item in items):
            return super()._bad_names(items) or self._layers.nonfinite_names()
        if self._layers.are_finite_with(gradients):
            return []
        plain = all(type(gradient) is Tensor and gradient.is_cpu for gradient in gradients)
        bounds = [torch.finfo(gradient.dtype).max for gradient in gradients]
        bad = [] if plain and within(gradients, bounds) else super()._bad_names(items)
        return bad or self._layers.nonfinite_names()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # The one thing that torch.amp.GradScaler asks of an optimizer before its step; its
        # unscaling writes gradients without autograd counting it, which the guard would miss.
        if self.update_mode == "backward":
            raise UnsupportedTrainingError(
                "a GradScaler divides gradients by its scale, which cannot reach weights that "
                'update="backward" moved without a gradient; use update="step", or bfloat16 '
                "without a scaler"
            )
        return False

    def _refuse_second_gradient(self, items: Sequence[Item]) -> None:
        for item in items:
            layer = self._layers.of(item.parameter)
            if layer is not None and layer.updated_in_backward and layer.pending.rows:
                raise UnsupportedTrainingError(
                    f"weight {layer.name!r} was updated during backward and has a gradient too: it "
                    'is used outside its layer, which update="backward" cannot see; use '
                    'update="step"'
                )

    def _on_nonfinite(self, names: Sequence[str]) -> None:
        updated = self._layers.updated
        if self.update_mode == "backward":
            self._layers.clear()
        if updated and self.nonfinite == "raise":
            raise NonFiniteError(
                f"the gradient of {', '.join(map(repr, names[:5]))} is NaN or infinite and was not "
                'applied, but update="backward" had already updated in this pass: '
                f'{", ".join(updated)}. Lower lr, or use update="step", which checks everything '
                "before it changes anything"
            )
        super()._on_nonfinite(names)

    def _update(self, items: Sequence[Item]) -> None:
        moving = {item.parameter for item in items}
        for layer in self._layers.unfired(moving, self.state):
            self._layer_to_fallback(layer)
        for layer in self._layers.orphans(moving, self.state):
            self._bias_to_fallback(layer)
        # Routes may just have changed.
        super()._update(
            [
                item
                if item.route is (route := self._routes[item.parameter])
                else replace(item, route=route)
                for item in items
            ]
        )
        self._layers.clear()

    def _update_rule(self, items: Sequence[Item]) -> None:
        own = {item.parameter: item for item in items if item.rule == self.rule}
        if others := [item for item in items if item.rule != self.rule]:
            super()._update_rule(others)
        ready = [layer for layer in self._layers if layer.observed.rows and _moved(layer)]
        for layer in ready:
            self._state_with_velocity(layer.weight, self._group_of(layer.weight))
        commit_each(ready)
        plain: list[Move] = []
        for layer in self._layers:
            weight = own.get(layer.weight)
            bias = own.get(layer.bias) if layer.bias is not None else None
            if (weight or bias) is None or not self.state_of(layer).get("step"):
                continue
            s, c = layer.factors()
            for item, factors in ((weight, (s, c)), (bias, (s, None))):
                if item is None:
                    continue
                state = self._state_with_velocity(item.parameter, item.group)
                if item is bias:
                    state["step"] += 1
                if layer.prompt and moves_plainly(item, factors, state):
                    plain.append(Move(item, factors, state))
                else:
                    self._move(layer, item, factors, state)
        write_updates_(plain)

    def _move(
        self,
        layer: TappedLayer,
        item: Item,
        factors: tuple[Tensor, Tensor | None],
        state: dict[str, Any],
    ) -> None:
        target = self._target(item)
        if not target.numel():
            return
        with span("update", [item.parameter]):
            own, own_factors = _on_this_rank(item, factors)
            write_update_(target, own, own_factors, local_state(state), layer.backend)
            self._written(item, target)

    # ---------------------------------------------------------------- routes that change

    def _layer_to_fallback(self, layer: TappedLayer) -> None:
        self._layers.remove(layer)
        self._to_fallback(layer.weight)
        self._bias_to_fallback(layer)

    def _bias_to_fallback(self, layer: TappedLayer) -> None:
        if layer.bias is not None:
            self._to_fallback(layer.bias)
        layer.bias = None

    def _to_fallback(self, parameter: Tensor) -> None:
        route = replace(self._routes[parameter], rule=FALLBACK, reason=_UNSEEN)
        self._routes[parameter] = route
        self.state.pop(parameter, None)

    # ---------------------------------------------------------------- state

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return fresh state: a step, v and u for a weight, a velocity with momentum."""
        if route.rule != self.rule:
            return super().state_for(like, route, group)
        state: dict[str, Any] = {"step": 0}
        layer = self._layers.of(route.parameter)
        if layer is not None:
            shapes = self._recipe(group).init(layer.state_matrix(like))
            state |= {k: torch.zeros_like(v, device=like.device) for k, v in shapes.items()}
        if group["momentum"]:
            state["momentum"] = _velocity(like)
        if self.low_precision == "master" and like.dtype != compute_dtype(like):
            state["master"] = like.detach().to(compute_dtype(like), copy=True)
        return state

    def _state_with_velocity(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a parameter's state; momentum may have been switched on by a scheduler since."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(self._new_state(parameter, group))
        if group["momentum"] and "momentum" not in state:
            state["momentum"] = _velocity(parameter)
        return state

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As in the base class, save that what may change in training follows the checkpoint.

        A layer that had gone to the fallback before saving goes there again, and a velocity is
        there if momentum ever was.
        """
        route = self._routes[parameter]
        if route.rule != self.rule:
            return super().expected_state(like, parameter, group, saved)
        if "exp_avg" in saved:
            return super().state_for(like, replace(route, rule=FALLBACK), group)
        momentum = 0.9 if "momentum" in saved else 0.0
        return self.state_for(like, route, {**group, "momentum": momentum})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore settings and state exactly; see the base class. Pending statistics are dropped.

        Raises:
            CheckpointError: It belongs to another optimizer, model or variant; nothing was changed.
        """
        self._check_variant(state_dict)
        super().load_state_dict(state_dict)
        self._layers.clear()
        for layer in list(self._layers):
            kept = {p: self.state.get(p, {}) for p in (layer.weight, layer.bias) if p is not None}
            if "exp_avg" in kept[layer.weight]:
                self._layer_to_fallback(layer)
            elif layer.bias is not None and "exp_avg" in kept[layer.bias]:
                self._bias_to_fallback(layer)
            self.state.update({p: state for p, state in kept.items() if state})

    def _check_variant(self, state_dict: Mapping[str, Any]) -> None:
        groups = state_dict.get("param_groups", ()) if isinstance(state_dict, Mapping) else ()
        own = self.param_groups[0]["variant"]
        # What has not even the form of a checkpoint is left to the base class's check.
        for group in groups if isinstance(groups, (list, tuple)) else ():
            ours = isinstance(group, Mapping) and group.get("rule") == self.rule
            if ours and _differ(saved := group.get("variant", own), own):
                raise CheckpointError(
                    f"the checkpoint was saved with variant={saved!r}, this optimizer has "
                    f"variant={own!r}, whose statistics mean something else; build it with "
                    f"variant={saved!r}"
                )


def _moved(layer: TappedLayer) -> bool:
    """Return whether a layer's weight has a gradient, or needs none."""
    return layer.weight.grad is not None or layer.updated_in_backward


def _on_this_rank(
    item: Item, factors: tuple[Tensor | None, Tensor | None]
) -> tuple[Item, tuple[Tensor | None, Tensor | None]]:
    """Return the item and the factors of the rows that this rank holds of its parameter."""
    if not is_sharded(item.parameter):
        return item, factors
    shard = row_shard(item.parameter, item.route.layout)
    assert shard is not None, "layers that are cut otherwise are refused when they are attached"
    layout, s, c = shard.narrowed(item.route.layout, *factors)
    route = replace(item.route, layout=layout)
    return replace(item, route=route, gradient=local(item.gradient)), (s, c)


def _differ(saved: Any, own: str) -> bool:
    # What is no string may have an == that is no truth value.
    return not isinstance(saved, str) or saved != own


def _velocity(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=compute_dtype(parameter), requires_grad=False)
