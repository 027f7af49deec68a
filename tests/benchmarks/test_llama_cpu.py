"""What a training step of the 19 M parameter LLaMA takes: the parts of the benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import llama_cpu
from benchmarks.language import Scale
from benchmarks.llama_worker import ADAPTERS, METHODS, Worker
from benchmarks.lora import Adapted, adapt
from benchmarks.tables.llama_cpu import llama_cpu as section

SMALL = Scale(width=16, layers=1, heads=2, batch=1, context=8)


def test_adapters_begin_as_the_model_that_they_are_beside() -> None:
    tokens = torch.randint(256, (1, 8))
    plain, adapted = SMALL.model(0), adapt(SMALL.model(0), 4)
    torch.testing.assert_close(plain(tokens), adapted(tokens))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    layers = [m for m in adapted.modules() if isinstance(m, Adapted)]
    assert len(layers) == 7
    assert len(trained) == 14
    assert all(name.rpartition(".")[0].endswith(("down", "up")) for name in trained)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_the_model_and_counts_its_state(name: str) -> None:
    worker = Worker(METHODS[name], SMALL, low=False, rank=0)
    before = [p.clone() for p in worker.model.parameters()]
    assert len(worker.train()) == 2
    # SOAP's first step only finds its bases, and rates may be too small to see after one.
    assert len(worker.steps(3)) == 3
    after = worker.model.parameters()
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert (worker.memory()["state_bytes"] > 0) == (name != "SGD fused")


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_method_trains_adapters_alone(name: str) -> None:
    worker = Worker(ADAPTERS[name], SMALL, low=False, rank=2)
    frozen = {n: p.clone() for n, p in worker.model.named_parameters() if not p.requires_grad}
    for _ in range(2):
        worker.train()
    for parameter, value in worker.model.named_parameters():
        assert parameter not in frozen or torch.equal(value, frozen[parameter])


def test_steps_are_averaged_and_the_worst_is_kept() -> None:
    steps = [[10.0, 10.0], [20.0, 60.0]]
    found = llama_cpu.summary([90.0, 90.0], steps, Scale(batch=2, context=65))
    assert found["step_ms"] == 40.0
    assert found["worst_step_ms"] == 60.0
    assert found["ratio"] == 1.3
    assert found["tokens_per_s"] == 1000.0


def test_a_worker_that_is_too_slow_takes_a_tenth_of_the_interval() -> None:
    class Fixed:
        def __init__(self, ms: float) -> None:
            self.ms, self.taken = ms, 0

        def ask(self, what: str, count: int = 0) -> list[float]:
            self.taken += count
            return [self.ms] * count

    for ms, expected in ((5.0, 200), (2 * llama_cpu.SLOW, 20)):
        pair: Any = [Fixed(1.0), Fixed(ms)]
        found = llama_cpu.alternating(pair, 200)
        assert [len(own) for own in found] == [expected, expected]
        assert pair[0].taken == expected


def test_the_section_has_a_table_for_each_kind() -> None:
    run = {
        "tokens_per_s": 1234.0,
        "ratio": 1.25,
        "passes_ms": 900.0,
        "step_ms": 25.0,
        "worst_step_ms": 300.0,
        "state_bytes": 5e6,
        "peak_bytes": 7e8,
    }
    content = {
        "settings": {"threads": 2, "interval": 200, "rank of adapters": 16},
        "runs": {"float32 SOAP": run, "LoRA Muon": run},
        "command": "neurms bench llama_cpu --threads 2",
        "environment": {"commit": "abc", "machine": "a machine", "versions": {"torch": "2"}},
    }
    text = section(content)
    assert "| SOAP | 1,234 | 1.25 | 900 | 25.0 | 300 | 5.0 | 700 |" in text
    assert "Fine-tuning adapters of rank 16" in text
    assert "autocast" not in text
    both = section(content, {"on another machine": content, "on a third": None})
    assert both.count("| SOAP | 1,234 ") == 2
    assert "The same model on another machine:" in both
    assert "on a third" not in both
