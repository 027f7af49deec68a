"""NeuRMS: unitwise RMS preconditioning by scaling what backprop already holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Never, Self, Unpack

from torch import Tensor, nn

from neurms.core.ground.errors import CheckpointError, NonFiniteError, UnsupportedTrainingError
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.optimizers.view import View
from neurms.core.routing import Head, Route
from neurms.core.structures.unit_feature import Clip
from neurms.core.unitwise.engine import Engine
from neurms.core.unitwise.layers import neurms_routes
from neurms.core.unitwise.moments import Factors
from neurms.core.unitwise.mover import (
    UnitwiseMover,
    bias_to_fallback,
    to_fallback,
    velocity_like,
)
from neurms.core.unitwise.products import Product, write_product_
from neurms.core.unitwise.rule import Gemm, LossReduction, Rules, UnitwiseRule, Variant, check_modes
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["NeuRMS"]


class NeuRMS(PreconditionedOptimizer):
    """Unitwise RMS preconditioning: a layer's gradient scaled by the RMS of its units and features.

    With H (rows x n) a layer's inputs, D (rows x m) its per-row error signals and G = D^T H:

        v_i <- beta v_i + (1 - beta) mean_rows(D_i^2)
        u_j <- beta u_j + (1 - beta) mean_rows(H_j^2)
        s_i = clip(max(v_i + eps, v_min)^(-1/2), s_min, s_max)
        c_j = clip(max(u_j + eps, v_min)^(-1/2), c_min, c_max)

    Variant **U** moves W by -lr S G, **F** by -lr S G C; both leave the error that travels upstream
    alone. **B** sends D S upstream and uses it for the update, too. Biases move by -lr S (D^T 1).
    State per layer: m numbers, m + n for F; no moment for each parameter unless ``momentum`` is
    set.

    Linear layers and convolutions (the head and all their biases included) get this rule;
    embeddings, norms, tied and parametrized weights, ``nn.MultiheadAttention`` and weights whose
    layer is never called get AdamW: see :meth:`plan`. Statistics are those of backward passes that
    add to ``.grad``: k micro-batches with the loss divided by k count as one big batch, and so do
    the batches of several ranks. For B, which needs its scale while errors travel, each micro-batch
    is scaled by what has been seen so far, which is not one big batch; its ranks exchange m numbers
    in the backward of each layer, so every rank must use every layer.

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
        momentum_coupling: ``"gradient"``, or ``"gradient+velocity"`` to scale V by S and C once
            more.
        agc: Adaptive gradient clipping, or None: each row of the update, before lr, is at most
            agc max(||W_i||, 1e-3) long. Biases are left alone.
        clip: ``"absolute"`` bounds, or ``"relative"``: within ``kappa`` of the layer's median
            factor.
        kappa: Width of the relative clip.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over rows: D = N d or D = d,
            with d autograd's error signal and N all rows of the layer in the step.
        update: ``"step"``, or ``"backward"`` to write W -= lr (D S)^T H C during backward without
            ever forming G (linear layers; others move at the step). No clipping, accumulation,
            GradScaler or several ranks can act on a gradient that never exists: they are refused.
        loss_scale: Callable that returns a GradScaler's current scale (``scaler.get_scale``);
            without it a scaled loss makes all statistics too large.
        heads: Name pattern of weights -> number of heads whose outputs share one v (its mean).
        gemm: What ``update="backward"`` multiplies D and H in: ``"float32"``, or ``"bfloat16"``,
            which rounds them before their product (sums and weights stay as wide as they are) and
            takes a fraction of the time where the processor has AMX or AMD's AVX512-BF16, and more
            elsewhere: ``neurms doctor`` tells. Inputs that autocast has made bfloat16 are
            multiplied as such in any case.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`; ``weight_decay`` acts on
            weights, not on biases.

    Raises:
        TypeError: ``model`` is no module; an unknown setting; a setting of the wrong type.
        ValueError: A setting is out of its range, or no layer of the model is one the rule knows.

    Reference:
        "Unitwise RMS preconditioning via buffer scaling", draft, 2025: Algorithm 1 (B, U), section
        5 (F). Settled here: D is the per-row error, so that scales are the same in every layer,
        whatever the batch; micro-batches and ranks are summed before one commit at the step; bias
        correction is on.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> optimizer = neurms.NeuRMS(model, lr=1e-2, momentum=0.9)
        >>> loss = torch.nn.functional.cross_entropy(
        ...     model(torch.randn(3, 4)), torch.tensor([0, 1, 1])
        ... )
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    rule = "neurms"
    default_head: ClassVar[Head] = "rule"
    needs_modules = True

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
        loss_scale: Callable[[], Tensor | float] | None = None,
        heads: Mapping[str, int] | None = None,
        gemm: Gemm = "float32",
        **common: Unpack[CommonSettings],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model={type(model).__name__} must be an nn.Module: NeuRMS reads the error "
                "signals and inputs of layers, which parameters alone do not show; pass the model "
                "itself"
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
        check_modes(loss_reduction, update, gemm, loss_scale, agc)
        self.update_mode = update
        self.layers = Engine(
            self,
            loss_reduction=loss_reduction,
            gemm=gemm,
            loss_scale=loss_scale,
            heads=heads,
            backend=common.get("backend", "auto"),
            process_group=common.get("process_group"),
        )
        self._rules = Rules()
        super().__init__(model, settings, common)
        self.layers.attach(
            [route for route in self.routes.values() if route.rule == self.rule],
            in_backward=update == "backward",
            model=model,
            guarded=self.routes,
        )

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the unit-and-feature structure of these settings; raises on a bad one."""
        return Recipe((UnitwiseRule.of(settings).structure,), batched=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove all taps from the model; layers go on with the statistics they have."""
        self.layers.detach()

    def __getstate__(self) -> Never:
        """Refuse copies and pickles, whose taps would be on no model."""
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be copied or pickled: it is tied to its model by taps. Save "
            f"optimizer.state_dict(), build {name} on the copied model, and load it there"
        )

    # ---------------------------------------------------------------- routing and parts

    def route(self, model: nn.Module, head: Head) -> Iterable[Route]:
        """Return the route of every parameter, those of biases by their layers."""
        return neurms_routes(model, self.rule, head, self.exclude)

    def route_parameters(
        self, named: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[Route]:
        """Return the routes of parameters that come without their model.

        Raises:
            TypeError: One would be under the rule, which has to tap its layer.
        """
        routes = super().route_parameters(named, group)
        if lost := [route.name for route in routes if route.rule == self.rule]:
            raise TypeError(
                f"parameter {lost[0]!r} comes without its module, which {self.rule} has to tap; "
                "build the optimizer from a model that holds it, or give its group "
                '"rule": "fallback"'
            )
        return routes

    def replaced(self, old: Route, new: Route) -> None:
        """Have taps follow a weight to the parameter in its place."""
        self.layers.follow(old, new)

    def _made_mover(self, kind: str) -> Mover:
        if kind == self.rule:
            return UnitwiseMover(weakref.proxy(self), self.layers, self._rules)
        return super()._made_mover(kind)

    # ---------------------------------------------------------------- what layers ask for

    @property
    def loss_scale(self) -> Callable[[], Tensor | float] | None:
        """Returns the factor that the loss carries, or None."""
        return self.layers.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: Callable[[], Tensor | float] | None) -> None:
        self.layers.loss_scale = scale

    def rule_of(self, weight: Tensor) -> UnitwiseRule:
        """Return what the settings of a weight's group say."""
        return self._rules.of(self._view(weight).group)

    def _view(self, parameter: Tensor) -> View:
        # Asked by every layer in every backward; whether groups have changed, the step will see.
        return (self._work or self.work()).view_of(parameter)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, empty before its first step."""
        state: dict[str, Any] = self.state.get(parameter, {})
        return state

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state; momentum may have been switched on by a scheduler since."""
        state: dict[str, Any] = self.state[parameter]
        view = self._view(parameter)
        if not state:
            state.update(self.state_for(parameter, view.route, view.group))
        if view.group["momentum"] and "momentum" not in state:
            state["momentum"] = velocity_like(parameter)
        return state

    def write_in_backward(self, layer: TappedLayer, product: Product, factors: Factors) -> None:
        """Write W -= lr (D S)^T H C into the weight, or into its velocity first."""
        view, rule = self._view(layer.weight), layer.rule
        view.state = self.state[layer.weight]
        velocity = view.state["momentum"] if rule.momentum else None
        target, rate = view.target(), float(view.group["lr"])
        write_product_(target, product, factors, rule, velocity, rate, view.decay)
        view.written(target)

    # ---------------------------------------------------------------- the step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and with them the statistics that no step has taken."""
        self.layers.forget()
        self.work()
        super().zero_grad(set_to_none)

    def take_part(self) -> None:
        """Contribute no rows to the statistics of a step that other ranks take."""
        self.layers.clear()
        self.layers.synchronize(list(self.layers))
        self.layers.clear()

    def move(self, shares: Sequence[tuple[Mover, Sequence[View]]]) -> None:
        """Take the step; what it has seen is used up then."""
        super().move(shares)
        self.layers.clear()

    def on_nonfinite(self, names: Sequence[str]) -> None:
        """Leave a step out whose gradients or statistics are bad, or raise."""
        updated = self.layers.updated
        if self.update_mode == "backward":
            self.layers.clear()
        if updated and self.nonfinite == "raise":
            raise NonFiniteError(
                f"the gradient of {', '.join(map(repr, names[:5]))} is NaN or infinite and was not "
                'applied, but update="backward" had already updated in this pass: '
                f'{", ".join(updated)}. Lower lr, or use update="step", which checks everything '
                "before it changes anything"
            )
        super().on_nonfinite(names)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # The one thing that torch.amp.GradScaler asks of an optimizer before its step; its
        # unscaling writes gradients without autograd counting it, which the guard would miss.
        if self.update_mode != "backward" and self.loss_scale is None:
            raise UnsupportedTrainingError(
                "a GradScaler multiplies the loss, and with it the error signals that NeuRMS "
                "averages; pass loss_scale=scaler.get_scale to divide its scale out"
            )
        if self.update_mode == "backward":
            raise UnsupportedTrainingError(
                "a GradScaler divides gradients by its scale, which cannot reach weights that "
                'update="backward" moved without a gradient; use update="step", or bfloat16 '
                "without a scaler"
            )
        return False

    # ---------------------------------------------------------------- checkpoints

    def verified(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict found to be this optimizer's, its variant's too."""
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
        return super().verified(state_dict)

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Take a verified state dict over; layers that had gone to the fallback go there again."""
        super().restore(state_dict)
        self.layers.clear()
        for layer in list(self.layers):
            kept = {p: self.state.get(p, {}) for p in (layer.weight, layer.bias) if p is not None}
            if "exp_avg" in kept[layer.weight]:
                to_fallback(self, self.layers, layer)
            elif layer.bias is not None and "exp_avg" in kept[layer.bias]:
                bias_to_fallback(self, layer)
            self.state.update({p: state for p, state in kept.items() if state})


def _differ(saved: Any, own: str) -> bool:
    # What is no string may have an == that is no truth value.
    return not isinstance(saved, str) or saved != own
