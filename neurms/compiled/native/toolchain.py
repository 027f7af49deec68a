"""How the native kernels are compiled, for a wheel as for the machine at hand.

Nothing of the package is imported here, for a wheel is built where torch is not installed.

Every ``.cpp`` file of this folder is part of the library. OpenMP is used and not linked: the
library takes the runtime that torch has loaded (``openmp.py``), and never brings a second one.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "LEVELS",
    "NATIVE",
    "Level",
    "compile_library",
    "compiler",
    "inputs",
    "levels",
    "version",
]

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("*.cpp")))
EXPORTS = FOLDER / "exports.map"

NATIVE = ("-march=native",)
"""Flags for the processor that compiles."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    # Nobody catches floating-point exceptions; choices of numbers are vectorised then, on AVX2 too.
    "-fno-trapping-math",
    "-fvisibility=hidden",
    # An entry that kernels.h does not declare would be called with guessed arguments.
    "-Werror=missing-declarations",
    "-Wno-psabi",  # about vectors passed between functions that are all inlined
)


class Level(NamedTuple):
    """A processor's abilities, and the compiler's flags for them."""

    name: str
    flags: tuple[str, ...]


# What g++ prefers by itself on Intel's processors with AVX-512, and so in a build for one of them.
_WIDTH = "-mprefer-vector-width=256"

LEVELS = {
    "x86_64": (
        Level("baseline", ("-march=x86-64-v2",)),
        Level("avx2", ("-march=x86-64-v3",)),
        Level("avx512", ("-march=x86-64-v4", _WIDTH)),
        Level(
            "avx512_bf16",  # and AMX, where the system lends its tiles: update_gemm.cpp asks
            ("-march=x86-64-v4", _WIDTH, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        ),
    ),
    "aarch64": (Level("baseline", ("-march=armv8-a",)),),
    "arm64": (Level("baseline", ()),),
}
"""Machine -> its levels, each including those before it; ``processor.cpp`` counts in this order."""


def levels(machine: str | None = None) -> tuple[Level, ...]:
    """Return a machine's levels, this one's by default; none where no wheel is made for it."""
    return LEVELS.get(machine or platform.machine(), ())


def compiler() -> str | None:
    """Return the C++ compiler: ``$CXX``, else g++ or clang++, or None where there is none."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def version(cxx: str) -> str:
    """Return what a compiler says of itself."""
    return subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout


def inputs() -> list[Path]:
    """Return the files that a library is made of."""
    return sorted([*SOURCES, *FOLDER.glob("*.h"), EXPORTS, Path(__file__)])


def compile_library(cxx: str, target: Path, flags: Sequence[str], strip: bool = False) -> None:
    """Compile every source and link them into one library; several files at a time.

    Args:
        cxx: The compiler.
        target: The library's path, in a folder that exists; appears when it is complete.
        flags: Further flags, such as a level's.
        strip: Leave out the names of what is not exported.

    Raises:
        subprocess.CalledProcessError: If the compiler refuses; ``stderr`` holds what it said.
        OSError: If it cannot be run or the folder cannot be written.
    """
    compiling, linking = _openmp(cxx)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder, source.stem + ".o") for source in SOURCES]

        def compile_one(source: Path, made: Path) -> None:
            _run([cxx, *FLAGS, *compiling, *flags, "-c", str(source), "-o", str(made)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, SOURCES, objects))
        made = Path(folder, target.name)
        names = [str(path) for path in objects]
        _run(
            [cxx, *_LINKING, *linking, *flags, *(["-s"] if strip else []), *names, "-o", str(made)]
        )
        # Another process may be doing the same: the last rename wins, and both files are alike.
        made.replace(target)


if sys.platform == "darwin":
    _LINKING: tuple[str, ...] = ("-dynamiclib", "-Wl,-undefined,dynamic_lookup")
else:
    _LINKING = ("-shared", f"-Wl,--version-script={EXPORTS}", "-Wl,-z,noexecstack,-z,relro,-z,now")


def _openmp(cxx: str) -> tuple[list[str], list[str]]:
    """Return the flags for OpenMP, of compiling and of linking."""
    if sys.platform == "darwin":
        return ["-Xpreprocessor", "-fopenmp"], []
    # clang's code calls LLVM's runtime, which torch's GNU one cannot stand in for.
    return ["-fopenmp"], ["-fopenmp"] if "clang" in version(cxx) else []


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
