"""What a state dict says of the process that saved it."""

from __future__ import annotations

import torch

from neurms.compiled.native import in_use
from neurms.version import __version__

__all__ = ["MADE_BY", "made_by"]

MADE_BY = "made_by"
"""The note's key in a state dict, beside ``state`` and ``param_groups``; nothing reads it back."""


def made_by(backend: str) -> dict[str, str]:
    """Return what the last bits of a state depend on: releases, processor and kernels.

    A run that goes on under another note goes on with results that are equal to rounding. The note
    holds strings alone, so that a state dict still loads with ``weights_only=True``.

    Args:
        backend: The optimizer's; ``"auto"`` has native kernels where this process has loaded some.

    Returns:
        ``neurms`` and ``torch``, the releases; ``processor``, the instructions that torch's own
        loops use; ``kernels``, the backend or where the native kernels come from.

    Example:
        >>> sorted(made_by("eager"))
        ['kernels', 'neurms', 'processor', 'torch']
        >>> made_by("eager")["kernels"]
        'eager'
    """
    native = in_use() if backend == "auto" else None
    return {
        "neurms": __version__,
        "torch": str(torch.__version__),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "kernels": native or ("eager" if backend == "auto" else backend),
    }
