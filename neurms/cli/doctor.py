"""``neurms doctor``: what this machine has of what neurms can use."""

from __future__ import annotations

import json as encoder
import platform
import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

import neurms
from neurms.cli.environment import environment, flush_denormals, versions
from neurms.cli.kernel_times import kernel_times
from neurms.compiled.backends import BACKENDS, use_backend
from neurms.compiled.native import bfloat16_engine, compiler, origin
from neurms.compiled.native.build import cache_folder
from neurms.compiled.reductions import column_square_sum

__all__ = ["Finding", "examine", "findings"]

_OPTIONAL = {
    "lightning": "lightning",
    "keras": "keras",
    "transformers": "transformers",
    "rich": "report",
    "tyro": "report",
    "psutil": "report",
    "torchmetrics": "report",
    "scikit-learn": "demo",
    "optuna": "bench",
}
"""Distribution -> the extra that brings it."""


class Finding(NamedTuple):
    """One line of the report; only what neurms cannot do without is ``"missing"``."""

    verdict: Literal["ok", "note", "missing"]
    subject: str
    detail: str


def examine(*, kernels: bool = False, json: bool = False) -> int:
    """Print the findings; return 1 if something needed is missing, else 0.

    Args:
        kernels: Also time what each kernel gets from each backend, in a few seconds.
        json: Print one JSON object instead of text.
    """
    found = list(findings())
    times = kernel_times() if kernels else []
    missing = [finding.subject for finding in found if finding.verdict == "missing"]
    if json:
        record = {"findings": [f._asdict() for f in found], "kernels": [t._asdict() for t in times]}
        print(encoder.dumps(record, indent=1))
        return 1 if missing else 0
    width = max(len(finding.subject) for finding in found)
    for verdict, subject, detail in found:
        print(f"{verdict:<7}  {subject:<{width}}  {detail}")
    if times:
        print("\nmicroseconds a call, and against eager")
    for row in times:
        print(
            f"{row.kernel:<24}{row.size:>5}  {row.backend:<12}{row.microseconds:>10.1f}"
            f"  x{row.ratio:.2f}"
        )
    print(f"\nMissing: {', '.join(missing)}" if missing else "\nNothing is missing.")
    return 1 if missing else 0


def findings() -> Iterator[Finding]:
    """Yield what was found: versions, extras, threads, compiler, backends, denormals."""
    yield from _versions()
    record = environment(denormals_flushed=False)
    yield Finding("ok", "processor", f"{record['machine']}, {record['cores']} cores")
    threads = "all of them by default; OMP_NUM_THREADS sets fewer"
    yield Finding("ok", "threads", f"torch uses {torch.get_num_threads()} ({threads})")
    path = compiler()
    yield Finding(
        "ok" if path else "note",
        "C++ compiler",
        path or 'none found: backend="inductor" runs eager; install g++ or set CXX',
    )
    found = origin()
    detail = found or 'none: backend="auto" runs eager'
    yield Finding("ok" if found else "note", "native kernels", detail)
    yield _bfloat16()
    yield Finding("ok", "kernel cache", str(cache_folder()))
    onednn = torch.backends.mkldnn.is_available()
    yield Finding("ok" if onednn else "note", "oneDNN", "available" if onednn else "not built in")
    yield from _backends(path)
    yield _denormals()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    yield Finding("ok", "accelerator", str(kind or "none; neurms runs on the CPU"))


def _versions() -> Iterator[Finding]:
    new_enough = sys.version_info >= (3, 11)
    detail = platform.python_version() + ("" if new_enough else ": 3.11 or newer is needed")
    yield Finding("ok" if new_enough else "missing", "python", detail)
    yield Finding("ok", "neurms", neurms.__version__)
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    enough = (major, minor) >= (2, 9)
    detail = torch.__version__ + (
        "" if enough else ": 2.9 or newer is needed; pip install -U torch"
    )
    yield Finding("ok" if enough else "missing", "torch", detail)
    for name, found in versions(tuple(_OPTIONAL)).items():
        absent = f'not installed (optional): pip install "neurms[{_OPTIONAL[name]}]"'
        yield Finding("ok" if found else "note", name, found or absent)


def _backends(path: str | None) -> Iterator[Finding]:
    sample = torch.ones(4, 3)
    for name in BACKENDS:
        if name == "inductor":
            # Compiling takes many seconds; whether it can is known from the compiler.
            detail = (
                "compiles at first use, then cached" if path else "no compiler: would run eager"
            )
            yield Finding("ok" if path else "note", f"backend {name}", detail)
            continue
        with use_backend(name):
            right = torch.equal(column_square_sum(sample), torch.full((3,), 4.0))
        yield Finding(
            "ok" if right else "missing", f"backend {name}", "works" if right else "is wrong"
        )


def _bfloat16() -> Finding:
    engine = ("", "AVX512-BF16", "AMX")[bfloat16_engine()]
    return Finding(
        "ok" if engine else "note",
        "bfloat16 products",
        f'{engine}: gemm="bfloat16" saves time with update="backward"'
        if engine
        else 'nothing that gains: gemm="bfloat16" rounds and then multiplies in float32',
    )


def _denormals() -> Finding:
    flushed = flush_denormals()
    torch.set_flush_denormal(False)
    detail = (
        "can be flushed: torch.set_flush_denormal(True) spares moments near zero a slow path"
        if flushed
        else "this processor cannot flush them; moments near zero may be slow"
    )
    return Finding("ok" if flushed else "note", "denormals", detail)
