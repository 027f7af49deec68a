"""NeuRMS: unitwise RMS preconditioning by scaling what backprop already holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import torch
from torch import Tensor, nn

from neurms.core.errors import check_choice, check_fraction, check_real
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.fallback import adamw_state
from neurms.core.optimizers.layer_update import write_gemm_update_, write_update_
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.optimizers.work import Item
from neurms.core.routing import FALLBACK, Head, Route, excluded
from neurms.core.statistics import LossReduction
from neurms.core.structures.unit_feature import Clip, UnitFeatureDiagonal
from neurms.core.tapped import TappedLayer, Variant
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise import UnitwiseLayers, neurms_routes

__all__ = ["NeuRMS"]


class NeuRMS(PreconditionedOptimizer):
    """Unitwise RMS preconditioning: a layer's gradient scaled by the RMS of its units and features.

    With H (rows x n) a layer's inputs, D (rows x m) its per-row error signals and G = D^T H:

        v_i <- beta v_i + (1 - beta) mean_rows(D_i^2)     s_i = clip(max(v_i + eps, v_min)^(-1/2), s_min, s_max)
        u_j <- beta u_j + (1 - beta) mean_rows(H_j^2)     c_j = clip(max(u_j + eps, v_min)^(-1/2), c_min, c_max)

    Variant **U** moves W by -lr S G, **F** by -lr S G C; both leave the error that travels upstream
    alone. **B** sends D S upstream and uses it for the update, too. Biases move by -lr S (D^T 1). State
    per layer: m numbers, m + n for F; no moment for each parameter unless ``momentum`` is set.

    Linear layers and convolutions (the head and all their biases included) get this rule; embeddings,
    norms, tied and parametrized weights, ``nn.MultiheadAttention`` and weights whose layer is never
    called get AdamW: see :meth:`plan`.

    Args:
        model: The model whose layers are tapped; parameters alone will not do.
        lr: Learning rate.
        variant: ``"U"``, ``"B"`` or ``"F"``.
        beta: Decay of the second moments (.99, .995, .999 in the draft).
        eps: Added to a second moment before its root.
        v_min: Floor of a second moment.
        s_min: Least unit factor; positive for the convergence theorem.
        s_max: Greatest unit factor.
        c_min: Least feature factor (F).
        c_max: Greatest feature factor (F).
        bias_correction: Divide the averages by 1 - beta^t; False is the draft's Algorithm 1.
        momentum: Velocity V <- momentum V + S G C, W <- W - lr V; 0 keeps no velocity.
        momentum_coupling: ``"gradient"``, or ``"gradient+velocity"`` to scale V by S and C once more.
        agc: Adaptive gradient clipping: ||dW_i|| <= agc max(||W_i||, 1e-3) for each row, or None.
        clip: ``"absolute"`` bounds, or ``"relative"``: within ``kappa`` of the layer's median factor.
        kappa: Width of the relative clip.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over rows: D = N d or D = d,
            with d autograd's error signal and N all rows of the layer in the step.
        update: ``"step"``, or ``"backward"`` to write W -= lr (D S)^T H C during backward without ever
            forming G (linear layers; others move at the step). No clipping, accumulation, GradScaler or
            several ranks can act on a gradient that never exists: they are refused.
        loss_scale: Callable that returns a GradScaler's current scale (``scaler.get_scale``).
        heads: Name pattern of weights -> number of heads whose outputs share one v (its mean).
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`; ``weight_decay`` acts on
            weights, not on biases.

    Raises:
        TypeError: ``model`` is no module; an unknown setting; a setting of the wrong type.
        ValueError: A setting is out of its range, or no layer of the model is one the rule knows.

    Reference:
        "Unitwise RMS preconditioning via buffer scaling", draft, 2025: Algorithm 1 (B, U), section 5 (F).
        Settled here: D is the per-row error, so that scales are the same in every layer, whatever the
        batch; micro-batches and ranks are summed before one commit at the step; bias correction is on.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = neurms.NeuRMS(model, lr=1e-2, momentum=0.9)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(3, 4)), torch.tensor([0, 1, 1])).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    rule = "neurms"
    default_head: Head = "rule"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        variant: Variant = "U",
        beta: float = 0.99,
        eps: float = 1e-8,
        v_min: float = 1e-12,
        s_min: float = 0.0,
        s_max: float = 100.0,
        c_min: float = 0.0,
        c_max: float = 100.0,
        bias_correction: bool = True,
        momentum: float = 0.0,
        momentum_coupling: Literal["gradient", "gradient+velocity"] = "gradient",
        agc: float | None = None,
        clip: Clip = "absolute",
        kappa: float = 10.0,
        loss_reduction: LossReduction = "mean",
        update: Literal["step", "backward"] = "step",
        loss_scale: Callable[[], float] | None = None,
        heads: Mapping[str, int] | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model={type(model).__name__} must be an nn.Module: NeuRMS reads the error signals and "
                "inputs of layers, which parameters alone do not show; pass the model itself"
            )
        settings = {
            "lr": lr,
            "variant": variant,
            "beta": beta,
            "eps": eps,
            "v_min": v_min,
            "s_min": s_min,
            "s_max": s_max,
            "c_min": c_min,
            "c_max": c_max,
            "bias_correction": bias_correction,
            "momentum": momentum,
            "momentum_coupling": momentum_coupling,
            "agc": agc,
            "clip": clip,
            "kappa": kappa,
        }
        self.loss_reduction: LossReduction = check_choice(
            "loss_reduction", loss_reduction, ("mean", "sum")
        )
        self.update_mode = check_choice("update", update, ("step", "backward"))
        self.loss_scale = loss_scale
        self._check_mode(agc)
        self._layers = UnitwiseLayers(self, heads or {})
        super().__init__(model, settings, common)
        self._layers.attach(
            [r for r in self._routes.values() if not r.is_fallback],
            features=variant == "F",
            in_backward=update == "backward",
        )
        self._guard = self._layers.guard_gradients(self._routes) if update == "backward" else None

    def _check_mode(self, agc: float | None) -> None:
        if self.loss_scale is not None and not callable(self.loss_scale):
            raise TypeError(
                f"loss_scale={self.loss_scale!r} must be callable, such as scaler.get_scale"
            )
        if self.update_mode != "backward":
            return
        if self.loss_scale is not None:
            raise ValueError(
                'loss_scale cannot go with update="backward": a GradScaler unscales gradients, and in '
                'that mode there are none; use update="step", or bfloat16 without a scaler'
            )
        if agc is not None:
            raise ValueError(
                f'agc={agc!r} cannot go with update="backward", which never forms the update that it '
                'would clip; use update="step" or agc=None'
            )

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the unit-and-feature structure of these settings; raises on a bad one."""
        check_choice("variant", settings["variant"], ("U", "B", "F"))
        check_fraction("momentum", settings["momentum"])
        check_choice(
            "momentum_coupling", settings["momentum_coupling"], ("gradient", "gradient+velocity")
        )
        if settings["agc"] is not None:
            check_real("agc", settings["agc"], strict=True, cure="None switches it off")
        names = ("beta", "eps", "v_min", "s_min", "s_max", "c_min", "c_max", "bias_correction")
        structure = UnitFeatureDiagonal(
            **{name: settings[name] for name in names},
            factored=settings["variant"] == "F",
            clip=settings["clip"],
            kappa=settings["kappa"],
        )
        return Recipe((structure,), batched=False)

    # ---------------------------------------------------------------- routing and taps

    def _route(self, model: nn.Module, head: Head) -> list[Route]:
        return neurms_routes(model, self.rule, head, self._exclude)

    def _routes_of(self, group: dict[str, Any]) -> list[Route]:
        routes = super()._routes_of(group)
        new = [r.name for r in routes if r.rule == self.rule and r.parameter not in self._routes]
        if new:
            raise TypeError(
                f"parameter {new[0]!r} comes without its module, which NeuRMS has to tap; build the "
                'optimizer from a model that holds it, or give its group "rule": "fallback"'
            )
        return routes

    def detach(self) -> None:
        """Remove all taps from the model; layers go on with the statistics they have."""
        self._layers.detach()
        if self._guard is not None:
            self._guard.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    # ---------------------------------------------------------------- what layers ask of their owner

    def structure_of(self, layer: TappedLayer) -> UnitFeatureDiagonal:
        """Return the structure that the layer's parameter group makes."""
        structure = self._recipe(self._group_of(layer.weight)).transforms[0]
        assert isinstance(structure, UnitFeatureDiagonal)
        return structure

    def variant_of(self, layer: TappedLayer) -> Variant:
        """Return the variant of the layer's parameter group."""
        variant: Variant = self._group_of(layer.weight)["variant"]
        return variant

    def state_of(self, layer: TappedLayer) -> dict[str, Any]:
        """Return the state of the layer's weight, empty before its first step."""
        return self.state.get(layer.weight, {})

    def current_loss_scale(self) -> float | None:
        """Return what ``loss_scale`` returns, checked, or None."""
        if self.loss_scale is None:
            return None
        scale = float(self.loss_scale())
        if not scale > 0:
            raise ValueError(f"loss_scale() returned {scale!r}; it must be positive")
        return scale

    def write_in_backward(
        self, layer: TappedLayer, errors: Tensor, activations: Tensor, sums: Sums
    ) -> None:
        """Write W -= lr (D S)^T H C into the weight, or into its velocity first."""
        if not self._layers.accepts(layer, sums, self.nonfinite):
            return
        group = self._group_of(layer.weight)
        state = self._layer_state(layer)
        s, c = layer.foreseen(sums)
        layer.add(sums)
        with torch.no_grad():
            item = Item(0, layer.route, group, layer.weight)
            target = self._target(item)
            write_gemm_update_(target, errors, activations, s, c, state, group)
            self._written(item, target)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if len(self.param_groups) == 1 or any(p is parameter for p in group["params"]):
                return group
        raise KeyError("the parameter is in no group of this optimizer")

    # ---------------------------------------------------------------- the step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and with them the statistics that no step has taken."""
        self._layers.clear()
        super().zero_grad(set_to_none)

    def _bad_names(self, items: Sequence[Item]) -> list[str]:
        if self._guard is not None:
            self._guard.check()
        bad = super()._bad_names(items)
        return bad or self._layers.nonfinite_names()

    def _on_nonfinite(self, names: Sequence[str]) -> None:
        self._layers.clear()
        super()._on_nonfinite(names)

    def _update(self, items: Sequence[Item]) -> None:
        self._layers.synchronize()
        for layer in self._layers.unfired({item.parameter for item in items}, self.state):
            self._to_fallback(layer, "its layer was never called")
        # Routes may just have changed, so items are looked up anew.
        super()._update([replace(item, route=self._routes[item.parameter]) for item in items])
        self._layers.clear()

    def _update_rule(self, items: Sequence[Item]) -> None:
        own = [item for item in items if item.rule == self.rule]
        super()._update_rule([item for item in items if item.rule != self.rule])
        by_parameter = {item.parameter: item for item in own}
        for layer in self._layers:
            weight = by_parameter.get(layer.weight)
            bias = by_parameter.get(layer.bias) if layer.bias is not None else None
            if layer.pending.rows and (weight is not None or layer.updated_in_backward):
                self._layer_state(layer)
                layer.commit()
            if self.state_of(layer).get("step"):
                self._move(layer, weight, bias)

    def _move(self, layer: TappedLayer, weight: Item | None, bias: Item | None) -> None:
        if weight is None and bias is None:
            return
        factors = layer.factors()
        for item in (weight, bias):
            if item is None:
                continue
            target = self._target(item)
            scales = factors if item is weight else (factors[0], None)
            write_update_(target, item, scales, self.state[item.parameter])
            self._written(item, target)

    def _layer_state(self, layer: TappedLayer) -> dict[str, Any]:
        state = self.state[layer.weight]
        if not state:
            state.update(self._new_state(layer.weight, self._group_of(layer.weight)))
        return state

    def _to_fallback(self, layer: TappedLayer, reason: str) -> None:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                route = self._routes[parameter]
                self._routes[parameter] = replace(route, rule=FALLBACK, reason=reason)
                self.state.pop(parameter, None)
        self._layers.remove(layer)

    # ---------------------------------------------------------------- state

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return fresh state: step, v and u for a weight; a velocity with momentum."""
        if route.rule != self.rule:
            return super().state_for(like, route, group)
        state: dict[str, Any] = {}
        layer = self._layers.of(route.parameter)
        if layer is not None:
            sizes = layer.state_matrix(like)
            shapes = self._recipe(group).init(sizes)
            state = {"step": 0, **{k: torch.zeros_like(x, device=like.device) for k, x in shapes.items()}}
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        if group["momentum"]:
            state["momentum"] = torch.zeros_like(like, dtype=wide)
        if self.low_precision == "master" and like.dtype != wide:
            state["master"] = like.detach().to(wide, copy=True)
        return state

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As in the base class; a layer that had gone to the fallback before saving goes there again."""
        if "exp_avg" in saved and not self._routes[parameter].is_fallback:
            return adamw_state(like)
        return super().expected_state(like, parameter, group, saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore settings and state exactly; see the base class. Pending statistics are dropped."""
        super().load_state_dict(state_dict)
        self._layers.clear()
        for layer in list(self._layers):
            if "exp_avg" in self.state.get(layer.weight, {}):
                kept = {p: self.state[p] for p in (layer.weight, layer.bias) if p in self.state}
                self._to_fallback(layer, "its layer was never called")
                self.state.update(kept)
