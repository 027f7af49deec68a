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


def calls(
    rank: int, ranks: int, *, rule: str, settings: dict[str, Any], wrap: str, width: int = 7
) -> dict[str, list[Call]]:
    """Return the calls of a second step and of its backward pass, and what was predicted."""
    inner: nn.Module = Network(width)
    if wrap != "ddp":
        inner = sharded(inner, ranks, 2 if wrap == "hsdp" else 0)
    model = DistributedDataParallel(inner) if wrap == "ddp" else inner
    optimizer = neurms.create(rule, inner, **settings)
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
