"""Tests mirror the package: each module has a test file of its name, or is said to have another.

``neurms/core/ground/layout.py`` belongs to ``tests/core/ground/test_layout.py``, or to several
files ``test_layout_*.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ELSEWHERE = {
    # Parts of one thing, which is tested as its users meet it.
    "callbacks/profiler/test_engine.py": [
        *("callbacks/profiler/probe", "callbacks/profiler/process", "callbacks/profiler/samples"),
        *("callbacks/profiler/sampling", "callbacks/profiler/subjects"),
        *("callbacks/profiler/timing", "callbacks/profiler/window", "report/scalars"),
    ],
    "callbacks/profiler/test_lightning.py": [
        "callbacks/profiler/callback",
        "callbacks/profiler/logged",
    ],
    "callbacks/profiler/test_distributed.py": ["callbacks/profiler/ranks"],
    "report/test_report.py": ["report/columns", "report/rows", "report/summary", "report/tables"],
    "report/test_html.py": [
        *("report/comparison", "report/document", "report/plots", "report/svg"),
    ],
    "report/test_runs.py": ["report/writer"],
    "cli/test_main.py": ["cli/commands", "cli/errors", "cli/planning"],
    "cli/test_mistakes.py": ["cli/functions", "cli/words"],
    "cli/test_doctor.py": ["cli/kernel_times"],
    "cli/test_demo.py": ["cli/methods", "cli/page", "cli/tables"],
    "cli/test_tasks.py": ["cli/network"],
    "integrations/test_lightning.py": ["integrations/schedules"],
    "integrations/test_transformers.py": ["integrations/training_arguments"],
    "integrations/keras/test_training.py": [
        *("integrations/keras/engine", "integrations/keras/optimizer"),
    ],
    "integrations/keras/test_errors.py": ["integrations/keras/settings"],
    "integrations/keras/test_classes.py": ["integrations/keras/factories"],
    "integrations/keras/test_routing.py": ["integrations/keras/forecast"],
    "integrations/keras/test_several_optimizers.py": ["integrations/keras/owners"],
    "integrations/keras/test_trajectory.py": ["integrations/keras/neurms"],
    # One file for relatives: they are compared with each other, and with one truth.
    "core/optimizers/test_eigen_family.py": [
        *("core/optimizers/alice", "core/optimizers/apollo", "core/optimizers/eigen_adam"),
        *("core/optimizers/fira", "core/optimizers/galore", "core/optimizers/low_rank_soap"),
        "core/optimizers/soap",
    ],
    # Every kernel's forms are compared by the same tests.
    "compiled/test_numerics.py": [
        "compiled/_tiles",
    ],
    "compiled/test_operators.py": ["compiled/_forms"],
    "compiled/test_native.py": ["compiled/native/build", "compiled/native/toolchain"],
    # Without code of their own to test: protocols, base classes, a table, a re-export.
    "core/optimizers/test_rules.py": ["core/catalog"],
    "core/optimizers/test_by_recipe.py": ["core/optimizers/view"],
    # What is divided among ranks, by ranks.
    "core/distributed/test_owning.py": [
        *("core/optimizers/by_owner", "core/optimizers/sharing", "core/ground/parcels"),
        *("core/distributed/exchange", "core/distributed/owner_traffic"),
    ],
    "core/structures/test_properties.py": ["core/structures/base", "core/structures/norms"],
    "core/taps/test_hooks.py": ["core/taps/protocol"],
    # Seen best from what they serve.
    "core/optimizers/test_groups.py": ["core/optimizers/recipes"],
    "core/optimizers/test_work.py": ["core/optimizers/gradients"],
    "core/unitwise/test_statistics.py": ["core/ground/ranks"],
    "core/unitwise/test_neurms_routing.py": [
        *("core/ground/warn", "core/unitwise/layers", "core/unitwise/mover"),
    ],
    "core/unitwise/test_neurms_errors.py": ["core/unitwise/checks", "core/unitwise/rule"],
    "core/unitwise/test_gradient_mover.py": [
        *("core/unitwise/gradient_moves", "core/unitwise/gradient_rule"),
    ],
    "core/unitwise/test_probed.py": ["core/unitwise/probed_mover"],
    "release/test_distribution.py": ["version"],
    "faults/test_changed_layers.py": ["core/taps/copies", "core/taps/weights"],
    "core/unitwise/test_moves.py": ["core/unitwise/products"],
    "core/unitwise/test_neurms_backward.py": ["core/taps/tap_set"],
    "core/optimizers/test_momentum_first.py": [
        *("core/optimizers/in_backward", "core/optimizers/momentum_mover"),
    ],
    "core/distributed/test_trainings.py": ["core/ground/wrappers"],
    "core/diagnostics/test_probe.py": ["core/taps/signals"],
    "core/structures/test_diagonal.py": ["testing"],
}
"""Test file -> modules that it tests beside, or instead of, the one of its name."""


def mirrored(module: Path, tests: Path) -> bool:
    """Return whether a module has test files of its own name."""
    folder, name = tests / module.parent, module.stem.lstrip("_")
    return (folder / f"test_{name}.py").exists() or any(folder.glob(f"test_{name}_*.py"))


def test_every_module_is_tested_under_its_name_or_under_a_known_one(repository: Path) -> None:
    package, tests = repository / "neurms", repository / "tests"
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    named = {path for path in modules if not path.stem.startswith("__")}
    alone = {str(path.with_suffix("")) for path in named if not mirrored(path, tests)}
    elsewhere = [module for listed in ELSEWHERE.values() for module in listed]
    assert len(elsewhere) == len(set(elsewhere))
    assert alone == set(elsewhere), "name the test file after the module, or list the module above"


@pytest.mark.parametrize("test", ELSEWHERE)
def test_the_other_test_files_exist(repository: Path, test: str) -> None:
    assert (repository / "tests" / test).is_file()
