"""Install a wheel into fresh environments: ``python -m tools.check_install WHEEL [PYTHON ...]``.

Each has no compiler on its PATH, and a home that cannot be written. ``neurms doctor`` must find
the wheel's kernels, a training must take steps with them and load no second OpenMP runtime.
torch comes from where pip is configured to look.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.messages import ROOT

__all__ = ["main", "try_out"]

TRAINING = """
import time
start = time.perf_counter()
import torch
loaded = time.perf_counter()
import neurms
from neurms.compiled.native import library, origin
from neurms.compiled.native.openmp import runtimes
before = runtimes()
imported = time.perf_counter()
waits = []
early = {"update": "backward"}
for method, settings in (("racs", {}), ("rmnp", {}), ("neurms", {}), ("neurms", early)):
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8))
    rule = neurms.create(method, model, **settings)
    for step in range(2):
        rule.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.ones(32, 256)), torch.arange(32) % 8)
        began = time.perf_counter()
        loss.backward()
        rule.step()
        waits.append(time.perf_counter() - began)
assert runtimes() == before and len(before) == 1, (before, runtimes())
assert origin().startswith("from the wheel, "), origin()
print(f"{origin()}; torch imported in {loaded - start:.2f} s, neurms in {imported - loaded:.2f} s,"
      f" longest step {1e3 * max(waits):.0f} ms; {before[0].rpartition('/')[2]}")
"""


def try_out(wheel: Path, python: str) -> list[str]:
    """Return what is wrong with a wheel in a fresh environment of one interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        home, environment = Path(folder, "home"), Path(folder, "venv")
        (nothing := Path(folder, "path")).mkdir()
        home.mkdir(mode=0o555)
        start = time.perf_counter()
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        pip += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
        for command in (
            [python, "-m", "venv", str(environment)],
            [*pip, f"{wheel.resolve()}[cli]"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return [f"{python}: {' '.join(command)} failed:\n{done.stderr[-800:]}"]
        print(f"{python}: installed in {time.perf_counter() - start:.1f} s")
        bare = {"PATH": str(nothing), "HOME": str(home / "absent")}
        problems = []
        for arguments, wanted in (
            (["-c", TRAINING], "from the wheel, "),
            (["-m", "neurms", "doctor"], "native kernels     from the wheel, "),
        ):
            command = [str(environment / "bin" / "python"), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=bare, cwd=folder)
            lines = [line for line in done.stdout.splitlines() if "from the wheel" in line]
            print("\n".join(lines))
            if done.returncode or " ".join(wanted.split()) not in " ".join(done.stdout.split()):
                problems.append(f"{python}: {done.stdout}{done.stderr}")
        if any(home.iterdir()):
            problems.append(f"{python}: something was written into the home folder")
        return problems


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    wheel, *pythons = sys.argv[1:]
    problems = [p for python in pythons or [sys.executable] for p in try_out(Path(wheel), python)]
    print("\n".join(problems) or "the wheel installs and its kernels serve")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
