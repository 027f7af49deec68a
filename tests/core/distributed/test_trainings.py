"""The same global batch gives the same weights, however many ranks share it and the parameters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import neurms
from neurms.core.optimizers.registry import is_torch
from tests.core.distributed import trainings
from tests.core.distributed.ranks import Ranks
from tests.core.distributed.trainings import Network, train
from tests.core.unitwise.neurms_models import assert_same

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"neurms {v}": ("neurms", {"lr": 0.05, "momentum": 0.5, "variant": v}) for v in "UBFP"},
    "neurms normalised": (
        "neurms",
        {"lr": 0.05, "momentum": 0.5, "variant": "F", "normalize": "rms"},
    ),
    "neurms P average": (
        "neurms",
        {
            **{"lr": 0.02, "momentum": 0.5, "nesterov": True},
            **{"moments": "average", "damping": 0.5},
        },
    ),
    "rmnp": ("rmnp", {"weight_decay": 0.1}),
    "racs": ("racs", {}),
    "racs tracked": ("racs", {"fit": "tracked"}),
    "racs sums": ("racs", {"fit": "sums"}),
    "alice": ("alice", {"rank": 3, "leading": 1, "interval": 2}),
    "shared_basis": ("shared_basis", {"lr": 0.01, "rank": 2}),
}
OTHERS = [
    name
    for name in neurms.available()
    if not is_torch(name) and name not in {rule for rule, _ in RULES.values()}
]
BOUNDS = {"float64": (1e-10, 1e-12), "float32": (1e-5, 1e-6)}
OWN_BOUNDS = {("shared_basis", "float32"): (1e-4, 4e-6)}
"""Its inverse roots make more of rounding: one process alone is 1.2e-6 from its run in float64."""


@functools.cache
def alone(name: str, dtype: str = "float64", **others: Any) -> dict[str, Any]:
    """What one process comes to that never heard of ranks."""
    rule, settings = RULES[name]
    return train(rule=rule, settings=settings, dtype=dtype, **others)


def assert_close(
    found: dict[str, Any], wanted: dict[str, Any], dtype: str = "float64", name: str = ""
) -> None:
    rtol, atol = OWN_BOUNDS.get((name, dtype), BOUNDS[dtype])
    for a, b in zip(found["weights"], wanted["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for one, other in zip(found["state"], wanted["state"], strict=True):
        assert one.keys() == other.keys()
        assert one["step"] == other["step"]
    start = Network().double()
    moved = [
        float((p.detach() - w).abs().max())
        for p, w in zip(start.parameters(), wanted["weights"], strict=True)
    ]
    assert min(moved) > 1e-3, "a weight that stays where it was would be equal whatever happens"


def assert_replicas(found: list[dict[str, Any]]) -> None:
    for other in found[1:]:
        assert_same(found[0]["weights"], other["weights"])
        assert_same(found[0]["state"], other["state"])


MANY = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ranks", MANY)
def test_data_parallel(pool: Ranks, ranks: int, name: str, dtype: str) -> None:
    rule, settings = RULES[name]
    found = pool.run(ranks, train, rule=rule, settings=settings, wrap="ddp", dtype=dtype)
    assert_close(found[0], alone(name, dtype), dtype, name)
    assert_replicas(found)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ranks", MANY)
def test_fully_sharded(pool: Ranks, ranks: int, name: str, dtype: str) -> None:
    rule, settings = RULES[name]
    found = pool.run(ranks, train, rule=rule, settings=settings, wrap="fsdp", dtype=dtype)
    assert_close(found[0], alone(name, dtype), dtype, name)
    assert_replicas(found)
    for one in found:
        assert one["local_bytes"] == one["planned_bytes"]
    sizes = [sum(one["local_sizes"]) for one in found]
    assert sum(sizes) == sum(p.numel() for p in Network().parameters())
    if ranks == 4:
        assert 0 in found[3]["local_sizes"], "a rank without rows of some layer is to be tested"


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_sharded_and_replicated(pool: Ranks, name: str) -> None:
    rule, settings = RULES[name]
    found = pool.run(4, train, rule=rule, settings=settings, wrap="hsdp")
    assert_close(found[0], alone(name))
    assert_replicas(found)


@pytest.mark.parametrize("rule", OTHERS)
def test_every_other_rule_is_right_when_sharded(pool: Ranks, rule: str) -> None:
    """Against replicas on two ranks, whose means of two gradients are the very same numbers.

    One process sums in another order, and full bases (SOAP) are arbitrary in the null space of the
    first gradients, where rounding decides.
    """
    settings = trainings.NEEDS.get(rule, {})
    found = pool.run(2, train, rule=rule, settings=settings, wrap="fsdp")
    wanted = pool.run(2, train, rule=rule, settings=settings, wrap="ddp")[0]
    for a, b in zip(found[0]["weights"], wanted["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert_replicas(found)
    assert all(one["local_bytes"] == one["planned_bytes"] for one in found)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["rmnp", "racs", "racs tracked", "racs sums", "neurms F"])
def test_large_matrices_take_their_fused_steps(pool: Ranks, name: str, ranks: int) -> None:
    """Two layers are (7000, 12) and (5, 7000): beyond what is stacked, and uneven or empty."""
    rule, settings = RULES[name]
    big: dict[str, Any] = {"dtype": "float32", "width": 7000, "steps": 2}
    found = pool.run(ranks, train, rule=rule, settings=settings, wrap="fsdp", **big)
    wanted = alone(name, **big)
    for a, b in zip(found[0]["weights"], wanted["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert_replicas(found)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["neurms U", "neurms F", "racs"])
def test_micro_batches(pool: Ranks, name: str, wrap: str) -> None:
    rule, settings = RULES[name]
    found = pool.run(2, train, rule=rule, settings=settings, wrap=wrap, parts=2)
    assert_close(found[0], alone(name))
    assert_replicas(found)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", ["neurms U", "neurms F", "racs"])
def test_micro_batches_without_exchange(pool: Ranks, name: str, views: bool) -> None:
    rule, settings = RULES[name]
    found = pool.run(2, trainings.no_sync, rule=rule, settings=settings, views=views)
    assert_close(found[0], alone(name))
    assert_replicas(found)


@pytest.mark.parametrize("precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("name", ["rmnp", "neurms F", "alice"])
def test_low_precision_when_sharded(pool: Ranks, name: str, precision: str) -> None:
    rule, settings = RULES[name]
    settings = {**settings, "low_precision": precision}
    found = pool.run(2, train, rule=rule, settings=settings, wrap="fsdp", dtype="bfloat16")
    wanted = train(rule=rule, settings=settings, dtype="bfloat16")
    assert_replicas(found)
    for a, b in zip(found[0]["weights"], wanted["weights"], strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_a_branch_that_only_some_ranks_use(pool: Ranks) -> None:
    for rule, settings in (RULES["neurms U"], RULES["racs"]):
        found = pool.run(2, trainings.branches, rule=rule, settings=settings)
        wanted = trainings.branches(0, 1, rule=rule, settings=settings)
        assert_replicas(found)
        for a, b in zip(found[0]["weights"], wanted["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["neurms U", "neurms F", "racs", "alice"])
def test_a_rank_with_an_empty_batch(pool: Ranks, name: str) -> None:
    rule, settings = RULES[name]
    if rule == "neurms":
        settings = {**settings, "loss_reduction": "sum"}
    found = pool.run(2, trainings.half_empty, rule=rule, settings=settings)
    wanted = trainings.half_empty(0, 1, rule=rule, settings=settings)
    assert_replicas(found)
    for a, b in zip(found[0]["weights"], wanted["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["racs", "neurms"])
def test_a_gradient_that_is_bad_on_one_rank_is_refused_by_all(pool: Ranks, rule: str) -> None:
    for answer in pool.run(2, trainings.bad_on_one_rank, rule=rule):
        assert "'up.weight'" in answer["raised"]
        assert answer["unchanged"]
        assert answer["went_on"]


def test_other_cuts(pool: Ranks) -> None:
    """A matrix cut by its features is gathered; NeuRMS, which needs whole units, refuses it."""
    for answer in pool.run(2, trainings.cut_by_features):
        assert answer["same"]
        assert "'0.weight' is sharded as (Shard(dim=1),)" in answer["refused"]
