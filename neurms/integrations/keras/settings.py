"""Settings of a rule as a Keras optimizer takes them: names, defaults, checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from neurms.core.ground.errors import check_real, meant
from neurms.core.optimizers.registry import optimizer_class
from neurms.core.optimizers.settings import COMMON_DEFAULTS, TORCH_FORMS, check_common

__all__ = ["check_backend", "check_settings", "default_rate", "refuse_rate", "setting_defaults"]

_KERAS_DECIDES = {
    "lr": "is called learning_rate in Keras",
    "loss_scale": "is found in the LossScaleOptimizer or loss_scale_factor by itself",
    "update": 'is always "step" in Keras, whose train step needs every gradient',
    "groups": "are torch's parameter groups, which Keras does not have: exclude= and "
    "exclude_from_weight_decay= name what is to differ",
    "gemm": 'belongs to update="backward", which Keras does not have',
}

_KERAS_NAMES = [
    *("learning_rate", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "use_ema"),
    *("ema_momentum", "ema_overwrite_frequency", "loss_scale_factor"),
    *("gradient_accumulation_steps", "name", "exclude_from_weight_decay", "base_learning_rate"),
]
"""Arguments of :class:`~neurms.integrations.keras.optimizer.NeurmsOptimizer` beside settings."""


def check_backend(name: str) -> None:
    """Raise unless Keras runs on torch.

    Raises:
        ValueError: It runs on another backend.
    """
    backend = keras.backend.backend()
    if backend != "torch":
        raise ValueError(
            f"{name} is only supported with the torch backend of Keras: it updates torch tensors "
            f"in place. The current backend is {backend!r}; set the environment variable "
            "KERAS_BACKEND=torch before keras is imported"
        )


def default_rate(rule: str) -> float:
    """Return the learning rate that a rule has unless told otherwise."""
    return float(optimizer_class(rule).default_settings()["lr"])


def setting_defaults(rule: str) -> dict[str, Any]:
    """Return the settings that a rule's Keras optimizer takes beside Keras's own, with defaults."""
    own = optimizer_class(rule).default_settings()
    common = {k: v for k, v in COMMON_DEFAULTS.items() if k != "weight_decay"}
    return {k: v for k, v in {**own, **common}.items() if k not in _KERAS_DECIDES}


def check_settings(
    rule: str, given: Mapping[str, Any], weight_decay: float | None
) -> dict[str, Any]:
    """Return all of a rule's settings, completed by defaults, lists as tuples.

    Raises:
        TypeError: The rule has no such setting, or Keras decides it.
        ValueError: A setting is out of its range.
    """
    defaults = setting_defaults(rule)
    for name in given:
        if name in _KERAS_DECIDES:
            refuse_rate(given)
            raise TypeError(f"{name}={given[name]!r} {_KERAS_DECIDES[name]}; leave it out")
        if name not in defaults:
            raise TypeError(_unknown(rule, name, defaults))
    settings = {**defaults, **{k: _tupled(v) for k, v in given.items()}}
    decay = 0.0 if weight_decay is None else check_real("weight_decay", weight_decay)
    check_common(rule, {k: v for k, v in settings.items() if k in COMMON_DEFAULTS})
    _check_patterns(settings["exclude"])
    optimizer_class(rule).recipe({**settings, "lr": default_rate(rule), "weight_decay": decay})
    return settings


def refuse_rate(given: Mapping[str, Any]) -> None:
    """Raise for a learning rate under torch's name.

    Raises:
        TypeError: ``lr`` is among the settings.
    """
    if "lr" in given:
        cure = f"pass learning_rate={given['lr']!r}"
        raise TypeError(f"lr={given['lr']!r} {_KERAS_DECIDES['lr']}; {cure}")


def _unknown(rule: str, name: str, defaults: Mapping[str, Any]) -> str:
    own = [known for known in defaults if known not in COMMON_DEFAULTS]
    shared = [known for known in defaults if known in COMMON_DEFAULTS and known not in TORCH_FORMS]
    near = meant(name, [*own, *shared, *_KERAS_NAMES])
    return (
        f"{rule} has no setting {name!r}{near}; its own settings are "
        f"{own}, those that every rule takes are {shared}, and Keras's are {_KERAS_NAMES}"
    )


def needs_taps(rule: str, settings: Mapping[str, Any] | None = None) -> bool:
    """Return whether a rule, with these settings, reads the layers' inputs and error signals."""
    return optimizer_class(rule).needs_modules and (settings or {}).get("variant") != "P"


def _tupled(value: Any) -> Any:
    """Return lists, which is how JSON gives tuples back, as tuples: recipes are hashed."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _check_patterns(patterns: Any) -> None:
    if isinstance(patterns, str):
        raise TypeError(
            f"exclude={patterns!r} must be a sequence of patterns; write ({patterns!r},)"
        )
