"""Build again what is in a folder, from its sdist, elsewhere: ``python -m tools.check_again dist``.

Every file must come out alike to the bit, the sdist itself among them. So whoever has the sdist can
see that the wheels were made from it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

__all__ = ["differences", "main"]


def differences(folder: Path) -> list[str]:
    """Return which files of ``folder`` come out otherwise, nothing if none does.

    Args:
        folder: Holds one sdist, and wheels that were built with the compiler at hand.
    """
    sdists = list(folder.glob("*.tar.gz"))
    if len(sdists) != 1:
        return [f"{folder} must hold one sdist, not {sdists}; run make dist"]
    with tempfile.TemporaryDirectory() as scratch:
        root, made = Path(scratch, sdists[0].name.removesuffix(".tar.gz")), Path(scratch, "made")
        with tarfile.open(sdists[0]) as sdist:
            sdist.extractall(scratch, filter="data")
        kinds = ["pure"]
        if any(not path.name.endswith("-any.whl") for path in folder.glob("*.whl")):
            kinds.append("native")
        if problem := next(filter(None, (_build(root, made, kind) for kind in kinds)), ""):
            return [problem]
        wanted, found = _hashes(folder), _hashes(made)
    return [f"{name} comes out otherwise" for name in wanted if wanted[name] != found.get(name)]


def _build(root: Path, made: Path, kind: str) -> str:
    """Build a kind of wheel, and with the pure one the sdist; return what went wrong."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(made)]
    command += ["-t", "wheel"] if kind == "native" else []
    environment = {**os.environ, "NEURMS_WHEEL": kind}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return f"the {kind} wheel cannot be built:\n{done.stderr}" if done.returncode else ""


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Print the hashes, or what is different; return 1 if anything is."""
    folder = Path(sys.argv[1])
    if problems := differences(folder):
        print("\n".join(problems))
        return 1
    for name, digest in _hashes(folder).items():
        print(f"{digest}  {name}")
    print("built again from the sdist, each of them is alike")
    return 0


if __name__ == "__main__":
    sys.exit(main())
