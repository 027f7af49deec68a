"""The package as its users meet it first: light to import, one version, every promised name."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import neurms

FRAMEWORKS = {
    "keras",
    "lightning",
    "matplotlib",
    "pandas",
    "pytorch_lightning",
    "rich",
    "torchmetrics",
    "transformers",
}


def run_python(source: str) -> str:
    completed = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=100
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def loaded_by(source: str) -> set[str]:
    """Top-level packages in a fresh interpreter's sys.modules after ``source``."""
    report = (
        "import json, sys\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    return set(json.loads(run_python(f"{source}\n{report}")))


def test_import_loads_torch_and_no_framework() -> None:
    loaded = loaded_by("import neurms")
    assert "torch" in loaded
    assert not FRAMEWORKS & loaded


def test_using_every_public_name_loads_no_framework() -> None:
    loaded = loaded_by("import neurms\nfor name in neurms.__all__: getattr(neurms, name)")
    assert not FRAMEWORKS & loaded


def test_version_matches_the_metadata() -> None:
    assert version("neurms") == neurms.__version__


@pytest.mark.parametrize("name", neurms.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(neurms, name) is not None
    assert name in dir(neurms)


def test_public_names_are_declared_for_type_checkers() -> None:
    """The lazy table and the TYPE_CHECKING blocks are lists of the same names."""
    declared = run_python(
        "import ast, pathlib, neurms, neurms.core.catalog\n"
        "homes = neurms.__file__, neurms.core.catalog.__file__\n"
        "trees = [ast.parse(pathlib.Path(home).read_text()) for home in homes]\n"
        "nodes = [n for tree in trees for node in tree.body if isinstance(node, ast.If)"
        " for n in node.body if isinstance(n, ast.ImportFrom)]\n"
        "print(*(f'{n.module}:{a.asname}' for n in nodes for a in n.names if a.name != '*'))"
    ).split()
    modules = [home.replace(f".{name}", f":{name}") for name, home in neurms._MODULES.items()]
    names = [f"{home}:{name}" for name, home in neurms._EXPORTS.items()]
    assert sorted(declared) == sorted(modules + names)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchOptimizer'"):
        neurms.NoSuchOptimizer  # noqa: B018
