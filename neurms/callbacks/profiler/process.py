"""What the whole process takes: resident memory, its peak, the accelerator's peak."""

from __future__ import annotations

import sys
from typing import Any

import torch

from neurms.core.ground.extras import require

__all__ = ["process_memory"]


def process_memory(device: torch.device) -> dict[str, int | None]:
    """Return resident bytes now, their peak since the process began, and the accelerator's peak.

    Args:
        device: Where the model computes.

    Returns:
        ``rss_bytes``, ``peak_rss_bytes`` and ``device_peak_bytes`` (None without an accelerator).

    Raises:
        ImportError: psutil is not installed.
    """
    psutil: Any = require("psutil", extra="report")
    info = psutil.Process().memory_info()
    # Windows alone tells the peak through psutil.
    peak = getattr(info, "peak_wset", None) or _peak()
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device)
    return {
        "rss_bytes": int(info.rss),
        "peak_rss_bytes": max(int(info.rss), int(peak)),
        "device_peak_bytes": on_device,
    }


def _peak() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
