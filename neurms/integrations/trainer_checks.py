"""What a Lightning Trainer may not ask of NeuRMS: clear errors before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from neurms.core.ground.extras import require
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.unitwise.checks import default_settings
from neurms.core.unitwise.neurms import NeuRMS

require("lightning", extra="lightning")

from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import GradientAccumulationScheduler  # noqa: E402
from lightning.pytorch.strategies import (  # noqa: E402
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
)
from lightning.pytorch.utilities.model_helpers import is_overridden  # noqa: E402

__all__ = [
    "check_agreement",
    "check_backward_update",
    "check_layers_are_optimized",
    "check_optimizers",
    "check_scaler",
    "check_strategy",
    "scaler_of",
]

_ATTRIBUTES = {
    "update": "update_mode",
    "gemm": "layers.gemm",
    "loss_reduction": "layers.loss_reduction",
    "loss_scale": "loss_scale",
    "backend": "backend",
    "nonfinite": "nonfinite",
}


def scaler_of(trainer: Trainer) -> Any:
    """Return the GradScaler of the Trainer's precision plugin, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def check_strategy(trainer: Trainer) -> None:
    """Raise for strategies whose pieces of parameters are not rows of matrices any more."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"strategy={type(trainer.strategy).__name__} flattens weights into pieces, which "
            "NeuRMSCallback cannot scale by the statistics of a layer's units; use "
            'strategy="ddp", ModelParallelStrategy with fully_shard, or a single device'
        )


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise for optimizers that must not be preconditioned."""
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, PreconditionedOptimizer) and not isinstance(optimizer, NeuRMS):
            raise MisconfigurationException(
                f"NeuRMSCallback stands beside neurms.{name}, which preconditions by a rule of its "
                "own: scaling its gradients first would change what it measures. Remove the "
                "callback, or return neurms.NeuRMS or a plain optimizer from configure_optimizers"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "NeuRMSCallback stands beside LBFGS, whose line search evaluates the loss several "
                "times in a step and expects its own gradient; use SGD, or remove the callback"
            )


def check_scaler(
    optimizers: Iterable[torch.optim.Optimizer], scaler: Any, settings: Mapping[str, Any]
) -> None:
    """Raise where gradients are still multiplied by the loss scale when the callback sees them."""
    needing = [name for name in ("momentum", "agc", "normalize") if settings[name] not in (0, None)]
    if scaler is None or not needing:
        return
    for optimizer in optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            name = needing[0]
            raise MisconfigurationException(
                f"{name}={settings[name]!r} needs unscaled gradients, but a fused "
                f"{type(optimizer).__name__} divides the loss scale out only in its step; build it "
                f'with fused=False, or use precision="bf16-mixed"'
            )


def check_layers_are_optimized(
    taken: Iterable[Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Raise if no optimizer holds a parameter among those whose gradients will be scaled."""
    held = {id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    if not any(id(parameter) in held for parameter in taken):
        raise MisconfigurationException(
            "no optimizer of the module holds a weight that NeuRMSCallback could precondition; "
            "return one over self.parameters() from configure_optimizers"
        )


def check_backward_update(
    trainer: Trainer, pl_module: LightningModule, *, in_parts: bool = False
) -> None:
    """Raise if the Trainer does with gradients what ``update="backward"`` rules out.

    Args:
        trainer: The Trainer.
        pl_module: What it trains.
        in_parts: Whether a step's batch may come in parts all the same.

    Raises:
        MisconfigurationException: It does.
    """
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    windows = [
        trainer.accumulate_grad_batches,
        *(n for c in schedulers for n in c.scheduling.values()),
    ]
    problems = {
        f"accumulate_grad_batches={max(windows)}": max(windows) > 1 and not in_parts,
        f"gradient_clip_val={trainer.gradient_clip_val}": bool(trainer.gradient_clip_val),
        "configure_gradient_clipping": is_overridden("configure_gradient_clipping", pl_module),
        f"precision={trainer.precision!r} with a GradScaler": scaler_of(trainer) is not None,
        f"{type(trainer.strategy).__name__} on {trainer.world_size} process(es)": isinstance(
            trainer.strategy, DDPStrategy
        )
        or trainer.world_size > 1,
    }
    for problem, present in problems.items():
        if present:
            raise MisconfigurationException(
                f'update="backward" cannot go with {problem}, which acts on gradients that are '
                'never formed in that mode; use update="step"'
            )


def check_agreement(optimizer: NeuRMS, settings: Mapping[str, Any]) -> None:
    """Raise if the callback was given a setting that the module's own NeuRMS does not have."""
    defaults = default_settings()
    for name, value in settings.items():
        if value == defaults[name]:
            continue
        if name in _ATTRIBUTES:
            actual = [attrgetter(_ATTRIBUTES[name])(optimizer)]
        elif name == "exclude":
            actual, value = [tuple(optimizer.exclude)], tuple(value)
        elif name in optimizer.defaults:
            actual = [group[name] for group in optimizer.param_groups]
        else:
            actual = ["its own"]
        if any(own != value for own in actual):
            raise MisconfigurationException(
                f"NeuRMSCallback has {name}={value!r}, but the module returns a neurms.NeuRMS with "
                f"{name}={actual[0]!r}, which the callback leaves as it is; set it there, and use "
                "NeuRMSCallback() without settings beside it"
            )
