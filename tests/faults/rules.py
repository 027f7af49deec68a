"""All rules of the library, with ranks that suit layers of a few units."""

from __future__ import annotations

from typing import Any

from neurms.core.catalog import HOMES

RULES = list(HOMES)
SMALL: dict[str, dict[str, Any]] = {
    "alice": {"rank": 4, "leading": 2, "interval": 2},
    "apollo": {"rank": 3, "interval": 2},
    "fira": {"rank": 3, "interval": 2},
    "galore": {"rank": 3, "interval": 2},
    "low_rank_soap": {"rank": 4, "leading": 2, "interval": 2},
    "shared_basis": {"rank": 3},
    "sketchy": {"rank": 3},
}
