"""Checkpoints of sharded optimizers, for other numbers of ranks and for none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.distributed import checkpointing
from tests.core.distributed.ranks import Ranks
from tests.core.distributed.test_trainings import RULES
from tests.core.unitwise.neurms_models import assert_same

NAMES = ["neurms F", "neurms B", "rmnp", "racs", "alice", "shared_basis"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_on_two_ranks_goes_on_with_one_or_two(pool: Ranks, name: str, tmp_path: Path) -> None:
    rule, settings = RULES[name]
    job = {"rule": rule, "settings": settings, "folder": str(tmp_path / "saved")}
    wanted = pool.run(2, checkpointing.save, **job)
    for ranks, wrap in ((1, "none"), (1, "fsdp"), (2, "fsdp"), (2, "ddp")):
        found = pool.run(ranks, checkpointing.resume, **job, wrap=wrap)
        _compare(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_saved_on_two_ranks_goes_on_with_four(pool: Ranks, name: str, tmp_path: Path) -> None:
    rule, settings = RULES[name]
    job = {"rule": rule, "settings": settings, "folder": str(tmp_path / "saved")}
    wanted = pool.run(2, checkpointing.save, **job)
    _compare(pool.run(4, checkpointing.resume, **job), wanted)


BY_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: RULES[name] for name in RULES if name.startswith(("neurms", "rmnp", "racs"))},
    **{rule: (rule, {}) for rule in ("nora", "lars", "lamb")},
    "AdamW alone": ("rmnp", {"exclude": ("*",)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ROWS)
def test_saved_on_four_ranks_goes_on_with_fewer(pool: Ranks, name: str, tmp_path: Path) -> None:
    """Three ranks cut a layer of three rows, or seven, in other places than four do."""
    rule, settings = BY_ROWS[name]
    job = {"rule": rule, "settings": settings, "folder": str(tmp_path / "saved")}
    wanted = pool.run(4, checkpointing.save, **job)
    for ranks, wrap in ((4, "fsdp"), (3, "fsdp"), (2, "fsdp"), (1, "none")):
        _compare(pool.run(ranks, checkpointing.resume, **job, wrap=wrap), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rmnp", "racs", "neurms"])
def test_noise_of_rounding_goes_on_on_as_many_ranks(pool: Ranks, rule: str, tmp_path: Path) -> None:
    """It is drawn from a seed in the state and the step, for each rank's part by itself."""
    settings = {"low_precision": "stochastic", "lr": 0.05}
    job = {"rule": rule, "settings": settings, "folder": str(tmp_path / "saved")}
    wanted = pool.run(2, checkpointing.save, **job, dtype="bfloat16")
    found = pool.run(2, checkpointing.resume, **job, dtype="bfloat16")
    assert_same(found[0]["weights"], wanted[0]["weights"])
    assert_same(found[0]["state"], wanted[0]["state"])


@pytest.mark.parametrize("name", ["neurms F", "racs", "alice"])
def test_saved_by_replicas_goes_on_sharded(pool: Ranks, name: str, tmp_path: Path) -> None:
    rule, settings = RULES[name]
    job = {"rule": rule, "settings": settings, "folder": str(tmp_path / "saved")}
    wanted = pool.run(2, checkpointing.save, **job, wrap="ddp")
    _compare(pool.run(2, checkpointing.resume, **job), wanted)


@pytest.mark.parametrize("name", ["neurms F", "rmnp", "racs", "alice"])
def test_a_whole_state_is_sharded_as_it_is_loaded(pool: Ranks, name: str) -> None:
    rule, settings = RULES[name]
    for answer in pool.run(2, checkpointing.full_states, rule=rule, settings=settings):
        assert_same(answer["state"], answer["again"])
        for one, other in zip(answer["state"], answer["full"], strict=True):
            assert one.keys() == other.keys()


def _compare(found: list, wanted: list) -> None:  # type: ignore[type-arg]
    for a, b in zip(found[0]["weights"], wanted[0]["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for one, other in zip(found[0]["state"], wanted[0]["state"], strict=True):
        assert one.keys() == other.keys()
        assert one["step"] == other["step"] > checkpointing.BEFORE
    for other in found[1:]:
        assert_same(found[0]["weights"], other["weights"])
