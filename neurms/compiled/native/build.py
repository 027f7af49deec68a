"""Build the native kernels once per machine, and find them again.

The library has no torch headers and no Python in it, so one call of the C++ compiler makes it in
about two seconds. It is kept in the user's cache under a name that depends on the source, the
compiler and the processor: another machine that shares the home directory builds its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

__all__ = ["CACHE_VARIABLE", "compiler", "library"]

CACHE_VARIABLE = "NEURMS_CACHE"
SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")

_logger = logging.getLogger("neurms.compiled")
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL | None] = {}


def compiler() -> str | None:
    """Return the C++ compiler: ``$CXX``, else g++ or clang++, or None where there is none."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def library() -> ctypes.CDLL | None:
    """Return the native kernels, built if need be, or None where they cannot be.

    A failure is reported once, with the reason; the eager definitions serve then.
    """
    if "kernels" not in _loaded:
        with _lock:
            if "kernels" not in _loaded:
                _loaded["kernels"] = _load()
    return _loaded["kernels"]


def _load() -> ctypes.CDLL | None:
    cxx = compiler()
    if cxx is None:
        _warn("no C++ compiler was found; install g++ or set CXX")
        return None
    target = _folder() / f"kernels-{_fingerprint(cxx)}.so"
    try:
        if not target.is_file():
            _build(cxx, target)
        return _declared(ctypes.CDLL(str(target)))
    except subprocess.CalledProcessError as error:
        _warn(f"{cxx} failed: {error.stderr.strip()[-400:]}")
    except OSError as error:
        _warn(f"{target} cannot be made or loaded: {error}")
    return None


def _build(cxx: str, target: Path) -> None:
    start = time.perf_counter()
    _logger.info("compiling the native kernels, once per machine")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [cxx, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        # Another process may be doing the same: the last rename wins, and both files are alike.
        made.replace(target)
    _logger.info("compiled the native kernels in %.1f s", time.perf_counter() - start)


def _folder() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "neurms"


def _fingerprint(cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [SOURCE.read_text(), version, " ".join(FLAGS), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, real, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    matrix: list[Any] = [pointer, size, size]
    library.neurms_all_finite.argtypes = [pointer, size, number]
    library.neurms_two_sided_fit.argtypes = [*matrix, number, real, pointer, pointer, number]
    fit = library.neurms_two_sided_fit_transposed
    fit.argtypes = [*matrix, number, real, pointer, pointer, number]
    library.neurms_scaled_square_sum.argtypes = [*matrix, pointer, pointer, number]
    library.neurms_scaled_square_sum.restype = ctypes.c_double
    library.neurms_scaled_update.argtypes = [pointer, *matrix, pointer, pointer, real, real, number]
    library.neurms_scaled_update.restype = None
    rows: list[Any] = [pointer, pointer, *matrix, real, number, real, real, real, number]
    library.neurms_row_normalized_update.argtypes = rows
    library.neurms_row_normalized_update.restype = None
    return library


def _warn(reason: str) -> None:
    warnings.warn(
        f"the native CPU kernels are not available, slower ones are used: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
