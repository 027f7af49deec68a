"""The rules of this library: the one table that a new method is added to.

It stands above the rules, so that none of them imports what stands on it, and is read when
``neurms`` is imported; a rule's module is imported when the rule is first asked for.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from neurms.core.optimizers.rules import announce

__all__ = ["HOMES"]

HOMES = {
    "neurms": "neurms.core.unitwise.neurms.NeuRMS",
    "rmnp": "neurms.core.optimizers.rmnp.RMNP",
    "racs": "neurms.core.optimizers.racs.RACS",
    "muon": "neurms.core.optimizers.muon.Muon",
    "swan": "neurms.core.optimizers.swan.SWAN",
    "nora": "neurms.core.optimizers.nora.Nora",
    "lars": "neurms.core.optimizers.lars.LARS",
    "lamb": "neurms.core.optimizers.lamb.LAMB",
    "shampoo": "neurms.core.optimizers.shampoo.Shampoo",
    "shared_basis": "neurms.core.optimizers.shared_basis.SharedBasis",
    "block_adam": "neurms.core.optimizers.block_adam.BlockAdam",
    "adapprox": "neurms.core.optimizers.adapprox.Adapprox",
    "sketchy": "neurms.core.optimizers.sketchy.Sketchy",
    "alice": "neurms.core.optimizers.alice.Alice",
    "eigen_adam": "neurms.core.optimizers.eigen_adam.EigenAdam",
    "soap": "neurms.core.optimizers.soap.SOAP",
    "galore": "neurms.core.optimizers.galore.GaLore",
    "fira": "neurms.core.optimizers.fira.Fira",
    "apollo": "neurms.core.optimizers.apollo.APOLLO",
    "low_rank_soap": "neurms.core.optimizers.low_rank_soap.LowRankSOAP",
}
"""snake_case name -> class."""


def _load(home: str) -> type[Any]:
    module, _, name = home.rpartition(".")
    found: type[Any] = getattr(import_module(module), name)
    return found


for _name, _home in HOMES.items():
    announce(_name, partial(_load, _home))
