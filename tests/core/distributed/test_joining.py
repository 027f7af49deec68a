"""Uneven inputs under torch's Join context, and wrapped models."""

from __future__ import annotations

import pytest
import torch

from tests.core.distributed import joining
from tests.core.distributed.ranks import Ranks
from tests.core.distributed.test_trainings import RULES, assert_replicas


@pytest.mark.parametrize("name", ["neurms U", "neurms F", "racs", "alice"])
def test_ranks_that_run_out_of_batches(pool: Ranks, name: str) -> None:
    rule, settings = RULES[name]
    found = pool.run(2, joining.uneven, rule=rule, settings=settings)
    assert_replicas([one["epoch"] for one in found])
    assert_replicas([one["end"] for one in found])
    wanted = joining.by_hand(2, rule=rule, settings=settings)
    for a, b in zip(found[0]["end"]["weights"], wanted["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_ranks_that_run_out_of_batches_while_accumulating(pool: Ranks) -> None:
    rule, settings = RULES["neurms F"]
    found = pool.run(2, joining.uneven, rule=rule, settings=settings, accumulate=True)
    assert_replicas([one["end"] for one in found])


def test_refusals(pool: Ranks) -> None:
    for messages in pool.run(2, joining.refused):
        assert [message.split()[0] for message in messages] == [
            'variant="B"',
            "FullyShardedDataParallel",
            "FullyShardedDataParallel",
        ]


def test_names_do_not_depend_on_the_wrapper(pool: Ranks) -> None:
    """They seed random draws and match checkpoints."""
    bare, wrapped = pool.run(1, joining.names)[0]
    assert bare == wrapped
