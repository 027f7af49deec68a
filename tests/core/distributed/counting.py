"""What a step sends: counted, and predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import neurms
from benchmarks.traffic import CountedTraffic
from neurms.core.distributed.traffic import step_exchanges
from tests.core.distributed.trainings import Network, batch, sharded

Call = tuple[str, int]


def _made(rule: str, model: nn.Module, by_layer: bool = False, **settings: Any) -> Any:
    """Return the optimizer, whose layers have groups and settings of their own ``by_layer``."""
    if not by_layer:
        return neurms.create(rule, model, **settings)
    layers = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
    groups = [
        {"params": list(layer.parameters()), "beta": 0.5 + 0.1 * i, "iterations": 3 + i}
        for i, layer in enumerate(layers)
    ]
    return neurms.create(rule, groups, **settings)


def calls(
    rank: int, ranks: int, *, rule: str, settings: dict[str, Any], wrap: str, width: int = 7
) -> dict[str, list[Call]]:
    """Return the calls of a second step and of its backward pass, and what was predicted."""
    inner: nn.Module = Network(width)
    if wrap != "ddp":
        inner = sharded(inner, ranks, 2 if wrap == "hsdp" else 0)
    model = DistributedDataParallel(inner) if wrap == "ddp" else inner
    optimizer = _made(rule, inner, **settings)
    for step in range(2):
        x, y = (t.chunk(ranks)[rank] for t in batch(step, torch.float32))
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        with CountedTraffic() as backward:
            loss.backward()
        with CountedTraffic() as stepped:
            optimizer.step()
    predicted = [(e.kind, e.bytes) for e in step_exchanges(optimizer)]
    return {"backward": backward.calls, "step": stepped.calls, "predicted": predicted}
