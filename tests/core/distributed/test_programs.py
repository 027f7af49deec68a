"""Programs as users start them: torchrun on an example, torchrun on a Lightning training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.kill_resume import differing
from tests.core.distributed.killed_program import KILLS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

# What torch 2.13 says where a process that trained by FSDP2 on CPUs is torn down after its work is
# done, in about one of eight runs, with torch.optim.AdamW too. What it wrote is whole by then.
ABORTED_AT_EXIT = "terminate called without an active exception"


def started(repository: Path, ranks: int, *command: str, restarts: int = 0) -> str:
    """Run a program on ``ranks`` processes and return what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher += [f"--max-restarts={restarts}"]
    ended = subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=repository,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(repository),
            # Else ranks that are started anew look for each other where the dead ones were.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
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


def test_killed_ranks_end_at_the_bits_of_a_run_to_which_nothing_happened(
    repository: Path, tmp_path: Path
) -> None:
    """RACS: many sums over ranks in a step. The last checkpoint holds weights and state."""
    options = ["--quick", "--optimizer=racs"]
    here = f"{repository}/tests/core/distributed/killed_program.py"
    printed = started(
        repository, 2, here, *options, f"--folder={tmp_path}/killed", restarts=len(KILLS)
    )
    assert "steps 10 to 20 on 2 processes" in printed
    program = f"{repository}/examples/pretraining.py"
    started(repository, 2, program, *options, f"--folder={tmp_path}/alone")
    ends = []
    for run in ("killed", "alone"):
        dcp_to_torch_save(tmp_path / run / "step-20", tmp_path / f"{run}.pt")
        ends.append(torch.load(tmp_path / f"{run}.pt", weights_only=True))
    assert len(ends[0]["optimizer"]["state"]) > 3
    assert differing(*ends) == []


def test_pretraining_goes_on_on_other_numbers_of_processes(
    repository: Path, tmp_path: Path
) -> None:
    """A fifth of a nat below ln(128) = 4.85, which knows nothing."""
    program = [f"{repository}/examples/pretraining.py", f"--folder={tmp_path}", "--optimizer=rmnp"]
    first = started(repository, 2, *program, "--steps=6", "--every=3")
    assert "steps 0 to 6 on 2 processes" in first
    printed = started(repository, 1, *program, "--steps=12", "--every=6")
    found = re.fullmatch(r"steps 6 to 12 on 1 processes: loss (\d\.\d+)", printed.strip())
    assert found, printed
    assert float(found[1]) < 4.65


def test_accelerate(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    program = f"{repository}/tests/core/distributed/accelerate_program.py"
    files = [tmp_path / "one", tmp_path / "two"]
    for file, ranks in zip(files, (1, 2), strict=True):
        started(repository, ranks, program, str(file), "neurms", "rmnp", "racs", "alice")
    assert_same_weights(*files, 1e-10, 1e-12)
