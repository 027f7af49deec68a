"""NeuRMS beside somebody else's optimizer: it scales gradients, the optimizer does the rest."""

from __future__ import annotations

import math
import warnings
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
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.spans import gradients_ready, span
from neurms.core.optimizers.plan import Plan, PlanRow, meta_like, tensor_bytes
from neurms.core.optimizers.work import Item, nonfinite_names
from neurms.core.routing import FALLBACK, Route
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.guard import GradientGuard
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.checks import backward_problem, checked_settings, verified_state
from neurms.core.unitwise.gradient_scaling import precondition_gradient_
from neurms.core.unitwise.layer_update import Product, write_gemm_update_
from neurms.core.unitwise.layers import UnitwiseLayers, neurms_routes
from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.statistics import LossReduction, synchronize, world_size
from neurms.core.unitwise.tapped import Gemm, TappedLayer, Variant

__all__ = ["GradientPreconditioner"]

_COMPILED = "_orig_mod."


class GradientPreconditioner:
    """Turns any optimizer into its NeuRMS-preconditioned self by scaling gradients in place.

    Between backward and the optimizer's step, :meth:`precondition_` commits the statistics that its
    taps have gathered (see :class:`~neurms.core.unitwise.neurms.NeuRMS`) and overwrites ``.grad``
    of every tapped layer:

        G <- S G C                        biases: S (D^T 1);  variant B: G already is (D S)^T H
        G <- V <- momentum V + S G C      with ``momentum``; S V C with "gradient+velocity"

    then row-clipped with ``agc``. SGD(lr, momentum) beside it moves as NeuRMS(lr, momentum) does.
    An optimizer that divides by its own running RMS (Adam) undoes most of a slowly varying scale.
    Other parameters' gradients are left as they are.

    ``update="backward"`` writes linear weights during backward with the lr and the momentum of the
    plain SGD that holds them, which finds no gradient for them and does the rest.

    Args:
        model: The model whose layers are tapped, from now on until :meth:`detach`.
        leave: Parameters to keep away from.
        optimizers: What moves the parameters; needed for ``update="backward"`` alone.
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
        self.backend: str = self.settings["backend"]
        self.loss_reduction: LossReduction = self.settings["loss_reduction"]
        self.gemm: Gemm = self.settings["gemm"]
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.skipped_steps = 0
        (structure,) = NeuRMS.recipe(self.settings).transforms
        assert isinstance(structure, UnitFeatureDiagonal)
        self._structure = structure
        self._optimizers = list(optimizers)
        self._groups: dict[Tensor, dict[str, Any]] = {}
        left = {id(parameter) for parameter in leave}
        head = self.settings["head"] or NeuRMS.default_head
        self._routes = [
            replace(route, rule=FALLBACK, reason="left to another optimizer")
            if id(route.parameter) in left
            else route
            for route in neurms_routes(model, NeuRMS.rule, head, self.settings["exclude"])
        ]
        self._names = {r.parameter: r.name.replace(_COMPILED, "") for r in self._routes}
        self._layers = UnitwiseLayers(self, self.settings["heads"] or {})
        self._check_backward_optimizers()
        self._layers.attach(
            [route for route in self._routes if not route.is_fallback],
            features=self._structure.factored,
            in_backward=self._in_backward,
            model=model,
        )
        self._attached = True
        self._guard: GradientGuard | None = None
        if self._in_backward:
            self._guard = self._layers.guard_gradients(self._names)

    @property
    def _in_backward(self) -> bool:
        return bool(self.settings["update"] == "backward")

    def __iter__(self) -> Iterator[TappedLayer]:
        """Iterate over the tapped layers."""
        return iter(self._layers)

    # ---------------------------------------------------------------- taps

    @property
    def attached(self) -> bool:
        """Whether the taps are in place."""
        return self._attached

    def attach(self) -> None:
        """Put the taps back after :meth:`detach`; again does nothing."""
        if self._attached:
            return
        for layer in self:
            if layer.tap is not None:
                layer.tap.attach()
        if self._in_backward:
            self._guard = self._layers.guard_gradients(self._names)
        self._attached = True

    def detach(self) -> None:
        """Remove all taps from the model and what no step has taken yet; keep the state."""
        self.clear()
        self._layers.detach()
        if self._guard is not None:
            self._guard.detach()
        self._attached = False

    def clear(self) -> None:
        """Drop the statistics that no step has taken.

        They also go by themselves when a backward pass finds that the gradients were dropped.
        """
        self._groups = {}
        self._layers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    # ------------------------------------------------------------- what layers ask of their owner

    def structure_of(self, layer: TappedLayer) -> UnitFeatureDiagonal:
        """Return the one structure of all layers."""
        return self._structure

    def variant_of(self, layer: TappedLayer) -> Variant:
        """Return the one variant of all layers."""
        variant: Variant = self.settings["variant"]
        return variant

    def state_of(self, layer: TappedLayer) -> dict[str, Any]:
        """Return the state of the layer's weight, empty before its first commit."""
        return self.state.get(layer.weight, {})

    def current_loss_scale(self) -> Tensor | float | None:
        """Return what ``loss_scale`` returns, or None."""
        scale: Tensor | float | None = None
        if self.settings["loss_scale"] is not None:
            scale = self.settings["loss_scale"]()
        # A tensor is not looked into: that would wait for the device in every layer's backward.
        if isinstance(scale, (int, float)) and not 0 < scale < math.inf:
            raise ValueError(f"loss_scale() returned {scale!r}; it must be positive and finite")
        return scale

    def write_in_backward(
        self, layer: TappedLayer, errors: Tensor, activations: Tensor, sums: Sums
    ) -> None:
        """Write W -= lr (D S)^T H C with the settings of the SGD that holds the weight."""
        if not self._layers.accepts(layer, sums, self.settings["nonfinite"], activations):
            return
        group = {
            **self.settings,
            "lr": self._group_of(layer.weight)["lr"],
            "momentum": self._momentum_of(layer.weight),
        }
        state = self._state_for(layer.weight)
        factors = layer.foreseen(sums)
        layer.add(sums)
        product = Product(errors, activations, layer.scaled, self.gemm, layer.backend)
        with torch.no_grad(), use_backend(self.backend), span("update", [layer.weight]):
            write_gemm_update_(layer.weight, product, factors, state, group)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        # Looked up anew after every step: loading an optimizer's state replaces its groups.
        if not self._groups:
            groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
            self._groups = {p: group for group in groups for p in group["params"]}
        return self._groups[parameter]

    def _momentum_of(self, weight: Tensor) -> float:
        """Return the momentum of the velocity that is kept here for a parameter."""
        own: float = self.settings["momentum"]
        layer = self._layers.of(weight)
        moved_here = layer is not None and layer.updated_in_backward
        return own or (self._group_of(weight)["momentum"] if moved_here else 0.0)

    def _check_backward_optimizers(self) -> None:
        if not self._in_backward:
            return
        holders = {p: o for o in self._optimizers for g in o.param_groups for p in g["params"]}
        for route in self._routes:
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
        groups = self._groups_in(target)
        moving = {p: group for group in groups for p in group["params"]}
        layers = [
            x for x in self if x.weight in moving or (x.bias is not None and x.bias in moving)
        ]
        self._check_gradients(layers)
        self._layers.refuse_removed({p for p in moving if p.grad is not None})
        # Before anything is judged, so that all ranks judge alike.
        self._synchronize(layers)
        if bad := self._nonfinite_gradients(moving) or self._nonfinite_statistics(layers):
            return self._refused(bad)
        with use_backend(self.backend), WholeStep():
            for layer in self._observed(layers):
                self._precondition_layer(layer, moving)
        self._groups = {}
        if self._in_backward:
            self._layers.clear()
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

    def _nonfinite_gradients(self, moving: Iterable[Tensor]) -> list[str]:
        items = []
        for index, parameter in enumerate(moving):
            gradient = parameter.grad
            if gradient is None or parameter.numel() == 0:
                continue
            name = self._names.get(parameter, f"param_{index}")
            values = gradient if gradient.layout is torch.strided else gradient.coalesce().values()
            route = Route(name, parameter, "tensor", FALLBACK, "", default_layout(parameter))
            items.append(Item(index, route, {}, values))
        return nonfinite_names(items)

    def _nonfinite_statistics(self, layers: Sequence[TappedLayer]) -> list[str]:
        # Backward updates that were left out have no sums to show for it.
        left_out = self._layers.nonfinite_names() if self._in_backward else []
        device = layers[0].weight.device if layers else None
        good = [
            (part <= layer.observed.greatest()).all().to(device)
            for layer in layers
            for part in (layer.observed.units, layer.observed.features)
            if part is not None
        ]
        if left_out or not good or bool(torch.stack(good).all()):
            return left_out
        return [layer.name for layer in layers if not layer.observed.is_finite()]

    def _check_gradients(self, layers: Iterable[TappedLayer]) -> None:
        if self._guard is None:
            return
        self._guard.check()
        for layer in layers:
            if layer.updated_in_backward and layer.pending.rows and layer.weight.grad is not None:
                raise UnsupportedTrainingError(
                    f"weight {layer.name!r} was updated during backward and has a gradient too: it "
                    'is used outside its layer, which update="backward" cannot see; use '
                    'update="step"'
                )

    def _refused(self, names: Sequence[str]) -> bool:
        updated = ", ".join(self._layers.updated)
        if self._in_backward:
            self._layers.clear()
        if self.settings["nonfinite"] == "skip":
            self.skipped_steps += 1
            return False
        raise NonFiniteError(
            f"the gradient or a statistic of {', '.join(map(repr, names[:5]))} is NaN or infinite; "
            + (f"backward had already updated: {updated}" if updated else "nothing was changed")
            + '. Lower lr, or pass nonfinite="skip" to leave such steps out'
        )

    def _synchronize(self, layers: Sequence[TappedLayer]) -> None:
        # Only the given layers: sums that another optimizer's step will take are exchanged then.
        if layers and world_size() > 1:
            totals = [layer.begin_synchronization() for layer in layers]
            sizes = [layer.sizes for layer in layers]
            synchronize(totals, sizes, self.loss_reduction, layers[0].weight)

    def _observed(self, layers: Iterable[TappedLayer]) -> list[TappedLayer]:
        """Commit pending sums; return the layers with statistics, warn of those without any."""
        observed = []
        for layer in layers:
            if layer.observed.rows:
                self._state_for(layer.weight)
                layer.commit()
            if self.state_of(layer).get("step"):
                observed.append(layer)
            elif layer.tap is not None and not layer.tap.fired and _has_gradient(layer):
                self._give_up(layer)
        return observed

    def _give_up(self, layer: TappedLayer) -> None:
        warnings.warn(
            f"layer {layer.name!r} has a gradient but no error signal of it was seen (its module "
            "is not called, or its weight is frozen), so its gradient goes unscaled to the "
            "optimizer; call the module itself, or name it in exclude",
            UserWarning,
            stacklevel=5,
        )
        self._layers.remove(layer)

    def _precondition_layer(self, layer: TappedLayer, moving: Mapping[Tensor, Any]) -> None:
        s, c = layer.factors()
        for parameter, factors in ((layer.weight, (s, c)), (layer.bias, (s, None))):
            if parameter is None or parameter not in moving or parameter.grad is None:
                continue
            layout = layer.route.layout if parameter is layer.weight else default_layout(parameter)
            velocity = self._state_for(parameter).get("momentum")
            with span("scale", [parameter]):
                precondition_gradient_(parameter, layout, factors, velocity, self.settings)
            decay = self.settings["weight_decay"]
            if decay and parameter is layer.weight:
                parameter.mul_(1.0 - float(moving[parameter]["lr"]) * decay)

    # ---------------------------------------------------------------- state

    def _state_for(self, parameter: Tensor) -> dict[str, Any]:
        if parameter not in self.state:
            self.state[parameter] = self._new_state(parameter, parameter)
        return self.state[parameter]

    def _new_state(self, parameter: Tensor, like: Tensor) -> dict[str, Any]:
        """Return fresh state on the device of ``like``: step, v and u of a weight; its velocity."""
        state: dict[str, Any] = {}
        layer = self._layers.of(parameter)
        if layer is not None:
            sizes = self._structure.init(layer.state_matrix(like))
            state = {
                "step": 0,
                **{k: torch.zeros_like(x, device=like.device) for k, x in sizes.items()},
            }
        if self._momentum_of(parameter):
            state["momentum"] = torch.zeros_like(like, dtype=compute_dtype(like))
        return state

    def plan(self) -> Plan:
        """Return the table of what is preconditioned, with the bytes of state kept here."""
        biases = {layer.bias for layer in self if layer.bias is not None}
        rows = []
        for route in self._routes:
            ours = self._layers.of(route.parameter) is not None or route.parameter in biases
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
        """Return statistics and velocities by parameter name: tensors and plain numbers only."""
        layers = {self._names[p]: dict(state) for p, state in self.state.items() if state}
        return {
            "layers": layers,
            "variant": self.settings["variant"],
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, bit for bit; pending statistics are dropped.

        Raises:
            CheckpointError: It belongs to another model or other settings; nothing was changed.
        """
        parameters = {self._names[x.weight]: x.weight for x in self}
        parameters |= {self._names[x.bias]: x.bias for x in self if x.bias is not None}
        self.state = verified_state(
            state_dict,
            parameters,
            self.settings["variant"],
            lambda p: self._new_state(p, meta_like(p)),
        )
        self.skipped_steps = state_dict["skipped_steps"]
        self.clear()


def _has_gradient(layer: TappedLayer) -> bool:
    return layer.weight.grad is not None or (layer.bias is not None and layer.bias.grad is not None)
