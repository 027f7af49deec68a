"""What a type checker tells a user of the package, whose program lies elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

PROGRAM = """
import neurms
import torch
from neurms.callbacks import NeuRMSCallback
from neurms.integrations.lightning import optimizer_config
from neurms.integrations.transformers import trainer_optimizers

model = torch.nn.Linear(3, 2)
optimizer = neurms.NeuRMS(model, lr=1e-2, variant="F", weight_decay=0.1)
reveal_type(optimizer)
reveal_type(neurms.RACS(model.parameters(), lr=0.02, exclude=("a",)))
reveal_type(neurms.create("racs", model))
reveal_type(optimizer.plan())
reveal_type(neurms.memory_report(model, "racs").state_bytes)
reveal_type(trainer_optimizers(model))
neurms.NeuRMS(model, variant="X")
neurms.RACS(model, no_such_setting=1)
NeuRMSCallback(beta="much")
"""


EXTENSION = """
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import neurms
import torch
from neurms.testing import TransformContract


@dataclass(frozen=True)
class Halved(neurms.Transform):
    factor: float = 0.5

    def __call__(
        self, update: torch.Tensor, state: dict[str, torch.Tensor], context: neurms.Context
    ) -> torch.Tensor:
        return update * self.factor


class TestHalved(TransformContract):
    transform = Halved()


@neurms.register
class Half(neurms.PreconditionedOptimizer):
    rule = "half"

    def __init__(self, params: Any, lr: float = 0.1, **common: Any) -> None:
        super().__init__(params, {"lr": lr}, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> neurms.Recipe:
        return neurms.Recipe((Halved(),))


model = torch.nn.Linear(3, 2)
reveal_type(Half(model))
reveal_type(Half(model).plan())
preconditioner = neurms.GradientPreconditioner(model, variant="F")
reveal_type(preconditioner.precondition_(Half(model)))
reveal_type(neurms.available())
try:
    neurms.warm_up()
except (
    neurms.CheckpointError,
    neurms.MissingParametersError,
    neurms.NonFiniteError,
    neurms.SparseGradientError,
    neurms.UnsupportedTrainingError,
):
    raise
neurms.register(Halved)
neurms.Recipe([Halved()], momentum=1)
neurms.no_such_name
"""


def checked(program: str, folder: Path) -> tuple[list[str], list[str]]:
    """Return the types that mypy reveals, and the codes of its errors."""
    (folder / "program.py").write_text(program)
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "program.py"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=500,
    )
    found = ended.stdout.splitlines()
    revealed = [line.partition("is ")[2].strip('"') for line in found if "Revealed" in line]
    errors = [line.rpartition("[")[2].rstrip("]") for line in found if ": error:" in line]
    return revealed, errors


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_an_extender_writes_is_typed(tmp_path: Path) -> None:
    revealed, errors = checked(EXTENSION, tmp_path)
    assert revealed == [
        "program.Half",
        "neurms.core.optimizers.plan.Plan",
        "bool",
        "list[str]",
    ]
    assert sorted(errors) == ["arg-type", "arg-type", "attr-defined", "call-arg"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mypy_sees_types_and_finds_mistakes(tmp_path: Path) -> None:
    revealed, errors = checked(PROGRAM, tmp_path)
    assert revealed == [
        "neurms.core.unitwise.neurms.NeuRMS",
        "neurms.core.optimizers.racs.RACS",
        "torch.optim.optimizer.Optimizer",
        "neurms.core.optimizers.plan.Plan",
        "int",
        "tuple[torch.optim.optimizer.Optimizer, torch.optim.lr_scheduler.LambdaLR | None]",
    ]
    assert errors == ["arg-type", "call-arg", "arg-type"]
