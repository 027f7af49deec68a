"""What holds the house together and no linter looks at: private names, imports by string, tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import neurms
from neurms.core.catalog import HOMES
from neurms.core.optimizers.registry import optimizer_class

PACKAGE = Path(neurms.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

FOREIGN = {
    "torch": {
        "_C",
        "_ConvNd",
        "_are_functorch_transforms_active",
        "_autograd",
        "_base",
        "_compiled_call_impl",
        "_current_graph_task_id",
        "_dynamo",
        "_foreach_add_",
        "_foreach_copy_",
        "_foreach_zero_",
        "_forward_hooks",
        "_functorch",
        "_get_name",
        "_get_sequence_nr",
        "_get_tracing_state",
        "_global_optimizer_post_hooks",
        "_global_optimizer_pre_hooks",
        "_is_profiler_enabled",
        "_linear_pointwise",
        "_modules",
        "_optimizer_step_pre_hooks",
        "_orig_mod",
        "_parameters",
        "_reversed_padding_repeated_twice",
        "_scale",
        "_sequence_nr",
        "_step_supports_amp_scaling",
        "_version",
        "_will_engine_execute_node",
        "_FrameAction",
        "_FrameExecStrategy",
        "_SetExcludeDispatchKeyGuard",
    },
    "lightning": {"_batches_that_stepped", "_logger_connector", "_trainer"},
    "keras": {"_flatten_layers", "_kernel", "_layers", "_trainable_variables", "_value"},
    "python": {"_asdict", "_getframe", "_replace"},
}
"""Names of other packages that say what no public name of theirs does."""

BY_NAME = {
    "__init__.py": "the index: each public name from its own module",
    "callbacks/__init__.py": "the index of callbacks",
    "core/catalog.py": "the rules, from floors below it",
    "core/ground/extras.py": "the package of an extra, which may be missing",
    "cli/functions.py": "the user's own module",
}
"""Modules that import by a name that is not written at the call, and what they import."""


def own_names(tree: ast.AST) -> set[str]:
    """Return every private name that a module itself defines or stores."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def named(node: ast.AST) -> str:
    """Return the name that a call or an attribute is looked up in, or nothing."""
    if isinstance(node, ast.Call):
        return named(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def private_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each private name that a module has from another one."""
    own = own_names(tree)
    for node in ast.walk(tree):
        found: list[object] = []
        if isinstance(node, ast.Attribute) and named(node.value) not in ("self", "cls", "super"):
            found = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neurms"):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and named(node) in ("getattr", "hasattr", "setattr"):
            found = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        for name in found:
            if is_private(name) and name not in own:
                yield getattr(node, "lineno", 0), str(name)


def test_private_names_are_read_where_they_are_defined() -> None:
    foreign = set().union(*FOREIGN.values())
    found = {
        f"{module}:{line} {name}"
        for module, path in MODULES.items()
        for line, name in private_reads(ast.parse(path.read_text()))
        if name not in foreign
    }
    assert not found, "give the name no underscore, or read something public"


def test_every_exception_is_still_needed() -> None:
    read = {
        name for path in MODULES.values() for _, name in private_reads(ast.parse(path.read_text()))
    }
    assert set().union(*FOREIGN.values()) == read & set().union(*FOREIGN.values())


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x._hidden", ["_hidden"]),
        ("from neurms.core import _hidden", ["_hidden"]),
        ("getattr(x, '_hidden', None)", ["_hidden"]),
        ("x.shown._hidden()", ["_hidden"]),
        ("self._hidden; cls._hidden; super()._hidden; x.__len__", []),
        ("x._mine\nclass A:\n    def _mine(self): ...", []),
        ("from torch import _hidden", []),
    ],
)
def test_the_search_for_private_names(source: str, names: list[str]) -> None:
    assert [name for _, name in private_reads(ast.parse(source))] == names


def imports_by_string(tree: ast.AST) -> Iterator[str | None]:
    """Yield what each import_module or __import__ is given: a text, or None for anything else."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else named(node)
            if called in ("import_module", "__import__"):
                first = node.args[0] if node.args else None
                value = first.value if isinstance(first, ast.Constant) else None
                yield value if isinstance(value, str) else None


def test_no_import_hides_in_a_string() -> None:
    """Such an import is seen by no contract: it could run back up from any floor."""
    by_name = set()
    for module, path in MODULES.items():
        for name in imports_by_string(ast.parse(path.read_text())):
            assert name is None or not name.startswith("neurms"), f"{module} imports {name}"
            by_name |= {module} if name is None else set()
    assert by_name == set(BY_NAME)


def test_the_catalog_names_floors_below_it() -> None:
    below = ("neurms.core.optimizers.", "neurms.core.unitwise.")
    assert all(home.startswith(below) for home in HOMES.values())


@pytest.mark.parametrize("name", HOMES)
def test_an_optimizer_has_at_most_two_ancestors_below_torchs(name: str) -> None:
    classes = optimizer_class(name).__mro__
    ours = classes[1 : classes.index(torch.optim.Optimizer)]
    assert len(ours) <= 2
