"""Programs as users start them: torchrun on an example, torchrun on a Lightning training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

# What torch 2.13 says where a process that trained by FSDP2 on CPUs is torn down after its work is
# done, in about one of eight runs, with torch.optim.AdamW too. What it wrote is whole by then.
ABORTED_AT_EXIT = "terminate called without an active exception"


def started(repository: Path, ranks: int, *command: str) -> str:
    """Run a program on ``ranks`` processes and return what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ended = subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
    )
    assert ended.returncode == 0 or ABORTED_AT_EXIT in ended.stderr, ended.stderr
    return ended.stdout


def assert_same_weights(one: Path, other: Path, rtol: float, atol: float) -> None:
    a, b = torch.load(one), torch.load(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=rtol, atol=atol)


def test_torchrun(repository: Path, tmp_path: Path) -> None:
    """In float32: the processes round the same sums in other orders, step upon step."""
    files = []
    for ranks, options in ((1, []), (2, []), (2, ["--shard"])):
        files.append(tmp_path / f"{len(files)}.pt")
        program = [f"{repository}/examples/torchrun.py", "--quick", f"--save={files[-1]}"]
        printed = started(repository, ranks, *program, *options)
        assert f"on {ranks} processes" in printed
    assert_same_weights(files[0], files[1], 1e-3, 1e-5)
    assert_same_weights(files[0], files[2], 1e-3, 1e-5)


def test_lightning_strategies(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    program = f"{repository}/tests/core/distributed/lightning_program.py"
    rules = ["neurms", "callback", "rmnp", "racs", "alice", "shared_basis"]
    files = [tmp_path / name for name in ("one", "ddp", "fsdp2")]
    for file, ranks in zip(files, (1, 2, 2), strict=True):
        started(repository, ranks, program, file.name, str(file), *rules)
    assert_same_weights(files[0], files[1], 1e-10, 1e-12)
    assert_same_weights(files[0], files[2], 1e-10, 1e-12)
