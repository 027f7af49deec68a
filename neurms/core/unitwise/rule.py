"""What NeuRMS's settings say of a layer: its structure, and how its factors act."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neurms.core.ground.errors import check_choice, check_fraction, check_real
from neurms.core.ground.precision import compute_dtype
from neurms.core.structures.gradient_moments import OF_AVERAGES
from neurms.core.structures.unit_feature import UnitFeatureDiagonal

__all__ = [
    "STRUCTURE_SETTINGS",
    "Gemm",
    "LossReduction",
    "Normalize",
    "Rules",
    "UnitwiseRule",
    "Variant",
    "beta_of",
    "check_agc",
    "check_gemm",
    "check_modes",
]

Variant = Literal["U", "B", "F", "P"]
LossReduction = Literal["mean", "sum"]
Normalize = Literal["rms"]
Gemm = Literal["float32", "bfloat16"]
"""What D and H are multiplied in where no gradient is formed."""

STRUCTURE_SETTINGS = (
    "eps",
    "v_min",
    "s_min",
    "s_max",
    "c_min",
    "c_max",
    "bias_correction",
    "clip",
    "kappa",
)


@dataclass(frozen=True)
class UnitwiseRule:
    """How a layer's statistics become factors, and where those act.

    Args:
        structure: Statistics and factors; ``factored`` for variant F.
        upstream: Whether the error sent upstream is scaled (variant B), and with it the gradient.
        momentum: Decay of the velocity, 0 for none.
        coupled: Whether the velocity is scaled once more on its way into the weight.
        agc: Bound on each row of the update relative to the weight's, or None.
        normalize: ``"rms"`` where updates are divided by the average of their length, or None.
    """

    structure: UnitFeatureDiagonal
    upstream: bool = False
    momentum: float = 0.0
    coupled: bool = False
    agc: float | None = None
    normalize: Normalize | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> UnitwiseRule:
        """Return the rule of NeuRMS's settings.

        Raises:
            ValueError: A setting is out of its range.
        """
        check_choice("variant", settings["variant"], ("U", "B", "F", "P"))
        check_fraction("momentum", settings["momentum"])
        check_choice(
            "momentum_coupling", settings["momentum_coupling"], ("gradient", "gradient+velocity")
        )
        if settings["agc"] is not None:
            check_real("agc", settings["agc"], strict=True, cure="None switches it off")
        check_choice("normalize", settings["normalize"], (None, "rms"))
        for name, plain in {**OF_AVERAGES, "damping": None}.items():
            if settings["variant"] != "P" and settings[name] != plain:
                raise ValueError(
                    f'{name}={settings[name]!r} has a part in variant="P" alone; leave it at '
                    f"{plain!r} with variant={settings['variant']!r}"
                )
        structure = UnitFeatureDiagonal(
            beta_of(settings),
            **{name: settings[name] for name in STRUCTURE_SETTINGS},
            factored=settings["variant"] == "F",
        )
        return cls(
            structure,
            settings["variant"] == "B",
            settings["momentum"],
            settings["momentum_coupling"] == "gradient+velocity",
            settings["agc"],
            settings["normalize"],
        )

    def greatest(self, parameter: Tensor) -> float:
        """Return what an entry of a gradient may be at most.

        With ``normalize`` the squares of what moves the parameter have to stay finite in its dtype,
        with room for what a velocity adds up.
        """
        most = torch.finfo(compute_dtype(parameter)).max
        if self.normalize is None:
            return most
        structure = self.structure
        root = max(structure.eps, structure.v_min) ** -0.5
        factor = min(root, structure.c_max) if structure.clip == "absolute" else root
        room = 1e3 * max(factor, 1.0) if structure.factored else 1e3
        return math.sqrt(most / max(parameter.numel(), 1)) / room

    @property
    def variant(self) -> Variant:
        """The variant's letter."""
        return "B" if self.upstream else "F" if self.structure.factored else "U"


def beta_of(settings: Mapping[str, Any]) -> float:
    """Return the decay of second moments: where it is None, what the variant wants."""
    beta: float | None = settings["beta"]
    if beta is not None:
        return beta
    if settings["variant"] != "P":
        return 0.99
    # An average needs no second one.
    return 0.0 if settings["moments"] == "average" else 0.95


def damping_of(settings: Mapping[str, Any]) -> float:
    """Return the damping of P's moments of features: where it is None, what the moments want."""
    damping: float | None = settings["damping"]
    if damping is None:
        # A bound on the step that costs next to nothing.
        return 0.1 if settings["moments"] == "average" else 0.0
    return check_real("damping", damping)


class Rules:
    """Makes each group's rule once, and anew only when a setting of it has changed."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[dict[str, Any], Any, UnitwiseRule]] = {}
        self._last: Any = None, {}, None, None

    def of(self, group: Mapping[str, Any]) -> UnitwiseRule:
        """Return what a group's settings say."""
        # Asked several times a step; users may change any setting between two of them.
        params = group["params"] if "params" in group else None
        last, settings, known, rule = self._last
        # Lists of other parameters are not compared: a tensor's == is no truth value.
        if last is group and known is params and settings == group:
            made: UnitwiseRule = rule
            return made
        key = id(group)
        settings, known, rule = self._made.get(key, ({}, None, None))
        if rule is None or known is not params or settings != group:
            settings, rule = dict(group), UnitwiseRule.of(group)
            self._made[key] = settings, params, rule
        self._last = group, settings, params, rule
        made = rule
        return made


def check_gemm(gemm: Any, update: str) -> None:
    """Raise unless ``gemm`` is known, and has a product to act on."""
    check_choice("gemm", gemm, ("float32", "bfloat16"))
    if gemm != "float32" and update != "backward":
        raise ValueError(
            f'gemm={gemm!r} has no effect with update="step", where autograd makes the gradient; '
            'use update="backward", or torch.autocast around the forward pass'
        )


def check_modes(
    loss_reduction: Any,
    update: Any,
    gemm: Any,
    loss_scale: Callable[[], Any] | None,
    agc: float | None,
) -> None:
    """Raise unless the settings that hold for a whole model are known and go together.

    Raises:
        TypeError: ``loss_scale`` cannot be called.
        ValueError: One is not known, or what needs gradients meets ``update="backward"``.
    """
    check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
    check_choice("update", update, ("step", "backward"))
    check_gemm(gemm, update)
    if loss_scale is not None and not callable(loss_scale):
        raise TypeError(f"loss_scale={loss_scale!r} must be callable, such as scaler.get_scale")
    if update == "backward" and loss_scale is not None:
        raise ValueError(
            'loss_scale cannot go with update="backward": a GradScaler unscales gradients, and in '
            'that mode there are none; use update="step", or bfloat16 without a scaler'
        )
    check_agc(agc, update)


def check_agc(agc: float | None, update: Any) -> None:
    """Raise if updates are to be clipped that are never formed."""
    if update == "backward" and agc is not None:
        raise ValueError(
            f'agc={agc!r} cannot go with update="backward", which never forms the update that it '
            'would clip; use update="step" or agc=None'
        )
