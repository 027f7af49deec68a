"""Graphs of a compiled training step: one to train, one to evaluate, none broken or made anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.compiled_step import OPTIMIZERS, Trained, counted

pytestmark = pytest.mark.slow
SMALL = (6, 8, 3)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_breaks_no_graph_and_compiles_nothing_anew(name: str) -> None:
    found = counted(Trained(name, SMALL, batch=4, backend="aot_eager"), steps=200)
    assert found == {"graphs": 2, "breaks": 0, "recompilations": 0}


def test_what_is_compiled_anew_is_counted() -> None:
    trained = Trained("NeuRMS-U", SMALL, batch=4, backend="aot_eager")
    counted(trained, steps=1)
    trained.batch = 5
    assert counted(trained, steps=1)["graphs"] == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_breaks_are_counted() -> None:
    trained = Trained("NeuRMS-U", SMALL, batch=4, backend="aot_eager")
    tapped = next(iter(trained.optimizer.routes.values())).module
    # Seen by Dynamo as a call that no graph can hold.
    tapped.register_forward_hook(torch.compiler.disable(lambda *_: None))
    torch._dynamo.reset()
    assert counted(trained, steps=1)["breaks"] > 0
