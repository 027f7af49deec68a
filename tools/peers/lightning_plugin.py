"""A pytest plugin that puts our optimizers where Lightning's tests say ``SGD`` and ``Adam``.

Loaded by :mod:`tools.peers.lightning_suite`, before any test is imported. ``NEURMS_PEERS_OUT``
names the file of outcomes, one JSON line each; with ``NEURMS_PEERS_CONTROL`` torch's classes stay.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import neurms

__all__ = ["AsAdam", "AsSGD", "pytest_configure", "pytest_runtest_logreport"]


class AsSGD(neurms.RMNP):
    """RMNP with the signature of torch's SGD."""

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **flags: Any,
    ) -> None:
        super().__init__(params, lr, momentum, nesterov, weight_decay=weight_decay, **flags)


class AsAdam(neurms.EigenAdam):
    """EigenAdam with the signature of torch's Adam."""

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **flags: Any,
    ) -> None:
        super().__init__(
            params, lr, (*betas, betas[1]), eps=eps, weight_decay=weight_decay, **flags
        )


def pytest_configure(config: pytest.Config) -> None:
    """Replace torch's classes, in what is imported from now on."""
    if os.environ.get("NEURMS_PEERS_CONTROL"):
        return
    for name, ours in (("SGD", AsSGD), ("Adam", AsAdam)):
        # Command lines and pickles find a class by these.
        ours.__name__ = ours.__qualname__ = name
        ours.__module__ = "torch.optim"
        setattr(torch.optim, name, ours)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a test's outcome down."""
    if report.when != "call" and not (report.failed or report.skipped):
        return
    line = {"test": report.nodeid, "result": report.outcome, "error": report.longreprtext[-2000:]}
    with Path(os.environ["NEURMS_PEERS_OUT"]).open("a") as file:
        file.write(json.dumps(line) + "\n")
