"""What Hugging Face's TrainingArguments say of an optimizer: honoured, or refused aloud.

The Trainer itself leaves all of it unread once it is handed an optimizer.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.registry import is_torch, optimizer_class
from neurms.core.unitwise.neurms import NeuRMS

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["check_modes", "settings_with"]


def settings_with(
    args: TrainingArguments | None, model: nn.Module, name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an optimizer's settings, completed by what TrainingArguments say.

    Args:
        args: The arguments; None changes nothing.
        model: The model, for what of it is decayed.
        name: The optimizer's.
        given: Settings that the user has written beside the arguments.

    Raises:
        ValueError: Both say something else of one thing, or an argument means nothing here.
    """
    settings = dict(given)
    if args is None:
        return settings
    _refuse_choices(args, name)
    for key, value in _optim_args(args).items():
        _agree(key, settings.get(key, value), value, f"args.optim_args has {key}={value!r}")
        settings[key] = value
    _take_rate(args, name, settings)
    _take_betas(args, name, settings)
    _take_decay(args, model, name, settings)
    return settings


def check_modes(args: TrainingArguments | None, name: str, settings: Mapping[str, Any]) -> None:
    """Raise for what the Trainer's loop and an optimizer cannot do together.

    Raises:
        UnsupportedTrainingError: float16 without its scale, or updates inside backward.
    """
    if settings.get("update") == "backward":
        raise UnsupportedTrainingError(
            'update="backward" never forms the gradients whose norm the Trainer takes and clips '
            'between backward and the step; use update="step", or a loop of your own'
        )
    if name != NeuRMS.rule:
        return
    # P reads gradients, from which the scale has been divided out by then.
    tapped = settings.get("variant", NeuRMS.default_settings()["variant"]) != "P"
    if tapped and args is not None and args.fp16 and settings.get("loss_scale") is None:
        raise UnsupportedTrainingError(
            "fp16=True scales the loss, and NeuRMS reads error signals that carry the scale; pass "
            "loss_scale=lambda: trainer.accelerator.scaler.get_scale(), or train with bf16=True"
        )


def _default(args: TrainingArguments, name: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(args)}
    return fields[name].default if name in fields else None


def _is_default(args: TrainingArguments, name: str) -> bool:
    value, default = getattr(args, name, None), _default(args, name)
    return bool(value == default or str(getattr(value, "value", value)) == str(default))


def _refuse_choices(args: TrainingArguments, name: str) -> None:
    if not _is_default(args, "optim"):
        chosen = getattr(args.optim, "value", args.optim)
        raise ValueError(
            f"args.optim={chosen!r} chooses another optimizer than {name!r}; leave it out of the "
            "TrainingArguments, or do not hand an optimizer to the Trainer"
        )
    if name not in ("adam", "adamw") and not _is_default(args, "adam_epsilon"):
        raise ValueError(
            f"args.adam_epsilon={args.adam_epsilon!r} has no part in {name!r}, whose AdamW for "
            "embeddings and norms has 1e-8; leave it out of the TrainingArguments"
        )


def _agree(key: str, ours: Any, theirs: Any, said: str) -> None:
    if ours != theirs:
        raise ValueError(
            f"{key}={ours!r} was passed and {said}; leave one of them out, so that it is clear "
            "which one holds"
        )


def _optim_args(args: TrainingArguments) -> dict[str, Any]:
    """Return what ``optim_args`` holds: ``"variant=F, momentum=0.9"`` as settings."""
    text = getattr(args, "optim_args", None) or ""
    if isinstance(text, Mapping):
        return dict(text)
    found = {}
    for part in filter(None, (part.strip() for part in str(text).split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(
                f"args.optim_args={text!r} must be settings with commas between them, such as "
                "'variant=F, momentum=0.9'"
            )
        try:
            found[key.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            found[key.strip()] = value.strip()
    return found


def _take_rate(args: TrainingArguments, name: str, settings: dict[str, Any]) -> None:
    rate = args.learning_rate
    if not _is_default(args, "learning_rate"):
        _agree("lr", settings.get("lr", rate), rate, f"args.learning_rate is {rate!r}")
        settings["lr"] = rate
    elif "lr" not in settings and is_torch(name):
        settings["lr"] = rate
    elif "lr" not in settings:
        own = optimizer_class(name).default_settings().get("lr")
        warn_user(
            f"args.learning_rate is {rate:g}, the Trainer's default, which suits AdamW; {name} "
            f"trains at its own default, lr={own:g}. Pass lr=..., or another learning_rate, to say "
            "which you mean"
        )


def _take_betas(args: TrainingArguments, name: str, settings: dict[str, Any]) -> None:
    if _is_default(args, "adam_beta1") and _is_default(args, "adam_beta2"):
        return
    betas = (args.adam_beta1, args.adam_beta2)
    if name in ("adam", "adamw"):
        key = "betas"
    elif is_torch(name):
        raise ValueError(
            f"args.adam_beta1 and adam_beta2 are {betas}, and {name} has none; leave them out"
        )
    else:
        # AdamW's part inside the optimizer: embeddings, norms, the head.
        key = "fallback_betas"
    _agree(key, tuple(settings.get(key, betas)), betas, f"args.adam_beta1 and 2 are {betas}")
    settings[key] = betas


def _take_decay(
    args: TrainingArguments, model: nn.Module, name: str, settings: dict[str, Any]
) -> None:
    """Decay what the Trainer would have decayed: all but biases and norms."""
    decay = args.weight_decay
    if name in ("adam", "adamw") and not _is_default(args, "adam_epsilon"):
        settings.setdefault("eps", args.adam_epsilon)
    if not decay:
        return
    said = f"args.weight_decay is {decay!r}"
    for key in ("weight_decay",) if is_torch(name) else ("weight_decay", "fallback_weight_decay"):
        _agree(key, settings.get(key, decay), decay, said)
        settings[key] = decay
    if settings.get("groups") is not None:
        raise ValueError(
            f"{said}, and groups= have decays of their own; write weight_decay in the groups and "
            "leave it out of the TrainingArguments"
        )
    from transformers import Trainer

    # It asks nothing of the Trainer itself.
    names: Any = Trainer.get_decay_parameter_names
    decayed = set(names(None, model))
    spared = [p for own, p in model.named_parameters() if own not in decayed]
    if spared:
        settings["groups"] = [{"params": spared, "weight_decay": 0.0}]
