"""Run other libraries' own optimizer tests, as they are installed, on this library's rules.

    python -m tools.peer_suites            every part
    python -m tools.peer_suites keras      one

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
from types import ModuleType

from tools.peers.outcome import Verdict, judge

__all__ = ["PARTS", "main", "suite"]

PARTS = {"keras": "tools.peers.keras_suite", "torch": "tools.peers.torch_suite"}
"""Name -> the module that runs it; imported when it is asked for."""


def suite(part: str) -> ModuleType:
    """Return the module of a part."""
    return import_module(PARTS[part])


def _verdict(part: str) -> Verdict:
    module = suite(part)
    return judge(module.outcomes(), module.REFUSALS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; return 1 if one holds a failure that nobody expects."""
    parser = argparse.ArgumentParser(description="Run other libraries' tests on our rules.")
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args(arguments).part or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}; choose of {', '.join(PARTS)}")
    good = True
    for part in chosen:
        verdict = _verdict(part)
        good = good and verdict.good
        print(f"{part}: " + "\n".join(verdict.lines()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
