"""Optimizer and schedule in the form that Lightning's ``configure_optimizers`` returns."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from neurms.core.ground.extras import require
from neurms.core.optimizers.base import Params
from neurms.core.optimizers.momentum_first import MomentumFirst
from neurms.core.optimizers.registry import create, optimizer_class
from neurms.core.optimizers.rules import rule_names
from neurms.core.unitwise.neurms import NeuRMS
from neurms.integrations.schedules import Schedule, WarmupDecay, checked_decay
from neurms.integrations.trainer_checks import check_backward_update, scaler_of

require("lightning", extra="lightning")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402

__all__ = ["Schedule", "WarmupDecay", "optimizer_config"]

_TAPPED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[NeuRMS | MomentumFirst]]
_TAPPED = weakref.WeakKeyDictionary()
"""The tapping optimizer of each model's last fit, whose taps the next one replaces."""


def optimizer_config(
    module: LightningModule,
    name: str,
    *,
    schedule: Schedule | None = None,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    min_lr_ratio: float = 0.0,
    params: Params | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Make an optimizer by name, with a schedule by step, as ``configure_optimizers`` returns it.

    A NeuRMS made here gets the scale of the Trainer's GradScaler. Its taps stay on the model for
    as long as the optimizer lives, or until the next call for the same model; put
    :class:`~neurms.callbacks.lightning.NeuRMSCallback` beside it, or call ``detach()``, to take
    them off when the fit ends.

    Args:
        module: The module that is being configured, attached to its Trainer.
        name: One of ``neurms.available()``, such as ``"racs"`` or ``"adamw"``.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` after the warmup, see
            :class:`WarmupDecay`; None leaves the learning rate alone.
        warmup_steps: Optimizer steps of linear warmup.
        total_steps: Optimizer steps until the decay ends; None takes the Trainer's estimate.
        min_lr_ratio: Least factor on the learning rate after the warmup.
        params: What to optimize: a submodule, parameters or groups; None for the whole module.
        **settings: The optimizer's, ``lr`` among them.

    Returns:
        ``{"optimizer": ...}``, with a schedule also ``"lr_scheduler"``: torch's LambdaLR with
        interval ``"step"``, named ``"lr-<name>"`` for LearningRateMonitor.

    Raises:
        ValueError: Unknown name or schedule; a setting out of its range; a warmup longer than the
            run, or without a schedule; no number of steps to be had.
        TypeError: ``module`` is no LightningModule, or the optimizer has no such setting.
        MisconfigurationException: The Trainer does what ``update="backward"`` rules out.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = BoringModel()
        >>> config = optimizer_config(
        ...     module, "racs", lr=0.02, schedule="cosine", warmup_steps=2, total_steps=10
        ... )
        >>> sorted(config), config["lr_scheduler"]["interval"]
        (['lr_scheduler', 'optimizer'], 'step')
    """
    if not isinstance(module, LightningModule):
        raise TypeError(
            f"module={type(module).__name__} must be the LightningModule that is being configured; "
            "without Lightning use neurms.create"
        )
    decay = checked_decay(
        schedule,
        warmup_steps,
        total_steps,
        min_lr_ratio,
        estimate=lambda: _estimated_steps(module),
        cure="None takes the Trainer's estimate",
    )
    optimizer = _made(module, name, module if params is None else params, settings)
    if decay is None:
        return {"optimizer": optimizer}
    scheduler = {"scheduler": LambdaLR(optimizer, decay), "interval": "step", "name": f"lr-{name}"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def _made(
    module: LightningModule, name: str, params: Params, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    in_backward = settings.get("update") == "backward"
    if name != NeuRMS.rule and not in_backward:
        return create(name, params, **settings)
    trainer = _trainer_of(module)
    if trainer is not None:
        if in_backward:
            check_backward_update(trainer, module, in_parts=_takes_parts(name))
        elif (scaler := scaler_of(trainer)) is not None:
            settings = {"loss_scale": scaler.get_scale, **settings}
    last = _TAPPED.get(params) if isinstance(params, nn.Module) else None
    if last is not None and (before := last()) is not None:
        before.detach()
    optimizer = create(name, params, **settings)
    if isinstance(params, nn.Module) and isinstance(optimizer, (NeuRMS, MomentumFirst)):
        _TAPPED[params] = weakref.ref(optimizer)
    return optimizer


def _takes_parts(name: str) -> bool:
    """Return whether a step's batch may come in parts with ``update="backward"``."""
    own = optimizer_class(name) if name in rule_names() else None
    return own is not None and issubclass(own, MomentumFirst) and not own.one_backward


def _estimated_steps(module: LightningModule) -> int:
    trainer = _trainer_of(module)
    if trainer is None:
        raise ValueError(
            "total_steps=None asks the Trainer for its number of steps, but the module is attached "
            "to none; call optimizer_config in configure_optimizers, or pass total_steps"
        )
    estimate = trainer.estimated_stepping_batches
    if math.isinf(estimate):
        raise ValueError(
            "total_steps=None asks the Trainer for its number of steps, which is unlimited; pass "
            "total_steps, or give the Trainer max_steps or max_epochs"
        )
    return int(estimate)


def _trainer_of(module: LightningModule) -> Trainer | None:
    # The property ``module.trainer`` raises without one.
    trainer: Trainer | None = module._trainer
    return trainer
