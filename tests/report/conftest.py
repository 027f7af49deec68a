from __future__ import annotations

import pytest
import torch

from neurms.report import ProfilerReport
from tests.report.small_runs import run


@pytest.fixture(scope="session")
def report() -> ProfilerReport:
    torch.manual_seed(0)
    return run().report()
