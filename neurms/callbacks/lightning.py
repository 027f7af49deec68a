"""NeuRMS for a Lightning Trainer, whatever optimizer the module returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.extras import require
from neurms.core.optimizers.plan import Plan
from neurms.core.optimizers.settings import NonFinite
from neurms.core.routing import Head
from neurms.core.structures.gradient_moments import Measured
from neurms.core.structures.unit_feature import Clip
from neurms.core.unitwise.checks import checked_settings
from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from neurms.core.unitwise.rule import Gemm, LossReduction, Normalize, Variant
from neurms.core.unitwise.scale_summary import scale_summary
from neurms.core.unitwise.tapped import TappedLayer
from neurms.integrations.trainer_checks import (
    check_agreement,
    check_backward_update,
    check_layers_are_optimized,
    check_optimizers,
    check_scaler,
    check_strategy,
    scaler_of,
)

require("lightning", extra="lightning")

from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn  # noqa: E402

__all__ = ["NeuRMSCallback"]


class NeuRMSCallback(Callback):
    """Turns the optimizers that the module returns into their NeuRMS-preconditioned selves.

    After backward and before every optimizer's step it scales gradients as
    :class:`~neurms.core.unitwise.neurms.NeuRMS` does. Variant P, the default, makes them of an RMS
    of about 1, without taps: SGD's lr is on AdamW's scale then (1e-3 to 1e-2), and SGD had better
    have no momentum, which would sum such updates and lengthen them up to 1 / (1 - momentum) times;
    ``momentum`` here averages gradients instead. An SGD whose steps would be long is warned of.
    Under U, B and F the gradients of linear layers and convolutions, and of their biases, become
    S G C: SGD(lr, momentum) with this callback moves as neurms.NeuRMS(lr, momentum) does.
    Beside Adam or RMSprop, which divide by an RMS of their own, much of a slowly varying scale
    cancels.
    Embeddings, norms, tied weights and whatever else the rule cannot take keep the module's own
    optimizer as it was; :meth:`plan` lists them, and a summary is logged at the start.

    What acts on which gradient: accumulated micro-batches are summed before they are scaled, once,
    as one big batch; a GradScaler's loss scale is divided out, and a step that it skips leaves no
    trace; ``Trainer(gradient_clip_val=...)`` clips the *preconditioned* gradient, while clipping by
    hand before ``optimizer.step()`` in manual optimization acts on the raw one. Under DDP the
    statistics are summed over all processes. Gradients that are dropped without a step
    take their statistics along. The learning-rate finder runs without callbacks and so without
    preconditioning.

    If the module returns a ``neurms.NeuRMS``, which preconditions by itself, the callback only
    logs, hands it the GradScaler's scale, and takes its taps off after the fit; settings that
    differ from the optimizer's are an error. ``update="backward"`` writes linear weights during
    backward with the lr and momentum of the module's plain SGD.

    Statistics are in the checkpoint, so that a resumed run is bit-equal. Every fit without a
    checkpoint starts afresh, as the optimizers do.

    Args:
        variant: "P" scales gradients by their own moments, without taps; "U" by the units' error
            signals, "B" the error sent upstream, too, "F" by those and the features' activations.
        beta: Decay of the second moments; None is .95 for "P", 0 of an average, .99 for
            the others.
        eps: Added to a second moment before its root.
        v_min: Floor of a second moment.
        s_min: Least unit factor.
        s_max: Greatest unit factor.
        c_min: Least feature factor (F).
        c_max: Greatest feature factor (F).
        bias_correction: Divide the averages by 1 - beta^t.
        momentum: Velocity kept by the callback, for optimizers without one.
        momentum_coupling: "gradient", or "gradient+velocity" to scale the velocity once more.
        agc: Adaptive gradient clipping of each row of what reaches the optimizer, or None.
        clip: "absolute" bounds, or "relative": within kappa of the layer's median factor.
        kappa: Width of the relative clip.
        loss_reduction: Whether the loss is a "mean" or a "sum" over rows.
        update: "step", or "backward": plain SGD only; no clipping, accumulation, scaler or DDP.
        loss_scale: Callable that returns the factor on the loss; None asks the Trainer's scaler.
        heads: Name pattern of weights -> number of heads whose outputs share one second moment.
        weight_decay: Decoupled decay of the preconditioned weights, beside the optimizer's own.
        exclude: Name patterns of parameters or modules to leave to the module's optimizer.
        head: What the last linear layer gets: "rule" (also for None) or "fallback".
        backend: How kernels run: "auto", "eager", "inductor" or "torchscript".
        process_group: The ranks that train the model together; None finds them.
        nonfinite: What a NaN or infinity does without a GradScaler: "raise", or "skip" the step.
        log: Log a few scalars under "neurms/" at the Trainer's logging interval.
        gemm: What update="backward" multiplies D and H in: "float32", or "bfloat16".
        probes: Of variant P with update="backward", which no callback can ask for.
        seed: Of those probes.
        normalize: "rms" to divide what reaches the optimizer by the average of its RMS, or None.
        nesterov: Whether P's gradient enters its average's step once more.
        moments: Whether P's moments are of the "gradient", or of the "average" that momentum keeps.
        damping: How much of their mean P's moments of features are taken for; None is 0, or .1 of
            an average.

    Raises:
        TypeError: A setting is of the wrong type.
        ValueError: A setting is out of its range; at the start of the fit: the model has no layer
            that can be tapped, or a pattern matches nothing.
        MisconfigurationException: At the start of the fit: the module returns another optimizer of
            this library, LBFGS or a NeuRMS with other settings; the strategy shards weights; the
            Trainer does what ``update="backward"`` rules out.

    Reference:
        NeuRMS draft, U, B and F. Settled here: statistics are committed between backward and step,
        never in a step that is skipped.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(
        ...     max_steps=2,
        ...     callbacks=[NeuRMSCallback(variant="F")],
        ...     accelerator="cpu",
        ...     barebones=True,
        ... )
        >>> trainer.fit(BoringModel())
    """

    def __init__(
        self,
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
        update: Literal["step", "backward"] = "step",
        loss_scale: Callable[[], float] | None = None,
        heads: Mapping[str, int] | None = None,
        weight_decay: float = 0.0,
        exclude: Sequence[str] = (),
        head: Head | None = None,
        backend: str = "auto",
        nonfinite: NonFinite = "raise",
        process_group: Any = None,
        log: bool = True,
        gemm: Gemm = "float32",
        probes: int = 4,
        seed: int = 0,
        normalize: Normalize | None = None,
        nesterov: bool = False,
        moments: Measured = "gradient",
        damping: float | None = None,
    ) -> None:
        given = dict(locals())
        names = given.keys() - {"self", "log", "__class__"}
        self.settings = checked_settings({name: given[name] for name in names})
        # Not ``log``: Lightning puts the module's own method of that name here.
        self.log_scalars = log
        self.preconditioner: GradientPreconditioner | None = None
        self._own: list[NeuRMS] = []
        self._scaled: list[NeuRMS] = []
        self._scaler: Any = None
        self._loaded: dict[str, Any] = {}
        self._announced = False

    # ---------------------------------------------------------------- begin and end

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tap the layers: the optimizers exist now, and the model is on its device."""
        self._release()
        optimizers = list(trainer.optimizers)
        self._scaler = scaler_of(trainer)
        own = [o for o in optimizers if isinstance(o, NeuRMS)]
        others = [o for o in optimizers if not isinstance(o, NeuRMS)]
        # First, so that an error below takes their taps off, too.
        self._own = own
        check_strategy(trainer)
        check_optimizers(optimizers)
        check_scaler(others, self._scaler, self.settings)
        in_backward = others and self.settings["update"] == "backward"
        if in_backward or any(o.update_mode == "backward" for o in own):
            check_backward_update(trainer, pl_module)
        if not others:
            for optimizer in own:
                check_agreement(optimizer, self.settings)
        self.preconditioner = self._made_for(pl_module, own, others) if others else None
        self._adopt()
        self._announce(others)

    def _made_for(
        self, pl_module: LightningModule, own: Sequence[NeuRMS], others: list[torch.optim.Optimizer]
    ) -> GradientPreconditioner:
        settings = dict(self.settings)
        if self._scaler is not None:
            # A scaler meets overflows all the time, and skips those steps itself.
            settings["nonfinite"] = "skip"
            if settings["variant"] != "P":
                settings["loss_scale"] = settings["loss_scale"] or _CurrentScale(self._scaler)
        leave = [p for optimizer in own for g in optimizer.param_groups for p in g["params"]]
        try:
            made = GradientPreconditioner(pl_module, leave=leave, optimizers=others, **settings)
        except UnsupportedTrainingError as error:
            raise MisconfigurationException(str(error)) from error
        try:
            check_layers_are_optimized(made.taken, others)
            if self._loaded:
                made.load_state_dict(self._loaded)
        except Exception:
            made.detach()
            raise
        self._loaded = {}
        return made

    def _adopt(self) -> None:
        """Put the taps of the module's own NeuRMS in place and give it the loss scale."""
        for optimizer in self._own:
            optimizer.attach()
            if self._scaler is not None and optimizer.loss_scale is None:
                optimizer.loss_scale = _CurrentScale(self._scaler)
                self._scaled.append(optimizer)

    def _release(self) -> None:
        """Take every tap off; statistics stay, for checkpoints written after the fit."""
        if self.preconditioner is not None:
            self.preconditioner.detach()
        for optimizer in self._own:
            optimizer.detach()
        for optimizer in self._scaled:
            optimizer.loss_scale = None
        self._scaled, self._scaler = [], None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the taps off."""
        self._release()
        self._loaded = {}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the taps off, since Lightning may end without a teardown."""
        self._release()

    # ---------------------------------------------------------------- the step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Commit the statistics and scale the gradients of this optimizer's parameters."""
        if self.preconditioner is not None and not isinstance(optimizer, NeuRMS):
            with trainer.profiler.profile("[NeuRMS]precondition"):  # type: ignore[attr-defined]
                applied = self.preconditioner.precondition_(optimizer)
            if not applied and self._scaler is None:
                # Nobody else will skip this step; without gradients it moves nothing.
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
        if (
            self.log_scalars
            and not trainer.barebones
            and trainer._logger_connector.should_update_logs
        ):
            self._log_scalars(pl_module)

    def _log_scalars(self, pl_module: LightningModule) -> None:
        owners = [o for o in (*self._own, self.preconditioner) if o is not None]
        matrices = (layer for owner in owners for layer in owner.moment_layers())
        layers = [*(self.preconditioner or ()), *self._own_layers(), *matrices]
        for name, value in scale_summary(layers).items():
            pl_module.log(f"neurms/{name}", value, on_step=True, on_epoch=False)
        if self.preconditioner is not None:
            skipped = float(self.preconditioner.skipped_steps)
            pl_module.log("neurms/skipped_steps", skipped, on_step=True, on_epoch=False)

    def _own_layers(self) -> Iterator[TappedLayer]:
        for optimizer in self._own:
            yield from optimizer.layers

    # ---------------------------------------------------------------- plan and state

    def plan(self) -> Plan:
        """Return the table of what is preconditioned and what is left to the module's optimizer.

        Raises:
            RuntimeError: No fit has started yet.
        """
        if self.preconditioner is not None:
            return self.preconditioner.plan()
        if self._own:
            return Plan([row for optimizer in self._own for row in optimizer.plan()])
        raise RuntimeError("NeuRMSCallback has no plan before trainer.fit has made the optimizers")

    def _announce(self, others: Sequence[torch.optim.Optimizer]) -> None:
        if self._announced:
            return
        self._announced = True
        plan = self.plan()
        left = Counter(row.reason for row in plan if row.rule != NeuRMS.rule)
        names = " and ".join(sorted({type(o).__name__ for o in others})) or "the module's NeuRMS"
        reasons = ", ".join(f"{count} x {reason}" for reason, count in left.items()) or "none"
        rank_zero_info(
            f"NeuRMSCallback: {names} with {len(plan) - left.total()} of {len(plan)} parameters "
            f"preconditioned ({plan.state_bytes:,} bytes of state); not preconditioned: {reasons}. "
            "NeuRMSCallback.plan() lists them."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics by parameter name, and the velocities where momentum is set."""
        return self._loaded if self.preconditioner is None else self.preconditioner.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so if a fit is resumed from a checkpoint that was written without this callback."""
        groups = [g for s in checkpoint.get("optimizer_states", ()) for g in s["param_groups"]]
        # The module's own NeuRMS keeps its statistics itself.
        own = any(group.get("rule") == NeuRMS.rule for group in groups)
        missing = not own and self.state_key not in checkpoint.get("callbacks", {})
        if missing and trainer.state.fn == "fit":
            rank_zero_warn(
                "the checkpoint was saved without NeuRMSCallback's statistics, so they begin anew; "
                "to continue exactly, resume a run that had the callback"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's statistics until the fit starts, or take them in a running fit."""
        if self.preconditioner is not None and self.preconditioner.attached and state_dict:
            self.preconditioner.load_state_dict(state_dict)
        else:
            self._loaded = state_dict


@dataclass(frozen=True)
class _CurrentScale:
    """A GradScaler's scale as a tensor: its ``get_scale`` waits for the device."""

    scaler: Any

    def __call__(self) -> Tensor | float:
        scale: Tensor | None = self.scaler._scale
        return 1.0 if scale is None else scale
