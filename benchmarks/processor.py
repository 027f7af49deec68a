"""What the processor tells of itself: counters, vector units, the kernels' instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import torch

from neurms.compiled.native import library

__all__ = ["counters", "vectors"]


def counters() -> str:
    """Return ``"available"``, or why this machine gives no counts of cache misses."""
    perf = shutil.which("perf")
    if perf is None:
        return "perf is not installed"
    asked = [perf, "stat", "-e", "cache-misses,instructions", "true"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    if answer.returncode or "not supported" in answer.stderr:
        return "not supported: a virtual machine without performance counters"
    return "available"


def vectors() -> dict[str, Any]:
    """Return torch's vector unit, and how the native kernels' arithmetic was vectorized.

    Counted in the machine code itself: packed and scalar single-precision additions,
    multiplications and fused ones, by the width of their registers.
    """
    found: dict[str, Any] = {"torch": torch.backends.cpu.get_cpu_capability()}
    native, objdump = library(), shutil.which("objdump")
    if native is None or objdump is None:
        return found
    text = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", native._name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    arithmetic = re.compile(r"\s(v(?:add|mul|fn?m(?:add|sub)\d*)(p|s)s)\s.*?%([xyz]mm)")
    kinds = {"pz": "512 bits", "py": "256 bits", "px": "128 bits", "sx": "scalar"}
    counts = dict.fromkeys(kinds.values(), 0)
    for line in text.splitlines():
        match = arithmetic.search(line)
        if match is not None:
            kind = match[2] + max(re.findall(r"%([xyz])mm", line))
            counts[kinds[kind]] += 1
    return {**found, "native": counts}
