"""Ranks that hold different models train as each would alone: ensembles, stages, one rank only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core.distributed import ensembles
from tests.core.distributed.ranks import Ranks

SETTINGS: dict[str, dict[str, Any]] = {
    "U": {"variant": "U", "momentum": 0.5},
    "F": {"variant": "F"},
    "B": {"variant": "B"},
    "P": {"variant": "P"},
    "beside SGD": {"variant": "F", "kind": "preconditioner"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_members_of_an_ensemble_share_nothing(pool: Ranks, name: str) -> None:
    found = pool.run(4, ensembles.member, **SETTINGS[name])
    for number in (0, 1):
        wanted = ensembles.alone(number, **SETTINGS[name])
        for weights in found[2 * number : 2 * number + 2]:
            torch.testing.assert_close(weights, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["F", "B"])
@pytest.mark.parametrize("trains", [(0, 1), (1,)])
def test_ranks_without_a_common_model_train_alone_and_are_told(
    pool: Ranks, name: str, trains: tuple[int, ...]
) -> None:
    found = pool.run(2, ensembles.some_train, trains=trains, **SETTINGS[name])
    for rank in trains:
        weights, warned = found[rank]
        torch.testing.assert_close(
            weights, ensembles.alone(rank, **SETTINGS[name]), rtol=1e-12, atol=1e-12
        )
        assert any("process_group=torch.distributed.group.WORLD" in text for text in warned)
