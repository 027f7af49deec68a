"""How the library's functions are called: ``kernels.h``, read into ctypes' terms."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["HEADER", "Signature", "declare", "signatures"]

HEADER = Path(__file__).parent / "kernels.h"

_TYPES: dict[str, Any] = {
    "void": None,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class Signature(NamedTuple):
    """What a function returns and takes, as ctypes has it; a pointer is an address."""

    result: Any
    parameters: tuple[Any, ...]


def signatures(text: str) -> dict[str, Signature]:
    """Read a header.

    Args:
        text: C declarations inside of one ``extern "C" { ... }``.

    Returns:
        Each function's name and signature.

    Raises:
        ValueError: If something in it is not a declaration of plain types.
    """
    code = "\n".join(line.partition("//")[0] for line in text.splitlines())
    inside = code.partition('extern "C" {')[2].rpartition("}")[0]
    return dict(_signature(" ".join(part.split())) for part in inside.split(";") if part.strip())


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give a library's functions their signatures.

    Raises:
        AttributeError: If it lacks one of them.
    """
    for name, signature in _declared().items():
        function = getattr(library, name)
        function.restype, function.argtypes = signature
    return library


@functools.cache
def _declared() -> dict[str, Signature]:
    return signatures(HEADER.read_text())


def _signature(declaration: str) -> tuple[str, Signature]:
    head, _, rest = declaration.partition("(")
    parameters, _, after = rest.partition(")")
    result, _, name = head.rpartition(" ")
    if after or result not in _TYPES or not name.isidentifier():
        raise ValueError(f"{declaration!r} declares no function; write `TYPE NAME(TYPE x, ...);`")
    return name, Signature(_TYPES[result], tuple(_parameter(p) for p in parameters.split(",") if p))


def _parameter(text: str) -> Any:
    kind, _, name = text.strip().rpartition(" ")
    pointer = "*" in kind
    stem = kind.removeprefix("const ").partition("*")[0].strip()
    if stem not in _TYPES or not name.isidentifier() or (stem == "void" and not pointer):
        raise ValueError(f"parameter {text.strip()!r} must be one of {', '.join(_TYPES)}, or point")
    return ctypes.c_void_p if pointer else _TYPES[stem]
