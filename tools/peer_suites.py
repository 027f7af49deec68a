"""Run other libraries' own optimizer tests, as they are installed, on this library's rules.

    python -m tools.peer_suites            every part that is installed
    python -m tools.peer_suites keras      one
    python -m tools.peer_suites lightning --checkout PATH    one that is not installed

Nothing of theirs is copied: a part imports the tests from the installed package and puts our
classes where theirs stood. Every failure must be in the part's table of refusals, each with its
reason and the error that it must show; the program fails otherwise, and also when a refusal is no
longer needed. A new part is a module in ``tools/peers`` with ``RULES``, ``outcomes(rules)`` and
``REFUSALS``, and a line in ``PARTS``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tools.peers.outcome import Verdict, judge

__all__ = ["FROM_CHECKOUTS", "PARTS", "main", "suite", "verdict_of"]

PARTS = {"keras": "tools.peers.keras_suite", "torch": "tools.peers.torch_suite"}
"""Name -> the module that runs it; imported when it is asked for."""

FROM_CHECKOUTS = {"lightning": "tools.peers.lightning_suite"}
"""The same, of suites that no package installs."""


def suite(part: str) -> ModuleType:
    """Return the module of a part."""
    return import_module({**PARTS, **FROM_CHECKOUTS}[part])


def verdict_of(part: str, checkout: Path | None = None) -> Verdict:
    """Run a part's suite and judge it by its table.

    Args:
        part: Its name.
        checkout: Where the other library's repository is, for a suite that is not installed.
    """
    module = suite(part)
    given = () if part in PARTS else (checkout,)
    return judge(module.outcomes(*given), module.REFUSALS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; return 1 if one holds a failure that nobody expects."""
    parser = argparse.ArgumentParser(description="Run other libraries' tests on our rules.")
    names = {**PARTS, **FROM_CHECKOUTS}
    parser.add_argument("part", nargs="*", help=f"of {', '.join(names)}; by default {list(PARTS)}")
    parser.add_argument("--checkout", type=Path, help="the repository of a suite not installed")
    given = parser.parse_args(arguments)
    chosen = given.part or list(PARTS)
    if unknown := [part for part in chosen if part not in names]:
        parser.error(f"no part is called {unknown[0]!r}; choose of {', '.join(names)}")
    if lost := [part for part in chosen if part in FROM_CHECKOUTS and given.checkout is None]:
        parser.error(f"{lost[0]} is not installed with its tests; pass --checkout PATH")
    good = True
    for part in chosen:
        verdict = verdict_of(part, given.checkout)
        good = good and verdict.good
        print(f"{part}: " + "\n".join(verdict.lines()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
