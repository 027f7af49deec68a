"""The methods of a comparison: what is fixed of each and what its search may vary.

Every method gets the same budget over the settings that it has: its rate, its momentum (AdamW's
beta1), the memory of its second moments (AdamW's beta2), and rate and momentum of the AdamW that
takes what is outside of its rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.space import Space, levels, rate
from benchmarks.own_rules import create

__all__ = ["Entrant", "images", "tags", "text"]

PLAIN = ("sgd", "adamw", "adamw, two rates")
"""Torch's rules, whose fused kernels are used."""


@dataclass(frozen=True)
class Entrant:
    """A method with its search.

    Args:
        rule: A name for ``neurms.create``, or one of the benchmarks' own.
        space: ``lr`` and, of ``momentum``, ``memory``, ``fallback_lr`` and ``fallback_momentum``,
            those that the rule has.
        settings: What is fixed.
        memory: The second beta of the fallback, fixed for all.
    """

    rule: str
    space: Space
    settings: Mapping[str, Any] = field(default_factory=dict)
    memory: float = 0.95

    def make(self, model: nn.Module, values: Mapping[str, float]) -> torch.optim.Optimizer:
        """Return the optimizer with the values that a search chose."""
        chosen: dict[str, Any] = {"lr": values["lr"], **self.settings}
        if self.rule.startswith("adamw") or self.rule == "block_adam":
            chosen["betas"] = (values["momentum"], values["memory"])
        elif self.rule == "sketchy":
            # Its first beta is the gradient's own weight in a sketch, not the momentum's.
            chosen |= {"betas": (0.0, values["memory"]), "momentum": values["momentum"]}
        else:
            chosen |= {
                name: values[own]
                for own, name in (("momentum", "momentum"), ("memory", "beta"))
                if own in values
            }
        if "fallback_lr" in values:
            chosen["fallback_lr"] = values["fallback_lr"]
            chosen["fallback_betas"] = (values["fallback_momentum"], self.memory)
        return create(self.rule, model, **chosen)

    def recorded(self) -> dict[str, Any]:
        """Return the method as it goes into a results file."""
        axes = {name: list(axis.choices) or "rate" for name, axis in self.space.axes.items()}
        fallback = {"fallback_memory": self.memory} if "fallback_lr" in axes else {}
        return {"rule": self.rule, "settings": dict(self.settings), "axes": axes, **fallback}


MOMENTA = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MEMORIES = (0.8, 0.9, 0.95, 0.99, 0.999)


def _entrant(
    rule: str,
    lr: float,
    *,
    momentum: float | None = None,
    memory: float | None = None,
    fallback: float | None = None,
    fallback_memory: float = 0.95,
    **settings: Any,
) -> Entrant:
    """Return a method whose search begins at these values; None for what the rule does not have."""
    found = {
        "lr": rate(lr),
        "momentum": None if momentum is None else levels(momentum, *MOMENTA),
        "fallback_lr": None if fallback is None else rate(fallback),
        "memory": None if memory is None else levels(memory, *MEMORIES),
        "fallback_momentum": None if fallback is None else levels(0.7, *MOMENTA),
    }
    axes = {name: axis for name, axis in found.items() if axis is not None}
    fused = {"fused": True} if rule in PLAIN else {}
    return Entrant(rule, Space(axes), {**fused, **settings}, fallback_memory)


AVERAGE = {"moments": "average", "nesterov": True}
"""P's moments of what moves the weights, the averaged gradient: nothing else of it is averaged."""


