"""``neurms bench``: the benchmarks of the checkout that neurms is imported from."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from neurms.cli.environment import checkout
from neurms.cli.errors import UsageError
from neurms.core.ground.errors import meant

__all__ = ["listing", "run", "scripts"]


def scripts() -> dict[str, Path]:
    """Return the benchmarks by name: the files of benchmarks/ that can be run.

    Raises:
        UsageError: neurms was not installed from a checkout.
    """
    root = checkout()
    if root is None or not (root / "benchmarks").is_dir():
        raise UsageError(
            "benchmarks lie in the repository, not in the installed package; clone it, then "
            'pip install -e ".[bench]" and run neurms bench from there'
        )
    files = sorted((root / "benchmarks").glob("*.py"))
    return {path.stem: path for path in files if '__name__ == "__main__"' in path.read_text()}


def listing(*, as_json: bool = False) -> str:
    """Return the benchmarks with the first line of what each says about itself."""
    found = scripts()
    if as_json:
        return json.dumps({name: _summary(path) for name, path in found.items()}, indent=1)
    width = max(map(len, found), default=0)
    lines = [f"  {name:<{width}}  {_summary(path)}" for name, path in found.items()]
    return "\n".join(["neurms bench NAME [options], where NAME is one of:", *lines])


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark as ``python -m benchmarks.NAME`` would from the checkout's root.

    Raises:
        UsageError: There is no such benchmark.
    """
    found = scripts()
    if name not in found:
        near = meant(name, found)
        raise UsageError(f"there is no benchmark {name!r}{near}; choose one of {', '.join(found)}")
    root = str(found[name].parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    before = sys.argv
    sys.argv = [f"neurms bench {name}", *arguments]
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def _summary(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
