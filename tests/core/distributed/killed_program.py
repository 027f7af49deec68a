"""``examples/pretraining.py`` under torchrun, with a rank that is killed in each of its starts."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from neurms.core.ground.shards import RowShard
from neurms.core.optimizers.base import PreconditionedOptimizer


def kill_at(owner: Any, name: str, call: int, before: bool) -> None:
    """Have this process killed before or after a call of a method."""
    real, count = getattr(owner, name), 0

    def called(*arguments: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*arguments, **settings)
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, called)


# For each start of 20 steps, with a checkpoint after every fifth: which rank is killed, at which
# call of what, and whether before it.
KILLS: list[tuple[int, Any, str, int, bool]] = [
    # In the middle of a step, where the other rank waits for a sum.
    (1, RowShard, "sum_", 3, False),
    # In the middle of a checkpoint: this rank's part is written, and rank 0 is never told.
    (1, dcp.FileSystemWriter, "write_data", 2, False),
    # All parts are there, and the file that makes them a checkpoint is not.
    (0, dcp.FileSystemWriter, "finish", 2, True),
    # In a step after that: all agree that gradients are good, and none has moved.
    (1, PreconditionedOptimizer, "move", 4, True),
]


def main(*arguments: str) -> None:
    """Run the example, with what is due in this start."""
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(KILLS):
        rank, *kill = KILLS[start]
        if int(os.environ["RANK"]) == rank:
            kill_at(*kill)
    sys.argv = ["pretraining.py", *arguments]
    runpy.run_path(str(Path("examples") / "pretraining.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
