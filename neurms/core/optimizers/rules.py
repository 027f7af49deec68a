"""The rules of this library by name: the one table that a new method is added to.

It imports nothing of the package, so that a parameter group can look up another rule than its
optimizer's.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["RULES", "rule_class"]

RULES = {
    "neurms": "NeuRMS",
    "rmnp": "RMNP",
    "racs": "RACS",
    "muon": "Muon",
    "swan": "SWAN",
    "nora": "Nora",
    "lars": "LARS",
    "lamb": "LAMB",
    "shampoo": "Shampoo",
    "shared_basis": "SharedBasis",
    "block_adam": "BlockAdam",
    "adapprox": "Adapprox",
    "sketchy": "Sketchy",
    "alice": "Alice",
    "eigen_adam": "EigenAdam",
    "soap": "SOAP",
    "galore": "GaLore",
    "fira": "Fira",
    "apollo": "APOLLO",
    "low_rank_soap": "LowRankSOAP",
}
"""snake_case name -> class in the module ``neurms.core.optimizers.<name>``."""


def rule_class(name: str) -> type[Any]:
    """Return the optimizer class of a rule, whose module is imported when it is first asked for.

    Raises:
        ValueError: No rule of this library has that name.
    """
    if name not in RULES:
        raise ValueError(f"rule={name!r} is not known; choose one of {list(RULES)}")
    module = importlib.import_module(f"neurms.core.optimizers.{name}")
    found: type[Any] = getattr(module, RULES[name])
    return found
