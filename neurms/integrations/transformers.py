"""Optimizer and schedule in the form that ``transformers.Trainer(optimizers=...)`` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.extras import require
from neurms.core.optimizers.registry import create
from neurms.core.unitwise.neurms import NeuRMS
from neurms.integrations.schedules import Schedule, checked_decay

require("transformers", extra="transformers")
require("accelerate", extra="transformers")

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["trainer_optimizers"]


def trainer_optimizers(
    model: nn.Module,
    name: str = "neurms",
    *,
    args: TrainingArguments | None = None,
    schedule: Schedule | None = None,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    min_lr_ratio: float = 0.0,
    **settings: Any,
) -> tuple[torch.optim.Optimizer, LambdaLR | None]:
    """Make an optimizer by name, and a schedule, for ``Trainer(optimizers=...)``.

    The Trainer's own ``learning_rate``, ``weight_decay`` and ``optim`` have no say over an
    optimizer that it is given; its ``lr_scheduler_type`` and warmup do, as long as ``schedule`` is
    None. Its clipping (``max_grad_norm``, 1 by default) acts on the raw gradients, its
    accumulation counts as one big batch, and its checkpoints hold the optimizer's state.

    Args:
        model: The model that the Trainer gets; NeuRMS puts its taps on it.
        name: One of ``neurms.available()``, such as ``"racs"`` or ``"adamw"``.
        args: The Trainer's arguments, read for ``max_steps`` and to refuse float16 where NeuRMS
            is not told its loss scale; None checks nothing.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` after the warmup, see
            :class:`~neurms.integrations.schedules.WarmupDecay`; None leaves it to the Trainer.
        warmup_steps: Optimizer steps of linear warmup.
        total_steps: Optimizer steps until the decay ends; None takes ``args.max_steps``.
        min_lr_ratio: Least factor on the learning rate after the warmup.
        **settings: The optimizer's, ``lr`` among them.

    Returns:
        The optimizer, and the schedule or None.

    Raises:
        TypeError: ``model`` is no module, or the optimizer has no such setting.
        ValueError: Unknown name or schedule; a setting out of its range; a schedule without a
            number of steps.
        UnsupportedTrainingError: float16 scales the loss by a factor that NeuRMS is not told of;
            or ``update="backward"``, which has no gradients for the Trainer to clip and measure.

    Reference:
        Settled here: the Trainer makes its GradScaler itself, later, so that with ``fp16=True``
        its scale has to be passed in as ``loss_scale``; bfloat16 needs none.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(
        ...         vocab_size=32,
        ...         hidden_size=16,
        ...         intermediate_size=32,
        ...         num_hidden_layers=1,
        ...         num_attention_heads=2,
        ...     )
        ... )
        >>> optimizer, scheduler = trainer_optimizers(model, "racs", lr=0.02)
        >>> type(optimizer).__name__, scheduler
        ('RACS', None)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={type(model).__name__} must be the nn.Module that the Trainer gets; for "
            "parameters alone use neurms.create"
        )
    decay = checked_decay(
        schedule,
        warmup_steps,
        total_steps,
        min_lr_ratio,
        estimate=lambda: _steps_of(args),
        cure="None takes args.max_steps",
    )
    if name == NeuRMS.rule:
        _check_loss_scale(args, settings)
        _check_update(settings)
    optimizer = create(name, model, **settings)
    return optimizer, None if decay is None else LambdaLR(optimizer, decay)


def _steps_of(args: TrainingArguments | None) -> int:
    if args is None or args.max_steps <= 0:
        raise ValueError(
            "total_steps=None takes args.max_steps, which is not set; pass total_steps, or leave "
            "schedule=None and choose lr_scheduler_type in the TrainingArguments"
        )
    return int(args.max_steps)


def _check_loss_scale(args: TrainingArguments | None, settings: dict[str, Any]) -> None:
    if args is not None and args.fp16 and settings.get("loss_scale") is None:
        raise UnsupportedTrainingError(
            "fp16=True scales the loss, and NeuRMS reads error signals that carry the scale; pass "
            "loss_scale=lambda: trainer.accelerator.scaler.get_scale(), or train with bf16=True"
        )


def _check_update(settings: dict[str, Any]) -> None:
    if settings.get("update") == "backward":
        raise UnsupportedTrainingError(
            'update="backward" never forms the gradients whose norm the Trainer takes and clips '
            'between backward and the step; use update="step", or a loop of your own'
        )
