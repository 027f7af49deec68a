"""Build the native kernels once per machine, and find them again.

The library has no torch headers and no Python in it, so one call of the C++ compiler makes it in
about two seconds. It is kept in the user's cache under a name that depends on the sources, the
compiler and the processor: another machine that shares the home directory builds its own.

Every ``.cpp`` file of this folder is part of it. How a function is called is read from its
definition, so that Python and C++ cannot disagree: each begins a line ``TYPE neurms_NAME(``.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

__all__ = ["CACHE_VARIABLE", "cache_folder", "compiler", "library", "warm_up"]

CACHE_VARIABLE = "NEURMS_CACHE"
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
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


def warm_up() -> bool:
    """Build or load the native kernels now, not in the first step that has a use for them.

    Returns:
        Whether ``backend="auto"`` has them from here on; False without a C++ compiler, which is
        reported once.

    Example:
        >>> from neurms.compiled import warm_up
        >>> isinstance(warm_up(), bool)
        True
    """
    return library() is not None


def _load() -> ctypes.CDLL | None:
    cxx = compiler()
    if cxx is None:
        _warn("no C++ compiler was found; install g++ or set CXX")
        return None
    target = cache_folder() / f"kernels-{_fingerprint(cxx)}.so"
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
    _say(f"compiling {len(SOURCES)} files of native kernels, once per machine")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [cxx, *FLAGS, *map(str, SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        # Another process may be doing the same: the last rename wins, and both files are alike.
        made.replace(target)
    _say(f"compiled the native kernels in {time.perf_counter() - start:.1f} s")


def _say(message: str) -> None:
    """Tell why there is a wait: the log where it listens, else the terminal if there is one."""
    if _logger.isEnabledFor(logging.INFO):
        _logger.info(message)
    elif sys.stderr.isatty():
        print(f"neurms: {message}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Return where built kernels are kept: ``$NEURMS_CACHE``, else in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "neurms"


def _fingerprint(cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [source.read_text() for source in (*SOURCES, *HEADERS)]
    parts = [*sources, version, " ".join(FLAGS), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))


_C_TYPES: dict[str, Any] = {
    "void": None,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_DEFINITION = re.compile(r"^(\w+) (neurms_\w+)\(([^)]*)\)", re.MULTILINE)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for source in SOURCES:
        for result, name, parameters in _DEFINITION.findall(source.read_text()):
            function = getattr(library, name)
            function.restype = _C_TYPES[result]
            function.argtypes = [_c_type(p) for p in parameters.split(",") if p.strip()]
    return library


def _c_type(parameter: str) -> Any:
    """Return the ctypes type of one C parameter, such as ``const float* g``."""
    return ctypes.c_void_p if "*" in parameter else _C_TYPES[parameter.split()[-2]]


def _warn(reason: str) -> None:
    warnings.warn(
        f"the native CPU kernels are not available, slower ones are used: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
