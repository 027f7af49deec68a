"""Which library is loaded: from the package, built here, or none; and for which processor."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neurms.compiled.native import compiler, library
from neurms.compiled.native import load as loading
from neurms.compiled.native.build import build
from neurms.compiled.native.toolchain import FOLDER, NATIVE, compile_library, levels

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

NAMES = [level.name for level in levels()]
FORMS = ["-m", "not slow", "-k", "not eager and not torchscript and not inductor"]


def reached() -> int:
    kernels = library()
    assert kernels is not None
    return int(kernels.neurms_level())


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as it is in a wheel; each level's library knows its name by the file's alone."""
    kernels = library()
    assert kernels is not None
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(kernels._name, folder / f"kernels-{name}.so")
    monkeypatch.setattr(loading, "SHIPPED", folder)
    for variable in (loading.BUILD_VARIABLE, loading.ISA_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurms.compiled.native.toolchain.compiler", lambda: None)


def test_the_package_s_library_for_this_processor_is_taken(
    shipped: Path, no_compiler: None
) -> None:
    found = loading._load()
    assert found is not None
    assert found.origin == f"from the wheel, {NAMES[reached()]}"
    assert Path(found.kernels._name) == shipped / f"kernels-{NAMES[reached()]}.so"
    assert found.kernels.neurms_level.restype is ctypes.c_int


@pytest.mark.parametrize("name", NAMES)
def test_a_level_can_be_asked_for_as_far_as_the_processor_goes(
    shipped: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(loading.ISA_VARIABLE, name)
    if NAMES.index(name) > reached():
        with pytest.raises(ValueError, match=f"'{name}' is more than this processor has"):
            loading._load()
        return
    found = loading._load()
    assert found is not None
    assert Path(found.kernels._name).name == f"kernels-{name}.so"


def test_an_unknown_level_is_refused(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loading.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match=f"'mmx' is unknown; choose one of {NAMES[0]}"):
        loading._load()


def test_building_is_asked_for(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loading.BUILD_VARIABLE, "1")
    found = loading._load()
    assert found is not None
    assert found.origin == "built here, native"


def test_a_damaged_library_is_said_and_built_anew(
    shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in shipped.iterdir():
        path.write_bytes(b"nothing that can be loaded")
    found = loading._load()
    assert found is not None
    assert found.origin == "built here, native"
    assert "the package's own kernels cannot be loaded" in capsys.readouterr().err


def test_none_is_reported_with_its_cure(
    tmp_path: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "absent")
    with pytest.warns(RuntimeWarning, match=r"holds none for this machine.*install g\+\+"):
        assert loading._load() is None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A compiler, and a library of one file, which it makes quickly."""
    monkeypatch.setattr("neurms.compiled.native.toolchain.SOURCES", (FOLDER / "processor.cpp",))
    monkeypatch.setenv("NEURMS_CACHE", str(tmp_path / "cache"))
    return str(compiler())


def test_a_build_is_announced_kept_and_found_again(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = build(small, NATIVE)
    assert list((tmp_path / "cache").iterdir()) == [made]
    assert "once for this machine" in capsys.readouterr().err
    stamp = made.stat().st_mtime_ns
    assert build(small, NATIVE) == made
    assert made.stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""
    assert build(small, ("-O1",)) != made


def test_two_builds_are_alike(small: str, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        compile_library(small, tmp_path / folder / "kernels.so", levels()[0].flags, strip=True)
    one, other = ((tmp_path / folder / "kernels.so").read_bytes() for folder in ("one", "other"))
    assert one == other


@pytest.mark.skipif("avx2" not in NAMES, reason="this machine is no x86-64")
def test_a_library_for_less_promises_no_wide_vectors(small: str, tmp_path: Path) -> None:
    """A user may ask for it on a processor that has them; its own products would refuse."""
    compile_library(small, tmp_path / "kernels.so", levels()[1].flags)
    assert ctypes.CDLL(str(tmp_path / "kernels.so")).neurms_wide_float32() == 0


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-user is not installed")
@pytest.mark.skipif("avx2" not in NAMES, reason="this machine is no x86-64")
@pytest.mark.parametrize(
    ("processor", "level"), [("Nehalem", 0), ("SandyBridge", 0), ("Haswell", 1)]
)
def test_levels_of_other_processors(small: str, tmp_path: Path, processor: str, level: int) -> None:
    compile_library(small, tmp_path / "kernels.so", levels()[0].flags)
    code = f"import ctypes; print(ctypes.CDLL('{tmp_path}/kernels.so').neurms_level())"
    command = ["qemu-x86_64", "-cpu", processor, sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == level


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_every_level_against_float64_truth(name: str, repository: Path) -> None:
    """The kernels' own tests, with the library of one level; other forms do not read it."""
    if NAMES.index(name) > reached():
        pytest.skip(f"this processor goes up to {NAMES[reached()]}")
    tests = sorted(str(path) for path in (repository / "tests" / "compiled").glob("test_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FORMS, *tests],
        capture_output=True,
        text=True,
        cwd=repository,
        env={**os.environ, "NEURMS_BUILD": "1", "NEURMS_ISA": name},
    )
    assert done.returncode == 0, done.stdout[-4000:]
