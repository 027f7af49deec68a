"""NeuRMS: unitwise RMS preconditioning by scaling what backprop already holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
from torch import Tensor, nn

from neurms.core.ground.errors import CheckpointError, UnsupportedTrainingError
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
from neurms.core.optimizers.mover import Mover, Share
from neurms.core.optimizers.plan import Plan
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.optimizers.sharing import refuse_division
from neurms.core.optimizers.view import View
from neurms.core.routing import Head, Route
from neurms.core.structures.gradient_moments import Measured
from neurms.core.structures.unit_feature import Clip
from neurms.core.taps.products import Product
from neurms.core.unitwise.engine import Engine
from neurms.core.unitwise.gradient_mover import GradientMover, structure_of
from neurms.core.unitwise.gradient_rule import check_probed, gradient_recipe, gradient_routes
from neurms.core.unitwise.groups import NO_ASCENT, check_shared, check_written
from neurms.core.unitwise.layers import neurms_routes
from neurms.core.unitwise.lengths import length_like
from neurms.core.unitwise.mover import (
    UnitwiseMover,
    bias_to_fallback,
    to_fallback,
    velocity_like,
)
from neurms.core.unitwise.probed import ProbedLayers
from neurms.core.unitwise.probed_mover import ProbedMover
from neurms.core.unitwise.products import length_of, write_product_
from neurms.core.unitwise.rule import (
    Gemm,
    LossReduction,
    Normalize,
    Rules,
    UnitwiseRule,
    Variant,
    check_modes,
)
from neurms.core.unitwise.scale_summary import MomentLayer, moment_layers
from neurms.core.unitwise.statistics import Factors
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

    Variant **P**, the default, scales by the gradient's own moments instead, q_i of its row sums of
    squares and s_j of its column sums, W by -lr G_ij sqrt(T / (q_i s_j)) with T = (sum q + sum s) /
    2; see :class:`~neurms.core.structures.gradient_moments.GradientMoments`. A layer's bias is one
    more column of its matrix. Updates have an RMS of about 1, so that lr is on AdamW's scale. There
    are no taps: ``model`` may also be parameters or parameter groups (matrices get the rule),
    compiled models stay whole, and accumulation, GradScaler, DDP and FSDP2 need nothing. It takes
    what every rule takes: ``nn.MultiheadAttention`` too. ``momentum`` averages G before the
    factors. With ``moments="average"`` q and s are of the squares of what moves W, the averaged
    gradient, and nothing else is averaged; it goes with ``nesterov=True`` and a momentum of .8, for
    one more read of G and of M. Of the settings below P has
    ``beta``, ``momentum``, ``kappa``, ``nesterov``, ``moments`` and ``damping``.

    ``normalize="rms"`` divides what moves a tensor, but for lr, by the average of its own RMS, so
    that the rate is on AdamW's scale: a step of about lr in every entry, and never more than 10 lr
    in RMS. With U_t = S G C, or V with ``momentum``:

        l_t = (.9 (1 - .9^(t-1)) l_(t-1) + .1 RMS(U_t)) / (1 - .9^t)
        W <- W - lr U_t / l_t

    One number of state more for each weight and each bias. A bias has a length of its own: its
    gradient does not carry the scale of the layer's inputs, as the weight's in U and B does, so
    that the weight's length would make its steps 1 / RMS(H) times as long. Nothing depends on the
    loss's scale then, but for ``eps``, ``v_min`` and absolute bounds. Momentum adds one more read
    of V and of its update to the cost of one more read of G.

    Under U, B and F linear layers and convolutions (the head and all their biases included) get
    this rule; embeddings, norms, tied and parametrized weights, ``nn.MultiheadAttention`` and
    weights whose layer is never called get AdamW: see :meth:`plan`. Statistics are those of
    backward passes that add to ``.grad``: k micro-batches with the loss divided by k count as one
    big batch, and so do the batches of several ranks. For B, which needs its scale while errors
    travel, each micro-batch is scaled by what has been seen so far, which is not one big batch; its
    ranks exchange m numbers in the backward of each layer, so every rank must use every layer.

    Parameter groups go beside the model, as ``groups=[{"params": model.head, "lr": 1e-3}, ...]``,
    with any setting of their own that a group of torch's may have, another variant (not P beside
    the others) or another rule. A layer's weight and bias share their statistics, and so must
    their groups the settings of those.

    Args:
        model: The model whose layers are tapped; parameters alone will do for P only.
        lr: Learning rate. P's is on AdamW's scale; deep networks without norms or a warmup want a
            tenth of the default.
        variant: ``"P"``, or the draft's ``"U"``, ``"B"`` and ``"F"``.
        beta: Decay of the second moments (.99, .995, .999 in the draft); None is .99, .95 for P,
            and 0 for P's moments of an average.
        eps: Added to a second moment before its root.
        v_min: Floor of a second moment.
        s_min: Least unit factor; the draft's Theorem 1 wants it positive, and does not hold
            for Algorithm 1 as written: see
            :class:`~neurms.core.structures.unit_feature.UnitFeatureDiagonal`.
        s_max: Greatest unit factor.
        c_min: Least feature factor (F).
        c_max: Greatest feature factor (F).
        bias_correction: Divide the averages by 1 - beta^t; False is the draft's Algorithm 1.
        momentum: Velocity V <- momentum V + S G C, W <- W - lr V; 0 keeps no velocity. For P the
            average M <- momentum M + (1 - momentum) G that is scaled in G's place.
        momentum_coupling: ``"gradient"``, or ``"gradient+velocity"`` to scale V by S and C once
            more.
        agc: Adaptive gradient clipping, or None: each row of the update, before lr, is at most
            agc max(||W_i||, 1e-3) long. Biases are left alone.
        clip: ``"absolute"`` bounds, or ``"relative"``: within ``kappa`` of the layer's median
            factor.
        kappa: Width of the relative clip, and of P's.
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
        probes: Pairs of probes a step from which P estimates moments with ``update="backward"``.
        seed: Of the probes; with a layer's name and the step it determines them.
        normalize: ``"rms"``: updates divided by the average of their RMS, before ``agc``; None is
            the draft. ``update="backward"`` without momentum never forms the update: the square of
            its norm is estimated without bias from 4 probes z of random signs, ||S D^T (H C z)||^2,
            the same in a resumed run.
        nesterov: Whether P's gradient enters what moves W once more: momentum M + (1 - momentum) G.
        moments: What P's moments are of: the ``"gradient"``, or what moves W, the ``"average"``.
        damping: delta of P: (s_j + delta mean(s)) / (1 + delta) stands for s_j. The larger, the
            less features are scaled against each other; units are always. None is 0, and .1 for
            moments of an average, whose step it bounds: an RMS of sqrt((1 + delta) / delta) lr.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`; ``weight_decay`` acts on
            weights, not on biases.

    Raises:
        TypeError: ``model`` is no module; an unknown setting; a setting of the wrong type.
        ValueError: A setting is out of its range, or no layer of the model is one the rule knows.

    Reference:
        "Unitwise RMS preconditioning via buffer scaling", draft, 2025: Algorithm 1 (B, U) and its
        factored form (F). Settled here: D is the per-row error, so that scales are the same in
        every layer, whatever the batch; micro-batches and ranks are summed before one commit at
        the step; bias correction is on. ``normalize`` and P are additions; P is
        Adafactor's fit of G^2.

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
        model: Params,
        lr: float = 1e-2,
        variant: Variant = "P",
        beta: float | None = None,
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
        update: UpdateMode = "step",
        loss_scale: Callable[[], Tensor | float] | None = None,
        heads: Mapping[str, int] | None = None,
        gemm: Gemm = "float32",
        probes: int = 4,
        seed: int = 0,
        normalize: Normalize | None = None,
        nesterov: bool = False,
        moments: Measured = "gradient",
        damping: float | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        if variant != "P" or update != "step":
            alone = ', where nobody has it (ZeroRedundancyOptimizer), variant="P"'
            check_model("model", model, "NeuRMS", alone)
        refuse_division(self.rule, common.get("distribute", "auto"))
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
            "probes": probes,
            "seed": seed,
            "normalize": normalize,
            "nesterov": nesterov,
            "moments": moments,
            "damping": damping,
        }
        check_modes(loss_reduction, update, gemm, loss_scale, agc)
        self.probed = variant == "P"
        if self.probed:
            own = {"loss_scale": loss_scale, "heads": heads}
            check_probed(own, self.default_settings(), tuple(own))
        writes = self.probed and update == "backward"
        self.probed_layers = ProbedLayers(self, gemm) if writes else None
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
        check_shared(self.routes, self.param_groups, self.rule)
        if self.probed and self.probed_layers is None:
            return
        assert isinstance(model, nn.Module)
        if self.probed_layers is not None:
            self.probed_layers.attach(model, self.routes.values())
            return
        self.layers.attach(
            [route for route in self.routes.values() if route.rule == self.rule],
            in_backward=update == "backward",
            model=model,
            guarded=self.routes,
        )

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the structure of these settings; raises on a bad one."""
        if settings["variant"] == "P":
            return gradient_recipe(settings, cls.default_settings())
        return Recipe((UnitwiseRule.of(settings).structure,), batched=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def moment_layers(self) -> Iterator[MomentLayer]:
        """Yield the matrices of variant P that have taken a step; of the others, none."""
        if not self.probed:
            return
        for group in self.param_groups:
            own = [p for p in group["params"] if self.routes[p].rule == self.rule]
            structure = structure_of(self.recipe_of(group)) if own else None
            if structure is not None:
                yield from moment_layers((p, structure, self.state_of(p)) for p in own)

    def attach(self) -> None:
        """Put the taps back after :meth:`detach`; again does nothing."""
        self.layers.put()
        if self.probed_layers is not None:
            self.probed_layers.put()

    def detach(self) -> None:
        """Remove all taps from the model; layers go on with the statistics they have."""
        self.layers.detach()
        if self.probed_layers is not None:
            self.probed_layers.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold; taps would be on no model.

        Raises:
            TypeError: There are taps.
        """
        if self.probed and self.update_mode == "step":
            return super().__getstate__()
        refuse_copy(type(self).__name__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, which only has an engine without layers."""
        super().__setstate__(state)
        if "layers" not in self.__dict__:
            self.probed, self.update_mode, self._rules = True, "step", Rules()
            self.probed_layers = None
            self.layers = Engine(
                self,
                loss_reduction="mean",
                gemm="float32",
                loss_scale=None,
                heads=None,
                backend=self.backend,
            )

    # ---------------------------------------------------------------- routing and parts

    def _completed(self, param_group: Any) -> dict[str, Any]:
        group = super()._completed(param_group)
        own = self.defaults["variant"]
        if (
            group["rule"] == self.rule
            and group["variant"] != own
            and "P" in (own, group["variant"])
        ):
            raise ValueError(
                f"variant={group['variant']!r} of a parameter group cannot go with the "
                f"optimizer's variant={own!r}: P needs no taps, the others do; use two optimizers"
            )
        if group["rule"] == self.rule and self.update_mode == "backward":
            check_written(group)
        return group

    def route(self, model: nn.Module, head: Head) -> Iterable[Route]:
        """Return the route of every parameter, those of biases by their layers."""
        of = gradient_routes if self.probed else neurms_routes
        return of(model, self.rule, head, self.exclude)

    def route_parameters(
        self, named: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[Route]:
        """Return the routes of parameters that come without their model.

        Raises:
            TypeError: One would be under the rule, which has to tap its layer.
        """
        routes = super().route_parameters(named, group)
        if self.probed and self.update_mode == "step":
            return routes
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
        if self.probed_layers is not None:
            self.probed_layers.follow(old, new)

    def plan(self) -> Plan:
        """Return the table of what happens to each parameter, with the gradients that are saved."""
        probed = self.probed_layers
        layers = self.layers if probed is None else probed
        return super().plan().without(layers.unformed())

    def _made_mover(self, kind: str) -> Mover:
        if kind == self.rule and self.probed_layers is not None:
            return ProbedMover(weakref.proxy(self), self.probed_layers)
        if kind == self.rule and self.probed:
            return GradientMover(weakref.proxy(self))
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
        work = self._work or self.work()
        return self._rules.of(work.view_of(weight).group)

    def seat_of(self, weight: Tensor) -> tuple[UnitwiseRule, dict[str, Any]]:
        """Return what the settings of a weight's group say, and its state."""
        work = self._work or self.work()
        return self._rules.of(work.view_of(weight).group), self.state.get(weight, {})

    def view_of(self, parameter: Tensor) -> View:
        """Return a parameter's view."""
        # Asked by every layer in every backward; whether groups have changed, the step will see.
        return (self._work or self.work()).view_of(parameter)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, empty before its first step."""
        state: dict[str, Any] = self.state.get(parameter, {})
        return state

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state; momentum may have been switched on by a scheduler since."""
        state: dict[str, Any] = self.state[parameter]
        view = self.view_of(parameter)
        if not state:
            state.update(self.state_for(parameter, view.route, view.group))
        if view.group["momentum"] and "momentum" not in state:
            state["momentum"] = velocity_like(parameter)
        if view.group["normalize"] and "length" not in state:
            state["length"] = length_like(parameter)
        return state

    def write_in_backward(
        self,
        layer: TappedLayer,
        rule: UnitwiseRule,
        state: dict[str, Any],
        product: Product,
        factors: Factors,
    ) -> None:
        """Write W -= lr (D S)^T H C into the weight, or into its velocity first."""
        view = (self._work or self.work()).view_of(layer.weight)
        group = view.group
        if group["maximize"]:
            raise UnsupportedTrainingError(NO_ASCENT)
        view.state = state
        velocity = state["momentum"] if rule.momentum else None
        rate = float(group["lr"])
        decay = 1.0 - rate * float(group["weight_decay"])
        length = length_of(layer) if rule.normalize else None
        plain = view.kept is view.dtype and not view.sharded
        target = view.parameter if plain else view.target()
        write_product_(target, product, factors, rule, velocity, rate, decay, length)
        if not plain:
            view.written(target)

    # ---------------------------------------------------------------- the step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and with them the statistics that no step has taken."""
        if torch.compiler.is_dynamo_compiling():
            drop_outside_of_graphs(self, set_to_none)
            return
        self.layers.forget()
        if self.probed_layers is not None:
            self.probed_layers.forget()
        self.work()
        super().zero_grad(set_to_none)

    def take_part(self) -> None:
        """Contribute no rows to the statistics of a step that other ranks take."""
        self.layers.clear()
        self.layers.synchronize(list(self.layers))
        self.layers.clear()

    def _shares(self, views: Sequence[View]) -> list[Share]:
        """Return the views of each mover; the rule's own has work where no parameter has views."""
        shares, own = super()._shares(views), self.mover_of(self.rule)
        if self.update_mode == "backward" and all(mover is not own for mover, _ in shares):
            shares.append((own, []))
        return shares

    def move(self, shares: Sequence[Share]) -> None:
        """Take the step; what it has seen is used up then."""
        super().move(shares)
        self._clear()

    def _clear(self) -> None:
        self.layers.clear()
        if self.probed_layers is not None:
            self.probed_layers.clear()

    def on_nonfinite(self, names: Sequence[str]) -> None:
        """Leave a step out whose gradients or statistics are bad, or raise."""
        probed = self.probed_layers
        updated = self.layers.updated if probed is None else probed.updated
        if self.update_mode == "backward":
            self._clear()
        if updated and self.nonfinite == "raise":
            refuse_updated(names, updated)
        super().on_nonfinite(names)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        if not is_asked_by_scaler():
            return False
        if self.update_mode == "backward":
            refuse_scaler()
        if self.loss_scale is None and not self.probed:
            raise UnsupportedTrainingError(
                "a GradScaler multiplies the loss, and with it the error signals that NeuRMS "
                "averages; pass loss_scale=scaler.get_scale to divide its scale out"
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
        self._clear()
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
