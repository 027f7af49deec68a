"""One OpenMP runtime in the process, torch's, whatever is done with it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from neurms.compiled.native import compiler
from neurms.compiled.native.toolchain import FOLDER

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps"),
]


def run(code: str, repository: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(repository), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


RUNTIMES = """
    import torch, neurms
    from neurms.compiled.finite import within
    from neurms.compiled.native.openmp import runtimes
    before = runtimes()
    torch.set_num_threads(2)
    assert neurms.warm_up() and within([torch.zeros(1 << 18)], [1.0])
    assert before and runtimes() == before, (before, runtimes())
    print(len(before))
"""


def test_the_kernels_bring_no_runtime(repository: Path) -> None:
    assert run(RUNTIMES, repository) == "1"


def test_a_hidden_runtime_is_made_visible() -> None:
    """As torch's would be, were it loaded with its symbols for itself alone."""
    code = f"""
        import ctypes, runpy
        module = runpy.run_path({str(FOLDER / "openmp.py")!r})
        before = hasattr(ctypes.CDLL(None), "omp_get_num_threads")
        ctypes.CDLL("libgomp.so.1")
        hidden = hasattr(ctypes.CDLL(None), "omp_get_num_threads")
        module["expose"]()
        print(before, hidden, hasattr(ctypes.CDLL(None), "omp_get_num_threads"))
    """
    try:
        found = run(code, Path())
    except AssertionError as error:
        if "libgomp.so.1" in str(error):
            pytest.skip("the system has no libgomp")
        raise
    assert found == "False False True"


KERNEL = "within([torch.zeros(1 << 22)], [1.0])"
COUNT = """
    import os, torch, neurms
    from neurms.compiled.finite import within
    from neurms.compiled.native import threads
    {change}
    {kernel}
    workers = len(os.listdir("/proc/self/task"))
    print(threads(), torch.get_num_threads(), workers)
"""


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_are_torch_s_and_no_more(repository: Path, count: int) -> None:
    """By the environment or by the call, kernels and torch share one team of workers."""
    by_environment = run(
        COUNT.format(change="", kernel=KERNEL), repository, OMP_NUM_THREADS=str(count)
    )
    by_call = run(COUNT.format(change=f"torch.set_num_threads({count})", kernel=KERNEL), repository)
    assert by_call.split()[:2] == [str(count)] * 2
    taken, allowed, workers = by_environment.split()
    assert taken == allowed  # no more than there are cores
    alone = """
        import os, torch
        torch.zeros(1 << 22).add_(1)
        print(len(os.listdir("/proc/self/task")))
    """
    torch_alone = run(alone, repository, OMP_NUM_THREADS=str(count))
    assert workers == torch_alone


FOREIGN = {
    "LLVM": [
        *Path("/usr/lib").glob("*/libomp.so.5"),
        *Path("/usr/lib").glob("llvm-*/lib/libomp.so"),
    ],
    "Intel": [Path(sys.prefix, "lib", "libiomp5.so")],
}
"""Runtimes that somebody may put before torch's, and where packages of Debian and PyPI lay them."""


def preloaded(maker: str) -> dict[str, str]:
    path = next((path for path in FOREIGN[maker] if path.is_file()), None)
    if path is None:
        pytest.skip(f"{maker}'s OpenMP runtime is not installed")
    return {"LD_PRELOAD": str(path)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("maker", FOREIGN)
def test_a_runtime_put_before_torch_s_serves_both(repository: Path, maker: str, count: int) -> None:
    foreign = preloaded(maker)
    # torch's own is loaded, too, by torch; it starts no thread, and the kernels add none.
    assert run(RUNTIMES, repository, **foreign) == "2"
    change = f"torch.set_num_threads({count})"
    taken, allowed, workers = run(
        COUNT.format(change=change, kernel=KERNEL), repository, **foreign
    ).split()
    assert taken == allowed == str(count)
    alone = COUNT.format(change=change, kernel="torch.zeros(1 << 22).add_(1)")
    assert workers == run(alone, repository, **foreign).split()[2]


TRAINING = """
    import torch, neurms
    from torch.utils.data import DataLoader, TensorDataset
    torch.set_num_threads({count})
    class Scaled(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x * torch.ones(1 << 16).sum() / (1 << 16), y
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    optimizer = neurms.{optimizer}
    data = Scaled(torch.randn(64, 256), torch.randint(8, (64,)))
    for epoch in range(2):
        for x, y in DataLoader(data, 16, num_workers=2, multiprocessing_context="{method}"):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    print("trained")
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "optimizer",
    ["RACS(model.parameters())", "NeuRMS(model)", 'NeuRMS(model, update="backward")'],
)
def test_loaders_workers_and_kernels_share_the_machine(
    repository: Path, count: int, optimizer: str
) -> None:
    """Forked workers are made after the kernels have used OpenMP's threads."""
    code = TRAINING.format(count=count, optimizer=optimizer, method="fork")
    assert run(code, repository) == "trained"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("maker", FOREIGN)
def test_loaders_workers_under_a_runtime_put_before_torch_s(
    repository: Path, maker: str, count: int
) -> None:
    code = TRAINING.format(count=count, optimizer="NeuRMS(model)", method="fork")
    assert run(code, repository, **preloaded(maker)) == "trained"
