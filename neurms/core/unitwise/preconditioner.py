"""NeuRMS beside somebody else's optimizer: it scales gradients, the optimizer does the rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neurms.compiled.backends import use_backend
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError
from neurms.core.ground.interrupts import WholeStep
from neurms.core.ground.layout import default_layout
from neurms.core.ground.spans import gradients_ready
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.gradients import nonfinite_names
from neurms.core.optimizers.made_by import MADE_BY, made_by
from neurms.core.optimizers.plan import Plan, PlanRow, meta_like, tensor_bytes
from neurms.core.optimizers.settings import NonFinite
from neurms.core.optimizers.view import View
from neurms.core.routing import FALLBACK, Route
from neurms.core.taps.products import Product
from neurms.core.unitwise.checks import (
    backward_problem,
    checked_settings,
    default_settings,
    verified_state,
    warn_of_long_steps,
)
from neurms.core.unitwise.closures import ScaledGradients
from neurms.core.unitwise.engine import Engine
from neurms.core.unitwise.gradient_rule import gradient_routes
from neurms.core.unitwise.gradient_scaler import GradientScaler
from neurms.core.unitwise.layers import neurms_routes
from neurms.core.unitwise.lengths import length_like
from neurms.core.unitwise.mover import velocity_like
from neurms.core.unitwise.moves import Scaled, move_
from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.products import length_of, write_product_
from neurms.core.unitwise.rule import UnitwiseRule
from neurms.core.unitwise.scale_summary import MomentLayer, moment_layers
from neurms.core.unitwise.statistics import Factors
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["GradientPreconditioner"]

_COMPILED = "_orig_mod."


class GradientPreconditioner:
    """Turns any optimizer into its NeuRMS-preconditioned self by scaling gradients in place.

    Between backward and the optimizer's step, :meth:`precondition_` commits the statistics that its
    taps have gathered (see :class:`~neurms.core.unitwise.neurms.NeuRMS`) and overwrites ``.grad``
    of every tapped layer:

        G <- S G C                        biases: S (D^T 1);  variant B: G already is (D S)^T H
        G <- V <- momentum V + S G C      with ``momentum``; S V C with "gradient+velocity"

    divided by its average RMS with ``normalize="rms"`` (the optimizer's own momentum comes after
    that), then row-clipped with ``agc``. SGD(lr, momentum) beside it moves as NeuRMS(lr, momentum)
    does, but for ``normalize``. An optimizer that divides by its own running RMS (Adam) undoes most
    of a slowly varying scale. Other parameters' gradients are left as they are.

    ``variant="P"`` needs no taps. Beside SGD(lr) without momentum it moves as NeuRMS(lr,
    variant="P") does, with lr on AdamW's scale. SGD's own momentum then sums updates whose RMS is
    1, so that steps become up to 1 / (1 - momentum) times as long: ``momentum`` here averages
    gradients instead.

    ``update="backward"`` writes linear weights during backward with the lr and the momentum of the
    plain SGD that holds them, which finds no gradient for them and does the rest.

    Args:
        model: The model whose layers are tapped, from now on until :meth:`detach`.
        leave: Parameters to keep away from.
        optimizers: What moves the parameters. ``update="backward"`` needs them; with
            ``variant="P"`` an SGD among them whose steps would be long is warned of.
        **settings: NeuRMS's, but for ``lr`` and AdamW's. ``momentum`` adds a velocity of its own,
            for optimizers without one. ``weight_decay`` shrinks tapped weights by
            1 - lr weight_decay with the lr of their optimizer, beside its own decay.
            ``nonfinite="skip"`` makes :meth:`precondition_` return False.

    Raises:
        TypeError: ``model`` is no module; an unknown setting; a setting of the wrong type.
        ValueError: A setting is out of its range, or no layer of the model can be tapped.
        UnsupportedTrainingError: ``update="backward"`` and a tapped linear weight is not of full
            precision in a plain SGD (no Nesterov, dampening, weight decay or maximize).

    Reference:
        NeuRMS draft, "scale the gradient before the velocity". Settled here: gradients are scaled
        after all micro-batches were summed, from statistics committed once for each step.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        >>> preconditioner = GradientPreconditioner(model, variant="F")
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> if preconditioner.precondition_(optimizer):
        ...     optimizer.step()
        >>> optimizer.zero_grad()
        >>> preconditioner.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        leave: Collection[Tensor] = (),
        optimizers: Sequence[Optimizer] = (),
        **settings: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model={type(model).__name__} must be an nn.Module, whose layers are tapped"
            )
        self.settings = checked_settings(settings)
        self.nonfinite: NonFinite = self.settings["nonfinite"]
        self.backend: str = self.settings["backend"]
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.skipped_steps = 0
        self._scaled = ScaledGradients()
        self._rule = UnitwiseRule.of(self.settings)
        self._moments: GradientScaler | None = None
        self._optimizers = list(optimizers)
        self._groups: dict[Tensor, dict[str, Any]] = {}
        left = {id(parameter) for parameter in leave}
        head = self.settings["head"] or NeuRMS.default_head
        of = gradient_routes if self.settings["variant"] == "P" else neurms_routes
        self.routes = [
            replace(route, rule=FALLBACK, reason="left to another optimizer")
            if id(route.parameter) in left
            else route
            for route in of(model, NeuRMS.rule, head, self.settings["exclude"])
        ]
        self._names = {r.parameter: r.name.replace(_COMPILED, "") for r in self.routes}
        names = ("loss_reduction", "gemm", "loss_scale", "heads", "backend", "process_group")
        self.layers = Engine(self, **{name: self.settings[name] for name in names})
        if self.settings["variant"] == "P":
            self._moments = GradientScaler(
                self.routes, self.settings, default_settings(), self.state
            )
            self._attached = True
            warn_of_long_steps(self._optimizers, self.taken)
            return
        self._check_backward_optimizers()
        self.layers.attach(
            [route for route in self.routes if not route.is_fallback],
            in_backward=self._in_backward,
            model=model,
            guarded=self._names,
        )
        self._attached = True

    @property
    def _in_backward(self) -> bool:
        return bool(self.settings["update"] == "backward")

    def __iter__(self) -> Iterator[TappedLayer]:
        """Iterate over the tapped layers."""
        return iter(self.layers)

    def moment_layers(self) -> Iterator[MomentLayer]:
        """Yield the matrices of variant P whose gradients have been scaled; of others, none."""
        if self._moments is not None:
            structure = self._moments.structure
            yield from moment_layers((p, structure, self.state_of(p)) for p in self.taken)

    @property
    def taken(self) -> list[Tensor]:
        """The parameters whose gradients are scaled."""
        if self._moments is not None:
            return [route.parameter for route in self.routes if not route.is_fallback]
        return [p for x in self for p in (x.weight, x.bias) if p is not None]

    # ---------------------------------------------------------------- taps

    @property
    def attached(self) -> bool:
        """Whether the taps are in place."""
        return self._attached

    def attach(self) -> None:
        """Put the taps back after :meth:`detach`; again does nothing."""
        if not self._attached:
            self.layers.put()
            self._attached = True

    def detach(self) -> None:
        """Remove all taps from the model and what no step has taken yet; keep the state."""
        self.clear()
        self.layers.detach()
        self._attached = False

    def clear(self) -> None:
        """Drop the statistics that no step has taken.

        They also go by themselves when a backward pass finds that the gradients were dropped.
        """
        self._groups = {}
        self.layers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    # ------------------------------------------------------------- what layers ask of their owner

    def rule_of(self, weight: Tensor) -> UnitwiseRule:
        """Return the one rule of all layers, with the momentum of the SGD that it stands for."""
        momentum = self._momentum_of(weight)
        if momentum == self._rule.momentum:
            return self._rule
        return replace(self._rule, momentum=momentum)

    def seat_of(self, weight: Tensor) -> tuple[UnitwiseRule, dict[str, Any]]:
        """Return a weight's rule and its state."""
        return self.rule_of(weight), self.state_of(weight)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, empty before its first step."""
        return self.state.get(parameter, {})

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made if it is not there."""
        if parameter not in self.state:
            self.state[parameter] = self._new_state(parameter, parameter)
        return self.state[parameter]

    def write_in_backward(
        self,
        layer: TappedLayer,
        rule: UnitwiseRule,
        state: dict[str, Any],
        product: Product,
        factors: Factors,
    ) -> None:
        """Write W -= lr (D S)^T H C with the settings of the SGD that holds the weight."""
        rate = float(self._group_of(layer.weight)["lr"])
        decay = 1.0 - rate * self.settings["weight_decay"]
        velocity = state.get("momentum")
        length = length_of(layer) if rule.normalize else None
        write_product_(layer.weight, product, factors, rule, velocity, rate, decay, length)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        # Looked up anew after every step: loading an optimizer's state replaces its groups.
        if not self._groups:
            groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
            self._groups = {p: group for group in groups for p in group["params"]}
        return self._groups[parameter]

    def _momentum_of(self, weight: Tensor) -> float:
        """Return the momentum of the velocity that is kept here for a parameter."""
        own: float = self.settings["momentum"]
        layer = self.layers.of(weight)
        moved_here = layer is not None and layer.updated_in_backward
        return own or (self._group_of(weight)["momentum"] if moved_here else 0.0)

    def _check_backward_optimizers(self) -> None:
        if not self._in_backward:
            return
        holders = {p: o for o in self._optimizers for g in o.param_groups for p in g["params"]}
        for route in self.routes:
            weight = route.parameter
            if route.is_fallback or type(route.module) is not nn.Linear or weight.ndim < 2:
                continue
            problem = backward_problem(holders.get(weight), weight, self.settings["momentum"])
            if problem:
                raise UnsupportedTrainingError(
                    f'update="backward" cannot move {route.name!r}: {problem}; use update="step", '
                    'or neurms.NeuRMS(model, update="backward") as the optimizer itself'
                )

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def precondition_(self, target: Optimizer | Iterable[Tensor]) -> bool:
        """Commit the pending statistics and scale gradients in place; call it before the step.

        Args:
            target: The optimizer that will step, or parameters; only their gradients are touched,
                and only their layers' statistics are committed.

        Returns:
            True; False if a gradient or a statistic is NaN or infinite and ``nonfinite="skip"``:
            nothing was changed, and the optimizer must not step either.

        Raises:
            NonFiniteError: The same with ``nonfinite="raise"``.
            UnsupportedTrainingError: ``update="backward"`` and gradients were clipped, or a weight
                is used outside its layer, too.
            ValueError: ``weight_decay`` is set, and parameters were given, which have no lr.
        """
        gradients_ready()
        moving = {p: group for group in self._groups_in(target) for p in group["params"]}
        layers = [
            x for x in self if x.weight in moving or (x.bias is not None and x.bias in moving)
        ]
        views = self._views(moving)
        # Before anything is judged, so that all ranks judge alike.
        self.layers.prepare(layers, views)
        if bad := nonfinite_names(list(views.values())) or self._bad_statistics(layers):
            return self._refused(bad)
        self.layers.warn_of_still(layers, views)
        if self._moments is not None:
            with use_backend(self.backend), WholeStep():
                self._decay(self._moments.scale(moving), moving)
            self._scaled.are(moving, target)
            return True
        with use_backend(self.backend), WholeStep():
            self.layers.commit(layer for layer in layers if layer.observed.rows)
            parts = [part for layer in layers for part in self._parts_of(layer, views)]
            move_(parts, self._rule, self.layers.backend, into_gradients=True)
            self._decay((view.parameter for view, _, _ in parts), moving)
        self._groups = {}
        if self._in_backward:
            self.layers.clear()
        self._scaled.are(moving, target)
        return True

    def _groups_in(self, target: Optimizer | Iterable[Tensor]) -> list[dict[str, Any]]:
        if isinstance(target, Optimizer):
            return target.param_groups
        if self.settings["weight_decay"]:
            raise ValueError(
                f"weight_decay={self.settings['weight_decay']!r} needs a learning rate; pass the "
                "optimizer instead of parameters, or leave decay to it"
            )
        return [{"params": list(target), "lr": 0.0}]

    def _views(self, moving: Iterable[Tensor]) -> dict[int, View]:
        """Return a view of each parameter that has a gradient, by its identity."""
        own = {p: layer for layer in self for p in (layer.weight, layer.bias) if p is not None}
        views = {}
        for index, parameter in enumerate(moving):
            gradient, layer = parameter.grad, own.get(parameter)
            if gradient is None or parameter.numel() == 0:
                continue
            values = gradient if gradient.layout is torch.strided else gradient.coalesce().values()
            if layer is not None and parameter is layer.weight:
                route = layer.route
            else:
                name = self._names.get(parameter, f"param_{index}")
                route = Route(name, parameter, "tensor", FALLBACK, "", default_layout(parameter))
            bound = math.inf if layer is None else self._rule.greatest(parameter)
            views[id(parameter)] = View(index, route, {}, {}, values, bound=bound)
        return views

    def _bad_statistics(self, layers: Sequence[TappedLayer]) -> list[str]:
        own = {layer.name for layer in layers}
        # Backward updates that were left out have no sums to show for it.
        return [n for n in self.layers.bad_names() if n in own or self._in_backward]

    def _refused(self, names: Sequence[str]) -> bool:
        updated = ", ".join(self.layers.updated)
        if self._in_backward:
            self.layers.clear()
        if self.nonfinite == "skip":
            self.skipped_steps += 1
            return False
        raise NonFiniteError(
            f"the gradient or a statistic of {', '.join(map(repr, names[:5]))} is NaN or infinite; "
            + (f"backward had already updated: {updated}" if updated else "nothing was changed")
            + '. Lower lr, or pass nonfinite="skip" to leave such steps out'
        )

    def _parts_of(self, layer: TappedLayer, views: Mapping[int, View]) -> Iterator[Scaled]:
        """Yield a layer's parameters whose gradients are scaled."""
        step = layer.state.get("step")
        if not step:
            if layer.tap is not None and not layer.tap.fired and _has_gradient(layer):
                self._give_up(layer)
            return
        s, c = layer.factors()
        for parameter, factors in ((layer.weight, (s, c)), (layer.bias, (s, None))):
            view = views.get(id(parameter))
            if view is not None:
                view.state = self.opened_state(view.parameter)
                yield view, factors, step

    def _decay(self, scaled: Iterable[Tensor], moving: Mapping[Tensor, Any]) -> None:
        decay = self.settings["weight_decay"]
        for weight in scaled if decay else ():
            if weight.ndim >= 2:
                weight.mul_(1.0 - float(moving[weight]["lr"]) * decay)

    def _give_up(self, layer: TappedLayer) -> None:
        warn_user(
            f"layer {layer.name!r} has a gradient but no error signal of it was seen (its module "
            "is not called, or its weight is frozen), so its gradient goes unscaled to the "
            "optimizer; call the module itself, or name it in exclude"
        )
        self.layers.remove(layer)

    # ---------------------------------------------------------------- state

    def _new_state(self, parameter: Tensor, like: Tensor) -> dict[str, Any]:
        """Return fresh state on the device of ``like``: step, v and u of a weight; its velocity."""
        if self._moments is not None:
            return self._moments.new_state(parameter, like)
        layer = self.layers.of(parameter)
        state = {} if layer is None else layer.new_state(like)
        if self._momentum_of(parameter):
            state["momentum"] = velocity_like(like)
        if self._rule.normalize:
            state["length"] = length_like(like)
        return state

    def plan(self) -> Plan:
        """Return the table of what is preconditioned, with the bytes of state kept here."""
        taken, rows = set(self.taken), []
        for route in self.routes:
            ours = route.parameter in taken
            state = self._new_state(route.parameter, meta_like(route.parameter)) if ours else {}
            rows.append(
                PlanRow(
                    self._names[route.parameter],
                    route.kind,
                    NeuRMS.rule if ours else FALLBACK,
                    route.reason,
                    tuple(route.parameter.shape),
                    tensor_bytes(state),
                )
            )
        return Plan(rows)

    def state_bytes(self) -> int:
        """Return the measured bytes of all state held here right now."""
        return tensor_bytes(dict(enumerate(self.state.values())))

    def state_dict(self) -> dict[str, Any]:
        """Return statistics and velocities by parameter name, and a note of what made them.

        Tensors, plain numbers and strings only. The note, ``"made_by"``, is for readers:
        :meth:`load_state_dict` takes any, or none.
        """
        layers = {self._names[p]: dict(state) for p, state in self.state.items() if state}
        return {
            "layers": layers,
            "variant": self.settings["variant"],
            "skipped_steps": self.skipped_steps,
            MADE_BY: made_by(self.backend),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, bit for bit; pending statistics are dropped.

        Raises:
            CheckpointError: It belongs to another model or other settings; nothing was changed.
        """
        parameters = {self._names[parameter]: parameter for parameter in self.taken}
        self.state = verified_state(
            state_dict,
            parameters,
            self.settings["variant"],
            lambda p: self._new_state(p, meta_like(p)),
        )
        if self._moments is not None:
            self._moments.state = self.state
        self.skipped_steps = state_dict["skipped_steps"]
        self.clear()


def _has_gradient(layer: TappedLayer) -> bool:
    return layer.weight.grad is not None or (layer.bias is not None and layer.bias.grad is not None)
