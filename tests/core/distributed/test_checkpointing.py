"""Checkpoints of sharded optimizers, for other numbers of ranks and for none."""

from __future__ import annotations

from pathlib import Path

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
