"""Forked children: loaders' workers, and what native kernels do where OpenMP's threads are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import neurms
from neurms.compiled.native import compiler

WAIT = 60.0


def run(script: str, repository: Path) -> str:
    """Run a script in a process that may use two threads; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=110,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_native_kernels_in_a_forked_child(repository: Path) -> None:
    """The parent has used OpenMP's threads, which the child does not have."""
    script = """
        import os, time, torch
        from neurms.compiled.finite import GREATEST, within
        torch.set_num_threads(2)
        x = torch.zeros(1 << 18)
        assert within([x], [GREATEST])
        child = os.fork()
        if child == 0:
            os._exit(0 if within([x], [GREATEST]) else 1)
        for _ in range(600):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                print("status", status)
                break
            time.sleep(0.1)
        else:
            os.kill(child, 9)
            print("hung")
    """
    assert run(script, repository).strip() == "status 0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_training_in_a_forked_child_of_one_thread_is_training() -> None:
    torch.set_num_threads(1)

    def weight() -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        optimizer = neurms.NeuRMS(model, lr=0.1, variant="U")
        for _ in range(3):
            model(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model[0].weight.detach()

    here = weight()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, weight().numpy().tobytes())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + WAIT
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hung")
        time.sleep(0.01)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == here.numpy().tobytes()


class Rows(Dataset[torch.Tensor]):
    """Rows made by a model that an optimizer taps, as an augmentation network may."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            made: torch.Tensor = self.model(torch.full((4,), float(index)))
        return made


@pytest.mark.parametrize(
    ("method", "update"),
    [
        ("fork", "step"),
        ("fork", "backward"),
        pytest.param("spawn", "step", marks=pytest.mark.slow),
        pytest.param("spawn", "backward", marks=pytest.mark.slow),
    ],
)
def test_workers_that_hold_the_tapped_model(method: str, update: str) -> None:
    """Spawned workers get a pickle of the model, forked ones the model with its hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = neurms.NeuRMS(model, update=update, variant="U")  # type: ignore[arg-type]
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    loader = DataLoader(Rows(model), 2, num_workers=1, multiprocessing_context=method)
    with torch.no_grad():
        expected = model(torch.arange(6.0)[:, None].expand(6, 4))
    torch.testing.assert_close(torch.cat(list(loader)), expected)
    optimizer.zero_grad()
    for rows in loader:  # training goes on between batches
        model(torch.cat([rows, rows[:, :1]], 1).detach()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
