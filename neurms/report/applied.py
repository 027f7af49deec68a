"""From advice to an optimizer: its settings, the code that has them, or the optimizer itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from neurms.core.optimizers.registry import create, is_torch, optimizer_class
from neurms.core.routing import head_of
from neurms.report.advice import Advice, Rule

__all__ = ["AdviceList", "Choice", "Part"]


@dataclass(frozen=True)
class Part:
    """Layers with settings of their own.

    Args:
        layers: Their names in the model.
        settings: What their group says, another ``"rule"`` perhaps.
    """

    layers: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """An optimizer by its name, and how it differs from layer to layer.

    Args:
        name: As :func:`neurms.create` takes it.
        settings: Its keyword arguments but for ``groups``.
        parts: Layers that differ.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for a model."""
        groups = [{"params": _own(model, part.layers), **part.settings} for part in self.parts]
        more = {"groups": groups} if groups else {}
        return create(self.name, model, **self.settings, **more)

    def code(self) -> str:
        """Return Python code that makes the optimizer of a ``model``."""
        if is_torch(self.name):
            head = f"neurms.create({self.name!r}, model"
        else:
            head = f"neurms.{optimizer_class(self.name).__name__}(model"
        settings = "".join(f", {key}={value!r}" for key, value in self.settings.items())
        if not self.parts:
            return f"optimizer = {head}{settings})"
        lines = [f"optimizer = {head}{settings}, groups=["]
        for part in self.parts:
            own = "".join(f", {key!r}: {value!r}" for key, value in part.settings.items())
            lines.append(
                f'    {{"params": [p for name in {list(part.layers)!r}\n'
                f"        for p in model.get_submodule(name).parameters(recurse=False)]{own}}},"
            )
        return "\n".join([*lines, "])"])


class AdviceList(list[Advice]):
    """The advice on all layers; it can be applied.

    Example:
        >>> import torch, neurms
        >>> from neurms.report import Advice
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> advice = AdviceList([Advice("0", "F", "rho 0.5"), Advice("1", "AdamW", "nothing")])
        >>> print(advice.choice(model, {"F": 0.01}).code())
        optimizer = neurms.NeuRMS(model, variant='F', lr=0.01, exclude=['1'])
        >>> [row.rule for row in advice.apply(model).plan()]
        ['neurms', 'neurms', 'fallback', 'fallback']
    """

    def choice(self, model: nn.Module, rates: Mapping[Rule, float] | None = None) -> Choice:
        """Return one optimizer in which every layer has the rule that it is advised.

        NeuRMS's variant of most layers is the optimizer; other layers are groups of another variant
        or rule, and AdamW's are excluded. Beside U or F, which need taps, a layer that is advised P
        gets RACS, a fit of the same kind. Undecided layers get AdamW. Embeddings, norms and tied
        weights go the way that they go under any rule.

        Args:
            model: The model; its layers have the names that they had when it was profiled.
            rates: Rule -> learning rate; the rule's default where it has none.

        Raises:
            ValueError: The model has no layer of a name.
        """
        given, layers = rates or {}, self._layers(model)
        counts = Counter(rule for rule in layers.values() if rule not in ("AdamW", "undecided"))
        if not counts:
            return Choice("adamw", {"lr": given["AdamW"]} if "AdamW" in given else {})
        base = _base(counts)
        settings = {**_settings(base), **({"lr": given[base]} if base in given else {})}
        if base == "RMNP" and _is_head_of(layers, model, base):
            settings["head"] = "rule"
        if left := [name for name, rule in layers.items() if rule in ("AdamW", "undecided")]:
            settings["exclude"] = left
        if "AdamW" in given:
            settings["fallback_lr"] = given["AdamW"]
        parts = [
            Part(
                tuple(name for name, own in layers.items() if own == rule),
                {**_group_settings(rule), **_rate(given, rule)},
            )
            for rule in counts
            if rule != base
        ]
        name = "rmnp" if base == "RMNP" else "neurms"
        return Choice(name, settings, tuple(parts))

    def apply(
        self, model: nn.Module, rates: Mapping[Rule, float] | None = None, **settings: Any
    ) -> torch.optim.Optimizer:
        """Return the optimizer that follows from the advice; see :meth:`choice`.

        Args:
            model: The model, freshly initialised or not.
            rates: Rule -> learning rate; the rule's default where it has none.
            **settings: Further settings of the optimizer.
        """
        choice = self.choice(model, rates)
        return replace(choice, settings={**choice.settings, **settings}).optimizer(model)

    def _layers(self, model: nn.Module) -> dict[str, Rule]:
        """Return the rule of each layer that has parameters of its own to go by it."""
        modules = dict(model.named_modules())
        if lost := [one.layer for one in self if one.layer not in modules]:
            raise ValueError(
                f"advice is on the layer {lost[0]!r}, and the model has none of that name; pass "
                "the model that was profiled, or one that is built alike"
            )
        seen: set[int] = set()
        found = {}
        for one in self:
            module = modules[one.layer]
            own = {id(p) for p in module.parameters(recurse=False)}
            tied = bool(own & seen)
            seen |= own
            if own and not tied and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                found[one.layer] = one.rule
        return found


def _base(counts: Counter[Rule]) -> Rule:
    """Return the rule that the optimizer itself has."""
    tapped = [rule for rule, _ in counts.most_common() if rule in ("F", "U")]
    # Only what reads layers itself can take them beside other rules.
    return tapped[0] if tapped else "P" if "P" in counts else "RMNP"


def _settings(rule: Rule) -> dict[str, Any]:
    return {"variant": rule} if rule in ("F", "U", "P") else {}


def _group_settings(rule: Rule) -> dict[str, Any]:
    """Return what a group says for a rule that is not the optimizer's own."""
    others = {"P": {"rule": "racs"}, "RMNP": {"rule": "rmnp"}}
    return others.get(rule, {"variant": rule})


def _rate(rates: Mapping[Rule, float], rule: Rule) -> dict[str, Any]:
    """Return the rate that a group names."""
    if rule in rates:
        return {"lr": rates[rule]}
    other = _group_settings(rule).get("rule")
    # A group would have the optimizer's rate, which is another rule's.
    return {} if other is None else {"lr": float(optimizer_class(other).default_settings()["lr"])}


def _is_head_of(layers: Mapping[str, Rule], model: nn.Module, rule: Rule) -> bool:
    head = head_of(model)
    return any(own == rule and model.get_submodule(name) is head for name, own in layers.items())


def _own(model: nn.Module, layers: tuple[str, ...]) -> list[nn.Parameter]:
    return [p for name in layers for p in model.get_submodule(name).parameters(recurse=False)]
