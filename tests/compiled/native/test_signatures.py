"""The table of signatures is kernels.h, and the library is held to it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

from neurms.compiled.native import compiler, library
from neurms.compiled.native.signatures import HEADER, Signature, signatures
from neurms.compiled.native.toolchain import FOLDER

POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


def test_what_is_read_of_a_declaration() -> None:
    read = signatures(
        """
        #pragma once  // neurms_none(int x);
        extern "C" {
        // A comment; with a semicolon.
        int64_t neurms_a(const float* x, float* const* y,
                         int64_t n, double d, float f);
        void neurms_b();
        }  // extern "C"
        """
    )
    assert read == {
        "neurms_a": Signature(LONG, (POINTER, POINTER, LONG, ctypes.c_double, ctypes.c_float)),
        "neurms_b": Signature(None, ()),
    }


@pytest.mark.parametrize(
    "declaration",
    ["size_t f(int n);", "int f(unsigned n);", "int f(int);", "int f(void x);", "int f(int n) {}"],
)
def test_what_is_not_plain_is_refused(declaration: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of|declares no function"):
        signatures(f'extern "C" {{\n{declaration}\n}}')


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
def test_an_entry_that_differs_from_the_header_does_not_compile() -> None:
    """Read by the compiler: the header, and then definitions that do and do not agree with it."""
    cxx = str(compiler())
    for definition, ends in (
        ("int neurms_level() { return 0; }", 0),
        ("int64_t neurms_level() { return 0; }", 1),
        ("int neurms_level(int asked) { return asked; }", 1),
        ("int neurms_undeclared() { return 0; }", 1),
    ):
        done = subprocess.run(
            [cxx, "-x", "c++", "-fsyntax-only", "-Werror=missing-declarations", f"-I{FOLDER}", "-"],
            input=f'#include "kernels.h"\nextern "C" {{ {definition} }}\n',
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == ends, (definition, done.stderr)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
def test_every_entry_is_in_the_library_with_its_signature() -> None:
    kernels = library()
    assert kernels is not None
    for name, (result, parameters) in signatures(HEADER.read_text()).items():
        entry = getattr(kernels, name)
        assert (entry.restype, tuple(entry.argtypes)) == (result, parameters)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
def test_nothing_else_is_exported() -> None:
    """Code of templates, were it visible, could take the place of torch's."""
    kernels = library()
    assert kernels is not None
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", kernels._name], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert exported == set(signatures(HEADER.read_text()))
