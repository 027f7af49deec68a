"""The wheel and the sdist, built from the checkout and tried outside of it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import neurms
from tools.check_dist import check


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
    assert "neurms/compiled/native/kernels.cpp" in names


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    assert "run make dist" in check(tmp_path)[0]


def test_one_version(repository: Path) -> None:
    """The package's __version__ is the source; the citation repeats it, hatch reads it."""
    cited = (repository / "CITATION.cff").read_text()
    assert f"\nversion: {neurms.__version__}\n" in cited
    assert 'path = "neurms/__init__.py"' in (repository / "pyproject.toml").read_text()
