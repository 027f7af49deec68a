"""Build the native kernels for the machine at hand, and find them again.

The library has no torch headers and no Python in it, so a C++ compiler makes it in seconds. It is
kept in the user's cache under a name that depends on the sources, the compiler and the processor:
another machine that shares the home directory builds its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from neurms.compiled.native import toolchain

__all__ = ["CACHE_VARIABLE", "FLAGS_VARIABLE", "build", "cache_folder", "say"]

CACHE_VARIABLE = "NEURMS_CACHE"
FLAGS_VARIABLE = "NEURMS_CXXFLAGS"
"""Further flags of the compiler, for those who work on the kernels: a sanitizer, ``-g``."""

_logger = logging.getLogger("neurms.compiled")


def build(cxx: str, flags: Sequence[str]) -> Path:
    """Return a library of the kernels, compiled if this machine has not done so before.

    Args:
        cxx: The compiler.
        flags: For the processor: a level's, or :data:`toolchain.NATIVE`.

    Raises:
        subprocess.CalledProcessError: If the compiler refuses.
        OSError: If the cache cannot be written.
    """
    flags = [*flags, *shlex.split(os.environ.get(FLAGS_VARIABLE, ""))]
    target = cache_folder() / f"kernels-{_fingerprint(cxx, flags)}.so"
    if target.is_file():
        return target
    start = time.perf_counter()
    say(
        f"compiling the native kernels with {cxx}, once for this machine; it takes some seconds, "
        "and neurms.warm_up() does it before a training"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    toolchain.compile_library(cxx, target, flags)
    say(f"compiled the native kernels in {time.perf_counter() - start:.1f} s")
    return target


def say(message: str) -> None:
    """Tell why there is a wait: the log where it listens, else the standard error stream."""
    if _logger.isEnabledFor(logging.INFO):
        _logger.info(message)
    else:
        print(f"neurms: {message}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Return where built kernels are kept: ``$NEURMS_CACHE``, else in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "neurms"


def _fingerprint(cxx: str, flags: Sequence[str]) -> str:
    parts = [path.read_text() for path in toolchain.inputs()]
    parts += [toolchain.version(cxx), " ".join(flags), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))
