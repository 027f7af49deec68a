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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mypy_sees_types_and_finds_mistakes(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "program.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=500,
    )
    found = ended.stdout.splitlines()
    revealed = [line.partition("is ")[2].strip('"') for line in found if "Revealed" in line]
    assert revealed == [
        "neurms.core.unitwise.neurms.NeuRMS",
        "neurms.core.optimizers.racs.RACS",
        "torch.optim.optimizer.Optimizer",
        "neurms.core.optimizers.plan.Plan",
        "int",
        "tuple[torch.optim.optimizer.Optimizer, torch.optim.lr_scheduler.LambdaLR | None]",
    ]
    errors = [line.rpartition("[")[2].rstrip("]") for line in found if ": error:" in line]
    assert errors == ["arg-type", "call-arg", "arg-type"], ended.stdout
