"""NeuRMS: unitwise RMS preconditioning by scaling what backprop already holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, Unpack

from torch import Tensor, nn

from neurms.core.ground.errors import check_choice, check_fraction, check_real
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.unit_feature import Clip, UnitFeatureDiagonal
from neurms.core.unitwise.statistics import LossReduction
from neurms.core.unitwise.tapped import Gemm, Variant
from neurms.core.unitwise.unitwise_optimizer import UnitwiseOptimizer

__all__ = ["NeuRMS", "check_gemm"]


class NeuRMS(UnitwiseOptimizer):
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
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        check_choice("update", update, ("step", "backward"))
        check_gemm(gemm, update)
        _check_loss_scale(loss_scale)
        if update == "backward":
            _check_backward(agc, loss_scale)
        super().__init__(
            model,
            settings,
            common,
            loss_reduction=loss_reduction,
            update=update,
            gemm=gemm,
            loss_scale=loss_scale,
            heads=heads,
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def check_gemm(gemm: Any, update: str) -> None:
    """Raise unless ``gemm`` is known, and has a product to act on."""
    check_choice("gemm", gemm, ("float32", "bfloat16"))
    if gemm != "float32" and update != "backward":
        raise ValueError(
            f'gemm={gemm!r} has no effect with update="step", where autograd makes the gradient; '
            'use update="backward", or torch.autocast around the forward pass'
        )


def _check_loss_scale(loss_scale: Any) -> None:
    if loss_scale is not None and not callable(loss_scale):
        raise TypeError(f"loss_scale={loss_scale!r} must be callable, such as scaler.get_scale")


def _check_backward(agc: float | None, loss_scale: Any) -> None:
    if loss_scale is not None:
        raise ValueError(
            'loss_scale cannot go with update="backward": a GradScaler unscales gradients, and in '
            'that mode there are none; use update="step", or bfloat16 without a scaler'
        )
    if agc is not None:
        raise ValueError(
            f'agc={agc!r} cannot go with update="backward", which never forms the update that it '
            'would clip; use update="step" or agc=None'
        )
