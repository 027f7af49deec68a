"""Settings that every optimizer of the library shares, with their defaults and checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, TypedDict

from neurms.compiled.backends import validate_backend
from neurms.core.ground.errors import check_betas, check_choice, check_real, meant
from neurms.core.ground.precision import LowPrecision
from neurms.core.routing import Head

__all__ = [
    "COMMON_DEFAULTS",
    "TORCH_FORMS",
    "CommonSettings",
    "Distribute",
    "NonFinite",
    "check_common",
]

Distribute = Literal["auto", "rows", "owner", "replicate"]
NonFinite = Literal["raise", "skip"]


class CommonSettings(TypedDict, total=False):
    """Keyword arguments that every optimizer takes.

    weight_decay: Decoupled weight decay of the matrices under the rule (0).
    groups: Parameter groups beside a model, as torch's are written: dictionaries with
        ``"params"`` (parameters of the model, or a part of it) and settings of their own, such as
        ``lr`` and ``weight_decay``, or another ``"rule"``. Parameters in none make a last group
        (None).
    exclude: Name patterns (fnmatch; a module's name covers it whole) sent to the fallback (none).
    head: What the last linear layer gets: ``"rule"`` or ``"fallback"`` (the optimizer's own
        default).
    fallback_lr: AdamW's learning rate; it follows ``lr``'s schedule in proportion (1e-3).
    fallback_betas: AdamW's betas (.9, .999).
    fallback_weight_decay: AdamW's weight decay (0).
    backend: How kernels run: ``"auto"``, ``"eager"``, ``"inductor"`` or ``"torchscript"``.
    nonfinite: What a NaN or infinity does: ``"raise"`` or ``"skip"``; both leave all state as it
        was.
    low_precision: For bfloat16/float16 parameters: round ``"nearest"``, ``"stochastic"``, or keep a
        float32 ``"master"`` copy in the state.
    maximize: Ascend instead of descend (False).
    distribute: How several ranks divide the work on matrices: each takes its ``"rows"``; each
        matrix has one ``"owner"``, who alone keeps its state and computes; or every rank does all
        of it, ``"replicate"``. ``"auto"``: of sharded matrices (FSDP2) rows where a rule works row
        by row, else owner; replicate where ranks hold replicas (DDP). One process minds none.
    process_group: The ranks that train one model together, over which statistics of layers are
        summed and replicas divided; None finds them: those of the model's DDP or FSDP2, else all.
    foreach: One of torch's own flags; here it may be None or False, as may the three below, since
        the form of each step is chosen by what it works on.
    fused: As ``foreach``.
    capturable: As ``foreach``.
    differentiable: As ``foreach``.
    """

    weight_decay: float
    groups: Sequence[dict[str, Any]] | None
    exclude: Sequence[str]
    head: Head | None
    fallback_lr: float
    fallback_betas: tuple[float, float]
    fallback_weight_decay: float
    backend: str
    nonfinite: NonFinite
    low_precision: LowPrecision
    maximize: bool
    distribute: Distribute
    process_group: Any
    foreach: bool | None
    fused: bool | None
    capturable: bool | None
    differentiable: bool | None


COMMON_DEFAULTS: CommonSettings = {
    "weight_decay": 0.0,
    "groups": None,
    "exclude": (),
    "head": None,
    "fallback_lr": 1e-3,
    "fallback_betas": (0.9, 0.999),
    "fallback_weight_decay": 0.0,
    "backend": "auto",
    "nonfinite": "raise",
    "low_precision": "nearest",
    "maximize": False,
    "distribute": "auto",
    "process_group": None,
    "foreach": None,
    "fused": None,
    "capturable": None,
    "differentiable": None,
}

GROUP_SETTINGS = (
    "weight_decay",
    "fallback_lr",
    "fallback_betas",
    "fallback_weight_decay",
    "maximize",
)
"""Common settings that live in parameter groups; the others belong to the optimizer as a whole."""


TORCH_FORMS = {
    "foreach": "the step takes lists of tensors by itself where that is faster",
    "fused": "the step uses native kernels by itself where they fit; backend= chooses among forms",
    "capturable": "the step reads numbers on the host; leave it out of captured CUDA graphs",
    "differentiable": "the step is not recorded by autograd; differentiate through torch's own SGD",
}
"""Flags of torch's optimizers that cannot be True here, and why."""


def check_common(rule: str, common: Mapping[str, Any], own: Iterable[str] = ()) -> CommonSettings:
    """Return the common settings completed by defaults, or raise for an unknown or a bad one.

    Args:
        rule: Whose settings they are, for messages.
        common: What was given.
        own: Names of the rule's own settings, for messages.

    Raises:
        TypeError: A setting is unknown, or of the wrong kind.
        ValueError: A setting is out of its range.
    """
    unknown = sorted(set(common) - set(COMMON_DEFAULTS))
    if unknown:
        shared = [name for name in COMMON_DEFAULTS if name not in TORCH_FORMS]
        near = meant(unknown[0], [*own, *shared])
        near = " (write lr)" if unknown[0] == "learning_rate" else near
        raise TypeError(
            f"{rule} has no setting {unknown[0]!r}{near}; its own settings are {list(own)}, and "
            f"those that every optimizer takes are {shared}"
        )
    settings: CommonSettings = {**COMMON_DEFAULTS, **common}  # type: ignore[typeddict-item]
    check_choice("head", settings["head"], (None, "rule", "fallback"))
    check_choice("nonfinite", settings["nonfinite"], ("raise", "skip"))
    check_choice("low_precision", settings["low_precision"], ("nearest", "stochastic", "master"))
    check_choice("distribute", settings["distribute"], ("auto", "rows", "owner", "replicate"))
    validate_backend(settings["backend"])
    check_patterns_form(settings["exclude"])
    check_group(settings)
    for flag, reason in TORCH_FORMS.items():
        if common.get(flag) is not None and common[flag] is not False:
            raise ValueError(f"{flag}={common[flag]!r} cannot be served: {reason}; pass None")
    return settings


def check_patterns_form(exclude: Any) -> None:
    """Raise unless ``exclude`` holds name patterns."""
    several = isinstance(exclude, (Sequence, Set)) and not isinstance(exclude, (str, bytes))
    if not several or not all(isinstance(pattern, str) for pattern in exclude):
        cure = f"; write ({exclude!r},)" if isinstance(exclude, str) else ""
        raise TypeError(f"exclude={exclude!r} must be a sequence of patterns{cure}")


def check_group(settings: Mapping[str, Any]) -> None:
    """Raise unless the common settings of a parameter group make sense."""
    check_choice("maximize", settings["maximize"], (True, False))
    check_real("weight_decay", settings["weight_decay"])
    check_real("fallback_lr", settings["fallback_lr"])
    check_real("fallback_weight_decay", settings["fallback_weight_decay"])
    check_betas("fallback_betas", settings["fallback_betas"], 2)
