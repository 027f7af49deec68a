"""Optimizer and schedule in the form that ``transformers.Trainer(optimizers=...)`` takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.extras import require
from neurms.core.optimizers.registry import available, create
from neurms.integrations.schedules import Schedule, checked_decay
from neurms.integrations.training_arguments import check_modes, settings_with

require("transformers", extra="transformers")
require("accelerate", extra="transformers")

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["optimizer_cls_and_kwargs", "trainer_optimizers"]


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

    The Trainer leaves ``learning_rate``, ``weight_decay`` and ``optim_args`` unread once it is
    given an optimizer. With ``args`` they hold here: the rate as ``lr``; the decay for all but
    biases and norms, as the Trainer has it; ``optim_args="variant=F, momentum=0.9"`` as settings;
    Adam's betas for the AdamW inside. What contradicts a setting, or chooses another optimizer
    (``optim``), is refused, and a rate that was left at the Trainer's default is warned of. Its
    ``lr_scheduler_type`` and warmup hold as long as ``schedule`` is None. Its clipping
    (``max_grad_norm``, 1 by default) acts on the raw gradients, its accumulation counts as one big
    batch, and its checkpoints hold the optimizer's state.

    Args:
        model: The model that the Trainer gets; NeuRMS puts its taps on it.
        name: One of ``neurms.available()``, such as ``"racs"`` or ``"adamw"``.
        args: The Trainer's arguments; None reads and checks nothing.
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
        ValueError: Unknown name or schedule; a setting out of its range, or another one than
            ``args`` has; a schedule without a number of steps.
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
    optimizer = _made(model, name, args, settings)
    return optimizer, None if decay is None else LambdaLR(optimizer, decay)


def optimizer_cls_and_kwargs(
    name: str = "neurms", *, args: TrainingArguments | None = None, **settings: Any
) -> tuple[Callable[[], Callable[..., torch.optim.Optimizer]], dict[str, Any]]:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes, for a rule by its name.

    The optimizer is made of the model that the Trainer has, so that ``model_init=`` and searches
    over hyperparameters work too. The schedule is the Trainer's.

    Args:
        name: One of ``neurms.available()``.
        args: The Trainer's arguments, as in :func:`trainer_optimizers`.
        **settings: The optimizer's.

    Raises:
        UnsupportedTrainingError: This release of transformers takes classes only.

    Example:
        >>> make, settings = optimizer_cls_and_kwargs("racs", lr=0.02)
        >>> type(make()(torch.nn.Linear(3, 2), **settings)).__name__
        'RACS'
    """
    if importlib.util.find_spec("transformers.trainer_optimizer") is None:
        raise UnsupportedTrainingError(
            f"transformers {_transformers_version()} makes optimizers of classes only, which never "
            "see the model; use optimizers=trainer_optimizers(model, ...), or transformers 5"
        )

    def made(model: nn.Module, **given: Any) -> torch.optim.Optimizer:
        return _made(model, name, args, given)

    return lambda: made, settings


def _transformers_version() -> str:
    return importlib.metadata.version("transformers")


def _made(
    model: nn.Module, name: str, args: TrainingArguments | None, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    if name not in available():
        return create(name, model)
    settings = settings_with(args, model, name, settings)
    check_modes(args, name, settings)
    return create(name, model, **settings)


def _steps_of(args: TrainingArguments | None) -> int:
    if args is None or args.max_steps <= 0:
        raise ValueError(
            "total_steps=None takes args.max_steps, which is not set; pass total_steps, or leave "
            "schedule=None and choose lr_scheduler_type in the TrainingArguments"
        )
    return int(args.max_steps)
