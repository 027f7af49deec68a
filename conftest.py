"""How every test runs: reproducibly, on few threads; and the documentation's own examples."""

import os
from pathlib import Path

# Both are read once, when torch and Keras are imported, and subprocesses inherit them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")

import random
import signal
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

SLOW_SECONDS = 600
"""For a slow test that asks for no time of its own: compilers take long on a busy machine."""


def _enter_scratch(namespace: dict[str, Any]) -> None:
    # A page's examples may write files: they do it in a folder of their own.
    namespace["_scratch"] = tempfile.TemporaryDirectory()
    namespace["_home"] = os.getcwd()
    os.chdir(namespace["_scratch"].name)


def _leave_scratch(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_home"])
    namespace["_scratch"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=_enter_scratch,
    teardown=_leave_scratch,
).pytest()


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests time, and skip what needs an accelerator where there is none."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))


@pytest.fixture(autouse=True)
def deterministic_seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_rules() -> Iterator[None]:
    """What a test or an example registers is forgotten after it."""
    from neurms.core.optimizers import rules

    with mock.patch.dict(rules._LOADERS):
        yield


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Every test meets Python's own Ctrl-C handler: shells start background jobs without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parent
