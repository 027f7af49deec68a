"""The rules of this library: the one table that a new method is added to.

It stands above the rules, so that none of them imports what stands on it, and is read when
``neurms`` is imported; a rule's module is imported when the rule is first asked for.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from neurms.core.optimizers.rules import announce

if TYPE_CHECKING:  # for `neurms.Muon` and the like
    from neurms.core.optimizers.adapprox import Adapprox as Adapprox
    from neurms.core.optimizers.alice import Alice as Alice
    from neurms.core.optimizers.apollo import APOLLO as APOLLO
    from neurms.core.optimizers.block_adam import BlockAdam as BlockAdam
    from neurms.core.optimizers.eigen_adam import EigenAdam as EigenAdam
    from neurms.core.optimizers.fira import Fira as Fira
    from neurms.core.optimizers.galore import GaLore as GaLore
    from neurms.core.optimizers.lamb import LAMB as LAMB
    from neurms.core.optimizers.lars import LARS as LARS
    from neurms.core.optimizers.low_rank_soap import LowRankSOAP as LowRankSOAP
    from neurms.core.optimizers.muon import Muon as Muon
    from neurms.core.optimizers.nora import Nora as Nora
    from neurms.core.optimizers.racs import RACS as RACS
    from neurms.core.optimizers.rmnp import RMNP as RMNP
    from neurms.core.optimizers.shampoo import Shampoo as Shampoo
    from neurms.core.optimizers.shared_basis import SharedBasis as SharedBasis
    from neurms.core.optimizers.sketchy import Sketchy as Sketchy
    from neurms.core.optimizers.soap import SOAP as SOAP
    from neurms.core.optimizers.swan import SWAN as SWAN
    from neurms.core.unitwise.neurms import NeuRMS as NeuRMS

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
