"""Tensor parallelism, alone and beside FSDP2; stages with statistics of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core.distributed import parallel
from tests.core.distributed.ranks import Ranks
from tests.core.distributed.test_trainings import assert_replicas

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "neurms P": ("neurms", {}),
    "neurms P momentum": ("neurms", {"momentum": 0.5, "weight_decay": 0.1}),
    "neurms P average": ("neurms", {"momentum": 0.5, "nesterov": True, "moments": "average"}),
    "rmnp": ("rmnp", {}),
    "racs": ("racs", {}),
    "lamb": ("lamb", {}),
    "muon": ("muon", {}),
    "alice": ("alice", {"rank": 3, "leading": 1}),
    "AdamW alone": ("rmnp", {"exclude": ("*",)}),
}
MESHES = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ranks", MESHES)
def test_weights_cut_by_units_and_by_features(pool: Ranks, ranks: int, name: str) -> None:
    """Two ranks: tensor parallelism alone; four: FSDP2 cuts each part once more."""
    rule, settings = RULES[name]
    job = {"rule": rule, "settings": settings}
    # Three rows of a part that two ranks share are not divided evenly.
    for hidden in (12, 6) if ranks == 4 else (12,):
        found = pool.run(ranks, parallel.train, **job, hidden=hidden)
        wanted = parallel.train(**job, hidden=hidden)
        assert_replicas(found)
        for a, b in zip(found[0]["weights"], wanted["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        for one, other in zip(found[0]["state"], wanted["state"], strict=True):
            assert_close_states(one, other, name)


def assert_close_states(one: dict[str, Any], other: dict[str, Any], name: str) -> None:
    assert one.keys() == other.keys()
    for key, value in other.items():
        # What Alice keeps of a gradient's null space is made of rounding.
        if isinstance(value, torch.Tensor) and name != "alice":
            torch.testing.assert_close(one[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "rows"), [("rmnp", 3), ("racs", 3), ("neurms", 3), ("muon", 3)])
def test_units_cut_twice_keep_state_by_rows(pool: Ranks, rule: str, rows: int) -> None:
    """Twelve units, cut in two halves, each by two ranks."""
    found = pool.run(4, parallel.train, rule=rule, settings={}, hidden=12)
    wanted = parallel.train(rule=rule, settings={}, hidden=12)
    own, whole = (one["state_rows"][0] for one in (found[0], wanted))
    assert set(own) == set(whole)
    assert rows in own.values()


@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_what_reads_layers_refuses_tensor_parallelism(pool: Ranks, variant: str) -> None:
    """At once where a weight is cut by features; else when a layer shows parts of its signals."""
    for message in pool.run(2, parallel.refused, variant=variant, alone=False):
        assert "'down.weight' is sharded as (Shard(dim=1),)" in message
        assert message.endswith("unchanged: True")
    for message in pool.run(2, parallel.refused, variant=variant, alone=True):
        assert "tensor parallelism" in message
        assert message.endswith("unchanged: True")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["U", "F"])
def test_stages_have_statistics_of_their_own(pool: Ranks, variant: str) -> None:
    """``process_group=`` is the ranks that hold the same stage."""
    found = pool.run(4, parallel.stage, variant=variant)
    for rank, weights in enumerate(found):
        wanted = parallel.stage(number=rank // 2, variant=variant)
        for a, b in zip(weights, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
