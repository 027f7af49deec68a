"""Two processes are one: statistics do not depend on the number of ranks, replicas are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import multiprocessing

from tests.core.unitwise.neurms_models import assert_same
from tests.core.unitwise.neurms_workers import network, trained, work

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

CASES: dict[str, dict[str, Any]] = {
    **{variant: {"variant": variant} for variant in "UBF"},
    "U in two parts": {"variant": "U", "parts": 2},
    "F in two parts": {"variant": "F", "parts": 2},
    "B in two parts": {"variant": "B", "parts": 2, "order": [0, 1, 4, 5, 2, 3, 6, 7]},
    "U normalised": {"variant": "U", "normalize": "rms"},
    "B normalised": {"variant": "B", "normalize": "rms"},
    "F normalised in two parts": {"variant": "F", "normalize": "rms", "parts": 2},
    "U with heads": {"variant": "U", "heads": {"0.weight": 2}},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found, from one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (2, str(folder), CASES), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_the_whole_batch(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    settings = CASES[case] if "order" in CASES[case] else {**CASES[case], "parts": 1}
    alone = trained(settings)
    together = ranks[0][case]
    for a, b in zip(alone["weights"], together["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(alone["state"], together["state"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    start = network().double()
    pairs = zip(start.parameters(), alone["weights"], strict=True)
    assert all((p - w).abs().max() > 1e-3 for p, w in pairs)


@pytest.mark.parametrize("case", [*CASES, "unequal", "empty"])
def test_replicas_are_bit_equal(case: str, ranks: list[dict[str, Any]]) -> None:
    assert_same(ranks[0][case], ranks[1][case])


def test_a_layer_that_one_rank_does_not_use_stays_under_the_rule(
    ranks: list[dict[str, Any]],
) -> None:
    assert set(ranks[1]["unequal"]["rules"].values()) == {"neurms"}


def test_a_statistic_that_is_bad_on_one_rank_is_refused_by_all(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "NaN or infinite" in found["nonfinite"]["raised"]
        assert found["nonfinite"]["unchanged"]


def test_backward_updates_are_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "trains on 2 ranks" in found["nonfinite"]["refused"]
