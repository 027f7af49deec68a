"""What multiplies D and H, on a processor that cannot: its instructions, in plain C++.

Which code the compiler makes for such a processor is not tested by it; that needs the processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurms.compiled.native import compiler
from neurms.compiled.native.toolchain import FLAGS, FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine"),
]

ABILITIES = ("-D__AVX512BF16__", "-D__AVX512BW__", "-D__AMX_BF16__")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# Without torch, so that there is one OpenMP runtime, and the sanitizers see what is ours.
PRODUCTS = """
import ctypes, itertools, sys
import numpy as np

kernels = ctypes.CDLL(sys.argv[1])
made = np.random.default_rng(0)
f, i64, whole, p = ctypes.c_float, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
kinds = [p, i64, i64, i64, whole, f, f, f, whole, whole, whole]
kernels.neurms_update_gemm.argtypes = kinds


def rounded(x):
    # To the nearest number of 8 bits, a tie to the even one.
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def at(x):
    return None if x is None else x.ctypes.data


shapes = [(300, 200, 129), (16, 16, 32), (33, 47, 31), (5, 3, 1), (10, 1024, 128), (128, 65, 1000)]
count = 0
for engine, shape, stored, scaled, moving in itertools.product(
    (1, 2, 3), shapes, (False, True), (False, True), (None, 0, 1)
):
    if engine == 3 and stored:
        continue
    m, n, rows = shape
    w, d, h = (made.standard_normal(s, np.float32) for s in ((m, n), (rows, m), (rows, n)))
    s, c = (made.random(k, np.float32) + 0.1 for k in (m, n)) if scaled else (None, None)
    v = None if moving is None else made.standard_normal((m, n), np.float32)
    low = [(rounded(x).astype(np.uint32) << 16).view(np.float32) for x in (d, h)]
    exact = [x.astype(float) for x in ((d, h) if engine == 3 else low)]
    left, right = (1.0, 1.0) if s is None else (s.astype(float)[:, None], c.astype(float))
    change = left * (exact[0].T @ exact[1]) * right
    if v is not None:
        change = 0.8 * v.astype(float) + change
    velocity = change
    truth = 0.9 * w.astype(float) - 0.05 * (left * change * right if moving else change)
    signals = [rounded(x) for x in (d, h)] if stored else [d, h]
    tensors = (p * 6)(*map(at, (w, v, *signals, s, c)))
    done = kernels.neurms_update_gemm(
        tensors, m, n, rows, int(stored), 0.05, 0.9, 0.8, int(bool(moving)), engine, 2,
    )
    assert done == 1, (engine, shape)
    for found, wanted in ((w, truth), (v, velocity)):
        if found is not None:
            error = np.abs(found - wanted).max() / np.abs(wanted).max()
            assert error < 2e-6, (engine, shape, stored, scaled, moving, error)
            count += 1
print(count)
"""


def run(tmp_path: Path, flags: tuple[str, ...], **environment: str) -> str:
    cxx, made = compiler(), tmp_path / "emulated.so"
    assert cxx is not None
    headers = ["-I", str(Path(__file__).parent / "emulated")]
    command = [cxx, *FLAGS, "-O1", *flags, *ABILITIES, *headers, "-fopenmp", "-shared"]
    source = FOLDER / "update_gemm.cpp"
    subprocess.run([*command, str(source), "-o", str(made)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS, str(made)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_engine_multiplies_what_it_is_given(tmp_path: Path) -> None:
    # Two engines of bfloat16, of numbers that are rounded before or not; one of float32.
    assert int(run(tmp_path, ())) == (2 * 2 + 1) * 6 * 2 * (1 + 2 + 2)


def test_neither_touches_what_is_not_its_own(tmp_path: Path) -> None:
    cxx = compiler()
    found = subprocess.run(
        [str(cxx), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("no address sanitizer beside this compiler")
    checked = {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}
    assert int(run(tmp_path, SANITIZERS, **checked)) > 0
