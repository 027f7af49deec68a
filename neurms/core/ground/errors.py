"""Typed errors of the library and the checks that raise them.

Every message names the argument, the value it had and the cure, so that nobody has to read our
source to get on. The classes derive from the built-in error a user would have caught anyway.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = [
    "CheckpointError",
    "MissingParametersError",
    "NeurmsError",
    "NonFiniteError",
    "SparseGradientError",
    "UnsupportedTrainingError",
    "check_betas",
    "check_choice",
    "check_fraction",
    "check_interval",
    "check_kinds",
    "check_positive_int",
    "check_real",
    "meant",
]


class NeurmsError(Exception):
    """Base class of the errors that only this library raises."""


class NonFiniteError(NeurmsError, ArithmeticError):
    """A NaN or an infinity reached the optimizer and ``nonfinite="raise"`` was in force."""


class UnsupportedTrainingError(NeurmsError, RuntimeError):
    """The training loop asks for something the chosen mode cannot do correctly."""


class MissingParametersError(NeurmsError, TypeError, KeyError):
    """A parameter group has no ``"params"``; torch's own optimizers raise KeyError there."""

    __str__ = Exception.__str__


class SparseGradientError(NeurmsError, TypeError, RuntimeError):
    """A gradient is sparse; torch's own optimizers raise RuntimeError there."""


class CheckpointError(NeurmsError, ValueError):
    """A state dict does not belong to this optimizer or this model."""


def check_real(
    name: str, value: Any, *, low: float = 0.0, strict: bool = False, cure: str = ""
) -> float:
    """Return ``value`` if it is a finite real number of at least ``low``, else raise.

    A 0-d tensor passes too (torch schedulers may hold lr in one). ``strict`` excludes ``low``
    itself.

    Raises:
        TypeError: It is no real number.
        ValueError: It is not finite, or too small.
    """
    number = _number(name, value)
    too_low = number <= low if strict else number < low
    if too_low or math.isinf(number):
        bound = f"greater than {low:g}" if strict else f"at least {low:g}"
        raise ValueError(f"{name}={value!r} must be finite and {bound}{_cured(cure)}")
    return number


def check_fraction(name: str, value: Any, *, closed: bool = False, cure: str = "") -> float:
    """Return ``value`` if it lies in [0, 1) (or [0, 1] when ``closed``), else raise."""
    number = _number(name, value)
    if not (0.0 <= number < 1.0 or (closed and number == 1.0)):
        interval = "[0, 1]" if closed else "[0, 1)"
        raise ValueError(f"{name}={value!r} must lie in {interval}{_cured(cure)}")
    return number


def check_positive_int(name: str, value: Any, *, low: int = 1, cure: str = "") -> int:
    """Return ``value`` if it is an integer of at least ``low``, else raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}={value!r} must be at least {low}{_cured(cure)}")
    return value


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return ``value`` if it is one of ``choices``, else raise."""
    choices = tuple(choices)
    # Not ``in``: a tensor's == is no truth value, and True == 1.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        near = meant(value, choices)
        raise ValueError(f"{name}={value!r} is not known{near}; choose one of {list(choices)}")
    return value


def meant(value: Any, choices: Iterable[Any], likeness: float = 0.6) -> str:
    """Return words that ask for the choice that looks most like ``value``; empty if none does.

    Args:
        value: What was given.
        choices: What is known; what is no text among it is passed over.
        likeness: Least likeness, from 0 to 1 for equal texts.

    Example:
        >>> meant("rcas", ["racs", "rmnp"])
        " (did you mean 'racs'?)"
    """
    names = {str(choice).lower(): choice for choice in choices if isinstance(choice, str)}
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=likeness)
    return f" (did you mean {names[near[0]]!r}?)" if near and isinstance(value, str) else ""


def check_kinds(
    defaults: Mapping[str, Any], values: Mapping[str, Any], optional: Container[str] = ()
) -> None:
    """Raise unless each value is of its default's kind: a flag, an integer, a number, a text.

    Args:
        defaults: Settings with their defaults; None as a default tells nothing of the kind.
        values: Settings to check.
        optional: Names of settings that may be None.

    Raises:
        TypeError: A value is of another kind.
        ValueError: A number is NaN.
    """
    for name, default in defaults.items():
        value = values.get(name, default)
        if default is None or (value is None and name in optional):
            continue
        if isinstance(default, (bool, str)) and not isinstance(value, type(default)):
            wanted = "True or False" if isinstance(default, bool) else "a string"
            raise TypeError(f"{name}={value!r} must be {wanted}, not {type(value).__name__}")
        if isinstance(default, int) and not isinstance(default, bool):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
        elif isinstance(default, float):
            _number(name, value)
        elif isinstance(default, tuple) and not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}={value!r} must be a tuple, not {type(value).__name__}")


def check_betas(name: str, betas: Any, count: int) -> None:
    """Raise unless ``betas`` holds ``count`` numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise ValueError(f"{name}={betas!r} must hold {count} numbers in [0, 1)")
    for position, beta in enumerate(betas):
        check_fraction(f"{name}[{position}]", beta)


def check_interval(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raise unless 0 <= low <= high and high > 0."""
    check_real(low_name, low)
    check_real(high_name, high, strict=True)
    if low > high:
        raise ValueError(
            f"{low_name}={low!r} is greater than {high_name}={high!r}; "
            f"lower {low_name} or raise {high_name}"
        )


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes)) or value is None:
        raise TypeError(f"{name}={value!r} must be a real number, not {type(value).__name__}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} holds {value.numel()} numbers and must be one")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}={value!r} must be a real number, not {type(value).__name__}"
        ) from None
    if math.isnan(number):
        raise ValueError(f"{name}={value!r} is not a number; give a finite value")
    return number


def _cured(cure: str) -> str:
    return f"; {cure}" if cure else ""
