"""What the whole process takes: resident memory, its peak, the accelerator's peak."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

__all__ = ["process_memory"]


def process_memory(device: torch.device) -> dict[str, int | None]:
    """Return resident bytes now, their peak since the process began, and the accelerator's peak.

    Args:
        device: Where the model computes.

    Returns:
        ``rss_bytes``, ``peak_rss_bytes`` and ``device_peak_bytes`` (None without an accelerator).
        Outside of Linux the first two need psutil, and are None without it.
    """
    resident, peak = _resident(), _peak()
    if resident is not None:
        peak = max(resident, peak or 0)
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device)
    return {"rss_bytes": resident, "peak_rss_bytes": peak, "device_peak_bytes": on_device}


def _resident() -> int | None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    info = _psutil_info()
    return None if info is None else int(info.rss)


def _peak() -> int | None:
    if sys.platform == "win32":
        # Windows alone tells the peak through psutil.
        return getattr(_psutil_info(), "peak_wset", None)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _psutil_info() -> Any:
    with suppress(ImportError):
        return import_module("psutil").Process().memory_info()
    return None
