"""What a measured number depends on beside the method: versions, threads, commit, denormals."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import neurms

__all__ = ["checkout", "environment", "flush_denormals", "versions"]

PACKAGES = ("torch", "lightning", "keras", "transformers", "numpy", "scikit-learn", "scipy")


def checkout() -> Path | None:
    """Return the root of the checkout that this package is imported from, or None."""
    root = Path(neurms.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the installed version of each distribution, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def flush_denormals() -> bool:
    """Have the CPU flush denormal numbers to zero; False where it cannot.

    Moments that decay towards zero otherwise take the slow path of the floating-point unit, which
    makes an optimizer look slow for a reason that is none of its own.
    """
    return bool(torch.set_flush_denormal(True))


def environment(*, denormals_flushed: bool) -> dict[str, Any]:
    """Return the record that goes beside a measured result.

    Args:
        denormals_flushed: What :func:`flush_denormals` returned; torch cannot be asked.

    Example:
        >>> sorted(environment(denormals_flushed=False))[:4]
        ['commit', 'cores', 'denormals_flushed', 'machine']
    """
    return {
        "neurms": neurms.__version__,
        "python": platform.python_version(),
        "versions": {name: found for name, found in versions().items() if found},
        "commit": _commit(),
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "denormals_flushed": denormals_flushed,
    }


def _commit() -> str | None:
    root = checkout()
    if root is None or not (root / ".git").exists():
        return None
    git = ("git", "-C", str(root))
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        # Results are written while they are made; all else that makes them counts.
        sources = ("neurms", "benchmarks", ":!benchmarks/results")
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources], check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.returncode else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
