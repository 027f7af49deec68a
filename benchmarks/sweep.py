"""Independent studies one after the other, or over several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

__all__ = ["sweep"]

Study = TypeVar("Study")


def sweep(studies: Sequence[Study], work: Callable[[Study], None], workers: int = 1) -> None:
    """Do all studies.

    Args:
        studies: What ``work`` is called with; it keeps its own results (see
            :class:`~benchmarks.harness.Results`, which several processes may share).
        work: A function of a module, so that processes can import it.
        workers: Processes; each is given its share of this process's threads.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    if workers == 1:
        for study in studies:
            work(study)
        return
    threads = max(1, torch.get_num_threads() // workers)
    # Spawned, for a fork would copy torch's thread pool in whatever state it is.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        for future in [pool.submit(work, study) for study in studies]:
            future.result()