def text(fallback: float = 8e-3) -> dict[str, Entrant]:
    """Return the methods on text.

    Args:
        fallback: Where the search for the fallback's rate begins.
    """
    rest: dict[str, Any] = {"fallback": fallback}
    relative: dict[str, Any] = {"clip": "relative", "kappa": 10.0}
    return {
        "AdamW": _entrant("adamw", 8e-3, momentum=0.7, memory=0.95, weight_decay=0.0),
        "AdamW, two rates": _entrant(
            "adamw, two rates", 8e-3, momentum=0.7, memory=0.95, weight_decay=0.0, **rest
        ),
        "SGD": _entrant("sgd", 0.3, momentum=0.9),
        "RACS": _entrant("racs", 0.08, memory=0.9, **rest),
        "P": _entrant("moments", 8e-3, memory=0.95, **rest),
        "P momentum": _entrant("moments", 8e-3, momentum=0.5, memory=0.95, **rest),
        "P average": _entrant("moments", 4e-3, momentum=0.8, **AVERAGE, **rest),
        "P backward": _entrant("moments", 8e-3, memory=0.95, update="backward", probes=4, **rest),
        "RMNP": _entrant("rmnp", 0.02, momentum=0.8, **rest),
        "Muon": _entrant("muon", 0.04, momentum=0.8, weight_decay=0.0, **rest),
        "Muon 3 rounds": _entrant("muon", 0.04, momentum=0.8, weight_decay=0.0, steps=3, **rest),
        "NeuRMS-U": _entrant("neurms", 4e-3, momentum=0.8, memory=0.99, variant="U", **rest),
        "NeuRMS-U relative": _entrant(
            "neurms", 8e-3, momentum=0.8, memory=0.99, variant="U", **relative, **rest
        ),
        "NeuRMS-U relative, head to AdamW": _entrant(
            "neurms",
            8e-3,
            momentum=0.8,
            memory=0.99,
            variant="U",
            head="fallback",
            **relative,
            **rest,
        ),
        "NeuRMS-U normalized": _entrant(
            "neurms, normalized", 8e-3, memory=0.99, variant="U", **relative, **rest
        ),
        "NeuRMS-F normalized": _entrant(
            "neurms, normalized", 8e-3, memory=0.99, variant="F", **relative, **rest
        ),
        "NeuRMS-F relative": _entrant(
            "neurms", 8e-3, momentum=0.8, memory=0.99, variant="F", **relative, **rest
        ),
    }


def images(fallback: float = 3e-3, *, norms: bool = False) -> dict[str, Entrant]:
    """Return the methods on images.

    Args:
        fallback: Where the search for the fallback's rate begins.
        norms: Whether the network has weights that are outside of NeuRMS's rule, too.
    """
    rest: dict[str, Any] = {"fallback": fallback, "fallback_memory": 0.999}
    own = rest if norms else {}
    return {
        "AdamW": _entrant("adamw", 2e-3, momentum=0.9, memory=0.99, weight_decay=0.0),
        "AdamW, two rates": _entrant(
            "adamw, two rates", 2e-3, momentum=0.9, memory=0.99, weight_decay=0.0, **rest
        ),
        "SGD": _entrant("sgd", 0.1, momentum=0.9),
        "RACS": _entrant("racs", 0.04, memory=0.9, **rest),
        "P": _entrant("moments", 2e-3, memory=0.95, **rest),
        "P momentum": _entrant("moments", 2e-3, momentum=0.5, memory=0.95, **rest),
        "P average": _entrant("moments", 2e-3, momentum=0.8, **AVERAGE, **rest),
        "P damped": _entrant("moments", 2e-3, momentum=0.8, damping=1.0, **AVERAGE, **rest),
        "RMNP": _entrant("rmnp", 0.01, momentum=0.8, **rest),
        "Muon": _entrant("muon", 0.02, momentum=0.8, weight_decay=0.0, **rest),
        "NeuRMS-U": _entrant("neurms", 3e-3, momentum=0.9, memory=0.99, variant="U", **own),
        "NeuRMS-U plain": _entrant("neurms", 2e-2, memory=0.99, variant="U", **own),
        "NeuRMS-U normalized": _entrant(
            "neurms, normalized", 2e-3, memory=0.99, variant="U", **own
        ),
        "NeuRMS-F": _entrant("neurms", 3e-3, momentum=0.9, memory=0.99, variant="F", **own),
    }


def tags(fallback: float = 4e-3) -> dict[str, Entrant]:
    """Return the methods on tags: some of those on text, and the shared-basis paper's.

    Args:
        fallback: Where the search for the fallback's rate begins.
    """
    rest: dict[str, Any] = {"fallback": fallback}
    roots: dict[str, Any] = {"grafting": "rmsprop_normalized"}
    names = ("AdamW", "AdamW, two rates", "RACS", "P", "P momentum", "P average", "RMNP", "Muon")
    known = text(fallback)
    return {name: known[name] for name in names} | {
        "NeuRMS-U normalized": known["NeuRMS-U normalized"],
        "Block Adam": _entrant("block_adam", 4e-3, momentum=0.9, memory=0.95, **rest),
        "Shampoo": _entrant("shampoo", 1e-3, momentum=0.9, interval=20, **roots, **rest),
        "Sketchy": _entrant("sketchy", 1e-3, momentum=0.9, memory=0.999, rank=16, **roots, **rest),
        "SharedBasis": _entrant("shared_basis", 1e-3, momentum=0.9, rank=16, **rest),
    }
