"""One owner for each matrix: the weights of replicas bit for bit, a part of the work and state."""

from __future__ import annotations

from typing import Any

import pytest

import neurms
from neurms.core.optimizers.registry import is_torch
from tests.core.distributed import owning, trainings
from tests.core.distributed.ranks import Ranks
from tests.core.distributed.test_trainings import RULES
from tests.core.unitwise.neurms_models import assert_same

ALL = [name for name in neurms.available() if not is_torch(name) and name != "neurms"]


def settings_of(rule: str) -> dict[str, Any]:
    return dict(RULES[rule][1]) if rule in RULES else dict(trainings.NEEDS.get(rule, {}))


def assert_forms_agree(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert_same(one["owner"]["weights"], found[0]["replicate"]["weights"])
        assert one["owner"]["local_bytes"] == one["owner"]["planned_bytes"]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("rule", ALL)
def test_owners_make_what_replicas_make(pool: Ranks, rule: str, wrap: str) -> None:
    job = {"rule": rule, "settings": settings_of(rule), "wrap": wrap}
    assert_forms_agree(pool.run(2, owning.forms, **job))
