"""The seam: silent without an observer, restored after one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms.core.diagnostics import spans


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None]] = []

    def span(
        self, kind: spans.SpanKind, parameters: Sequence[Tensor] | None
    ) -> AbstractContextManager[None]:
        @contextmanager
        def noted() -> Iterator[None]:
            self.seen.append((kind, None if parameters is None else len(parameters)))
            yield

        return noted()

    def gradients_ready(self) -> None:
        self.seen.append(("ready", None))


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()


def test_an_optimizer_tells_what_it_does_in_order() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    recorder = Recorder()
    with spans.observed_by(recorder):
        step(neurms.RACS(model, head="rule"), model)
    kinds = [kind for kind, _ in recorder.seen]
    assert kinds[0] == "ready"
    assert {"reduce", "scale", "update"} <= set(kinds)
    # Biases go to the fallback together, in one update.
    assert ("update", 2) in recorder.seen
    seen = len(recorder.seen)
    step(neurms.RACS(model), model)
    assert len(recorder.seen) == seen


def test_the_observer_before_is_restored_even_after_an_error() -> None:
    outer = Recorder()
    with spans.observed_by(outer):
        with pytest.raises(RuntimeError), spans.observed_by(Recorder()):
            raise RuntimeError
        with spans.span("scale"):
            pass
    assert outer.seen == [("scale", None)]
    assert spans._observer is None
