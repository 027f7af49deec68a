"""The OpenMP runtime that torch has loaded, made visible to the kernels.

The kernels use OpenMP and bring no runtime: two in one process would each keep threads of their
own, which wait actively for the same cores, and neither would know of ``torch.set_num_threads``.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

__all__ = ["expose", "runtimes"]

_RUNTIME = re.compile(r"/lib(gomp|omp|iomp5)\b[^/]*$")


def runtimes() -> list[str]:
    """Return the paths of the OpenMP runtimes that this process has loaded."""
    if sys.platform == "darwin":
        torch = sys.modules.get("torch")
        shipped = Path(str(torch.__file__)).parent / "lib" / "libomp.dylib" if torch else Path()
        return [str(shipped)] if shipped.is_file() else []
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.partition("/")[1] + line.partition("/")[2] for line in maps}
    return sorted(path for path in paths if _RUNTIME.search(path))


def expose() -> None:
    """Let libraries that are loaded from here on find the runtime's functions.

    torch does so by itself when it is imported as usual.
    """
    if hasattr(ctypes.CDLL(None), "omp_get_num_threads"):
        return
    for path in runtimes():
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
