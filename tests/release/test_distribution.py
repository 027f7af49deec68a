"""The wheel and the sdist, built from the checkout and tried outside of it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import neurms
from neurms.compiled.native import compiler
from tools.check_again import differences
from tools.check_dist import check
from tools.check_native import libraries, native_problems


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=repository,
        check=True,
        capture_output=True,
        timeout=300,
    )
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_built_works_with_torch_alone(built: Path) -> None:
    assert check(built) == []


@pytest.mark.slow
def test_nothing_but_the_package_is_in_the_wheel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "neurms",
        f"neurms-{neurms.__version__}.dist-info",
    }
    assert "neurms/py.typed" in names
    assert "neurms/compiled/native/kernels.h" in names


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.skipif(sys.platform != "linux", reason="looks into ELF files")
def test_a_wheel_for_a_platform(repository: Path, tmp_path: Path) -> None:
    """One for all Pythons, with one library for each level and the list of what is inside."""
    pytest.importorskip("hatchling")
    pytest.importorskip("auditwheel")
    for folder in ("one", "other"):
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / folder],
            cwd=repository,
            env={**os.environ, "NEURMS_WHEEL": "native"},
            check=True,
            capture_output=True,
            timeout=900,
        )
    (wheel,) = (tmp_path / "one").iterdir()
    assert wheel.name.startswith(f"neurms-{neurms.__version__}-py3-none-manylinux_2_28_")
    assert native_problems(wheel) == []
    assert wheel.read_bytes() == (tmp_path / "other" / wheel.name).read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        (listed,) = (name for name in archive.namelist() if "/sboms/" in name)
        components = json.loads(archive.read(listed))["components"]
    found = {
        name: hashlib.sha256(content).hexdigest() for name, content in libraries(wheel).items()
    }
    assert {c["name"]: c["hashes"][0]["content"] for c in components} == found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sdist_makes_the_same_files_elsewhere(built: Path, tmp_path: Path) -> None:
    assert differences(built) == []
    for path in built.iterdir():
        shutil.copy(path, tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"other")
    assert differences(tmp_path) == [f"{wheel.name} comes out otherwise"]


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    assert "run make dist" in check(tmp_path)[0]
    assert "run make dist" in differences(tmp_path)[0]


def test_one_version(repository: Path) -> None:
    """The package's __version__ is the source; hatch reads it, citation and changelog repeat it."""
    cited = (repository / "CITATION.cff").read_text()
    assert f"\nversion: {neurms.__version__}\n" in cited
    (date,) = re.findall(r"\ndate-released: (\S+)\n", cited)
    changes = (repository / "CHANGELOG.md").read_text()
    assert f"\n## [{neurms.__version__}] - {date}\n" in changes
    assert 'path = "neurms/version.py"' in (repository / "pyproject.toml").read_text()
