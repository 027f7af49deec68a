"""Processes that stay, so that many small distributed tests pay for one start.

Each job runs in a process group of its own, of as many ranks as it asks for.
"""

from __future__ import annotations

import importlib
import io
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

PATIENCE = 240.0
AFTER_A_FAILURE = 10.0
"""Ranks that wait for one that has failed would wait for gloo's timeout."""
_GLOO = timedelta(seconds=120)


@contextmanager
def group_of(folder: str, rank: int, ranks: int) -> Iterator[None]:
    """A gloo group of ``ranks`` processes that meet in ``folder``."""
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_GLOO)
    try:
        yield
        _wait_for_all(store, ranks)
    finally:
        dist.destroy_process_group()


def _wait_for_all(store: dist.Store, ranks: int) -> None:
    """Have no rank leave before all are done: one that still connects would lose its peer.

    Not by a collective, for it is collectives that a leaving peer breaks off.
    """
    until = time.monotonic() + AFTER_A_FAILURE
    done = store.add("done", 1)
    while done < ranks and time.monotonic() < until:
        time.sleep(0.001)
        done = store.add("done", 0)


def _serve(rank: int, jobs: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        folder, ranks, module, name, settings = job
        try:
            function = getattr(importlib.import_module(module), name)
            with group_of(folder, rank, ranks):
                found = function(rank, ranks, **settings)
            buffer = io.BytesIO()
            torch.save(found, buffer)
            answers.put((True, buffer.getvalue()))
        except BaseException:
            answers.put((False, traceback.format_exc()))


def _gathered(queues: list[Any]) -> list[Any]:
    """Return the ranks' answers in order; only those that came soon, once one has failed."""
    found: dict[int, Any] = {}
    until = time.monotonic() + PATIENCE
    while len(found) < len(queues):
        for rank, answers in enumerate(queues):
            if rank in found or answers.empty():
                continue
            found[rank] = answers.get()
            if not found[rank][0]:
                until = min(until, time.monotonic() + AFTER_A_FAILURE)
        if time.monotonic() > until:
            break
        time.sleep(0.002)
    if len(found) < len(queues) and all(good for good, _ in found.values()):
        raise TimeoutError(f"ranks {sorted(found)} of {len(queues)} answered in {PATIENCE:.0f} s")
    return [found[rank] for rank in sorted(found)]


class Ranks:
    """Up to four processes; started when first needed, stopped by :meth:`close`."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Any, Any]] = []

    def run(self, ranks: int, function: Any, **settings: Any) -> list[Any]:
        """Return what ``function(rank, ranks, **settings)`` returns on each rank."""
        while len(self._workers) < ranks:
            jobs, answers = self._context.Queue(), self._context.Queue()
            arguments = (len(self._workers), jobs, answers)
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._workers.append((process, jobs, answers))
        own = self._workers[:ranks]
        with tempfile.TemporaryDirectory() as folder:
            for _, jobs, _ in own:
                jobs.put((folder, ranks, function.__module__, function.__qualname__, settings))
            try:
                found = _gathered([answers for _, _, answers in own])
            except BaseException:
                self.close()
                raise
            if len(found) < ranks:
                self.close()
        failures = [text for good, text in found if not good]
        assert not failures, "\n".join(failures)
        return [torch.load(io.BytesIO(data), weights_only=False) for _, data in found]

    def close(self) -> None:
        """End the processes."""
        for process, _, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()
