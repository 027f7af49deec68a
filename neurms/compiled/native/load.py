"""The native kernels of this process: from the wheel, else built here, else none.

A wheel for a platform holds one library for each level of its processors (``toolchain.py``). The
library of the lowest level says which the processor reaches, and that one is loaded. Where no
wheel's library is, as in a checkout, the kernels are compiled for the processor at hand.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

from neurms.compiled.native import openmp, toolchain
from neurms.compiled.native.build import build, say
from neurms.compiled.native.signatures import declare

__all__ = ["BUILD_VARIABLE", "ISA_VARIABLE", "in_use", "library", "origin", "warm_up"]

BUILD_VARIABLE = "NEURMS_BUILD"
ISA_VARIABLE = "NEURMS_ISA"
SHIPPED = Path(__file__).parent / "shipped"


class _Loaded(NamedTuple):
    kernels: ctypes.CDLL
    origin: str


_lock = threading.Lock()
_loaded: dict[str, _Loaded | None] = {}


def library() -> ctypes.CDLL | None:
    """Return the native kernels, or None where there are none.

    A failure is reported once, with the reason; the eager definitions serve then.

    Raises:
        ValueError: If ``NEURMS_ISA`` names no level of this machine, or one that it does not reach.
    """
    # Asked by every kernel: one call where it is known.
    found = _loaded["kernels"] if "kernels" in _loaded else _found()
    return None if found is None else found.kernels


def origin() -> str | None:
    """Return where the kernels come from and for which processors they are made, or None."""
    found = _found()
    return None if found is None else found.origin


def in_use() -> str | None:
    """Return :func:`origin` if this process has asked for the kernels before, and load nothing."""
    found = _loaded.get("kernels")
    return None if found is None else found.origin


def warm_up() -> bool:
    """Load or build the native kernels now, not in the first step that has a use for them.

    Returns:
        Whether ``backend="auto"`` has them from here on; False where the package holds no library
        for this machine and no C++ compiler makes one, which is reported once.

    Example:
        >>> from neurms.compiled import warm_up
        >>> isinstance(warm_up(), bool)
        True
    """
    return library() is not None


def _found() -> _Loaded | None:
    if "kernels" not in _loaded:
        with _lock:
            if "kernels" not in _loaded:
                _loaded["kernels"] = _load()
    return _loaded["kernels"]


def _load() -> _Loaded | None:
    asked = _asked()
    openmp.expose()
    if SHIPPED.is_dir() and os.environ.get(BUILD_VARIABLE) != "1":
        try:
            return _from_wheel(asked)
        except OSError as error:
            say(f"the package's own kernels cannot be loaded: {error}")
    cxx = toolchain.compiler()
    if cxx is None:
        _warn(
            "the package holds none for this machine, and no C++ compiler was found; install g++ "
            "or set CXX"
        )
        return None
    return _built(cxx, asked)


def _asked() -> str | None:
    """Return the level that the environment asks for."""
    name = os.environ.get(ISA_VARIABLE) or None
    names = [level.name for level in toolchain.levels()]
    if name and name not in names:
        choices = ", ".join(names) or "none on this machine"
        raise ValueError(
            f"{ISA_VARIABLE}={name!r} is unknown; choose one of {choices}, or unset it"
        )
    return name


def _from_wheel(asked: str | None) -> _Loaded:
    names = [level.name for level in toolchain.levels()]
    lowest = declare(ctypes.CDLL(str(SHIPPED / f"kernels-{names[0]}.so")))
    name = _reached(asked, lowest)
    path = SHIPPED / f"kernels-{name}.so"
    kernels = lowest if name == names[0] else declare(ctypes.CDLL(str(path)))
    return _Loaded(kernels, f"from the wheel, {name}")


def _built(cxx: str, asked: str | None) -> _Loaded | None:
    flags = next((level.flags for level in toolchain.levels() if level.name == asked), None)
    path: Path | None = None
    try:
        path = build(cxx, flags or toolchain.NATIVE)
        kernels = declare(ctypes.CDLL(str(path)))
    except subprocess.CalledProcessError as error:
        _warn(f"{cxx} failed: {error.stderr.strip()[-400:]}")
        return None
    except OSError as error:
        _warn(f"{path or 'a library'} cannot be made or loaded: {error}")
        return None
    return _Loaded(kernels, f"built here, {_reached(asked, kernels) if asked else 'native'}")


def _reached(asked: str | None, kernels: ctypes.CDLL) -> str:
    """Return the level asked for, else the highest one of this processor."""
    names = [level.name for level in toolchain.levels()]
    highest = int(kernels.neurms_level())
    if asked is None:
        return names[highest]
    if names.index(asked) > highest:
        raise ValueError(
            f"{ISA_VARIABLE}={asked!r} is more than this processor has; choose one of "
            f"{', '.join(names[: highest + 1])}, or unset it"
        )
    return asked


def _warn(reason: str) -> None:
    warnings.warn(
        f"the native CPU kernels are not available, slower ones are used: {reason}",
        RuntimeWarning,
        stacklevel=6,
    )
