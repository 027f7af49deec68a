"""The seam: silent without an observer, restored after one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms.compiled.backends import PROMPT, Kernel
from neurms.compiled.finite import within
from neurms.compiled.moments import ema_, moment_factors, move_moments
from neurms.compiled.reductions import column_square_sum
from neurms.compiled.signals import scaled_signal
from neurms.core.ground import spans


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


class Stack(Recorder):
    """Knows which span is the innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def span(
        self, kind: spans.SpanKind, parameters: Sequence[Tensor] | None
    ) -> AbstractContextManager[None]:
        @contextmanager
        def opened() -> Iterator[None]:
            self.open.append(kind)
            yield
            self.open.pop()

        return opened()


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_neurms_names_its_kernels_and_keeps_its_bookkeeping_apart(
    monkeypatch: pytest.MonkeyPatch, variant: Any, update: Any, backend: str
) -> None:
    found: set[tuple[str, str]] = set()
    stack = Stack()

    def noting(kernel: Kernel[Any, Any], form: str) -> Callable[..., Any]:
        run = kernel.on(form)

        def noted(*args: Any, **named: Any) -> Any:
            found.add((kernel.eager.__name__, stack.open[-1] if stack.open else "none"))
            return run(*args, **named)

        return noted

    kernels = {
        column_square_sum: "reduce",
        ema_: "reduce",
        moment_factors: "scale",
        move_moments: "scale",
        scaled_signal: "scale",
    }
    for kernel, form in itertools.product(kernels, ("auto", "eager", PROMPT)):
        monkeypatch.setitem(kernel._forms, form, noting(kernel, form))
    looked: list[tuple[str, ...]] = []

    def looking(form: str) -> Callable[..., bool]:
        run = within.on(form)

        def look(*args: Any) -> bool:
            looked.append(tuple(stack.open))
            return run(*args)

        return look

    for form in ("auto", "eager", PROMPT):
        monkeypatch.setitem(within._forms, form, looking(form))
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = neurms.NeuRMS(model, variant=variant, update=update, backend=backend)
    with spans.observed_by(stack):
        for _ in range(2):
            step(optimizer, model)
    assert found
    assert found <= {(kernel.eager.__name__, kind) for kernel, kind in kernels.items()}
    assert looked
    assert not any({"reduce", "scale", "update"} & set(opened) for opened in looked)
