"""Collective calls and their bytes, against the formulas of the guide's page on ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.distributed import counting
from tests.core.distributed.ranks import Ranks
from tests.core.distributed.test_trainings import OTHERS, RULES
from tests.core.distributed.trainings import NEEDS

# (units, columns) of the layers' matrices, and features of NeuRMS's statistics.
MATRICES = [(6, 4), (7, 12), (5, 7)]
UNITS, FEATURES = [6, 7, 5, 3], [4, 12, 7, 5]
PARAMETERS = 8
FINITE = [("all-reduce", 4 * PARAMETERS)]


def counted(pool: Ranks, ranks: int, rule: str, settings: dict[str, Any], wrap: str) -> Any:
    found = pool.run(ranks, counting.calls, rule=rule, settings=settings, wrap=wrap)
    for one in found[1:]:
        calls, first = ([kind for kind, _ in each["step"]] for each in (one, found[0]))
        assert calls == first, "ranks that call differently wait for ever"
    return found[0]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", "UBF")
def test_neurms(pool: Ranks, variant: str, wrap: str) -> None:
    settings = {"variant": variant, "momentum": 0.5}
    found = counted(pool, 2, "neurms", settings, wrap)
    numbers = sum(UNITS) + (sum(FEATURES) if variant == "F" else 0) + 2 * len(UNITS)
    statistics = [("all-reduce", 8 * numbers)]
    assert found["step"] == statistics + (FINITE if wrap == "fsdp" else [])
    scales = [("all-reduce", 8 * (m + 2)) for m in reversed(UNITS)] if variant == "B" else []
    assert found["predicted"] == scales + found["step"]
    plain = counted(pool, 2, "rmnp", {}, wrap)["backward"]
    assert sorted(found["backward"]) == sorted(plain + scales)


@pytest.mark.parametrize("width", [7, 7000])
def test_neurms_of_the_gradients_own_moments(pool: Ranks, width: int) -> None:
    settings = {"variant": "P", "momentum": 0.5}
    arguments = {"rule": "neurms", "settings": settings, "wrap": "fsdp", "width": width}
    found = pool.run(2, counting.calls, **arguments)[0]
    sizes = [(6, 4), (width, 12), (5, width), (3, 5)]
    assert found["step"] == [*FINITE, ("all-reduce", sum(8 * (m + n + 1) for m, n in sizes))]
    assert found["predicted"] == found["step"]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_lengths_are_one_exchange_more_where_rows_are_cut(pool: Ranks, wrap: str) -> None:
    plain = counted(pool, 2, "neurms", {"variant": "U"}, wrap)
    found = counted(pool, 2, "neurms", {"variant": "U", "normalize": "rms"}, wrap)
    lengths = [("all-reduce", 8 * PARAMETERS)] if wrap == "fsdp" else []
    assert found["step"] == plain["step"] + lengths
    assert found["predicted"] == found["step"]
    assert found["backward"] == plain["backward"]


@pytest.mark.parametrize("name", ["rmnp", "racs", "alice", "shared_basis"])
def test_replicas_send_nothing_in_a_step(pool: Ranks, name: str) -> None:
    rule, settings = RULES[name]
    assert counted(pool, 2, rule, settings, "ddp")["step"] == []


def test_rows_are_local_to_rmnp(pool: Ranks) -> None:
    assert counted(pool, 2, "rmnp", {}, "fsdp")["step"] == FINITE


RACS_CALLS: list[tuple[dict[str, Any], int, int]] = [
    *[({"iterations": rounds}, 4, rounds) for rounds in (1, 5)],
    # Sums of q's squares are in float64 there, and none with "sums".
    ({"fit": "tracked"}, 8, 1),
    ({"fit": "sums"}, 4, 1),
]


@pytest.mark.parametrize(("settings", "itemsize", "rounds"), RACS_CALLS)
def test_racs_sends_for_all_matrices_together(
    pool: Ranks, settings: dict[str, Any], itemsize: int, rounds: int
) -> None:
    found = counted(pool, 2, "racs", settings, "fsdp")
    more = settings.get("fit") != "sums"
    a_round = ("all-reduce", sum(itemsize * (n + more) for _, n in MATRICES))
    assert found["step"] == FINITE + [a_round] * rounds + [("all-reduce", 4 * len(MATRICES))]
    assert found["predicted"] == found["step"]


@pytest.mark.parametrize("fit", ["power", "tracked", "sums"])
def test_racs_on_large_matrices_sends_the_same(pool: Ranks, fit: str) -> None:
    settings = {"fit": fit}
    job = {"rule": "racs", "settings": settings, "wrap": "fsdp", "width": 7000}
    found = pool.run(2, counting.calls, **job)[0]
    assert found["step"] == found["predicted"]
    assert len(found["step"]) == 1 + (6 if fit == "power" else 2)


def test_groups_with_settings_of_their_own_send_together(pool: Ranks) -> None:
    """Some need more rounds than others, and send the last ones alone."""
    found = counted(pool, 2, "racs", {"by_layer": True}, "fsdp")
    assert found["step"] == found["predicted"]
    assert len(found["step"]) == 1 + 5 + 1


def test_alice_gathers_gradients(pool: Ranks) -> None:
    rule, settings = RULES["alice"]
    found = counted(pool, 2, rule, settings | {"distribute": "replicate"}, "fsdp")
    padded = [-(-m // 2) * 2 * n * 4 for m, n in MATRICES]
    assert found["step"] == FINITE + [("all-gather", size) for size in padded]


@pytest.mark.parametrize("rule", ["lars", "lamb"])
def test_trust_ratios_take_two_norms_of_each_matrix(pool: Ranks, rule: str) -> None:
    assert counted(pool, 2, rule, {}, "fsdp")["step"] == [*FINITE, ("all-reduce", 4 * 2 * 3)]


def test_muon_gathers_its_momentum(pool: Ranks) -> None:
    found = counted(pool, 2, "muon", {"distribute": "replicate"}, "fsdp")
    padded = [-(-m // 2) * 2 * n * 4 for m, n in MATRICES]
    assert found["step"] == FINITE + [("all-gather", size) for size in padded]


@pytest.mark.parametrize("rule", ["racs", *OTHERS])
@pytest.mark.parametrize("form", ["auto", "replicate"])
def test_every_rule_sends_what_was_predicted(pool: Ranks, rule: str, form: str) -> None:
    settings = NEEDS.get(rule, {}) | {"distribute": form}
    found = counted(pool, 2, rule, settings, "fsdp")
    assert found["step"] == found["predicted"]
    assert found["step"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["neurms", "racs", "alice"])
def test_a_mesh_of_two_axes(pool: Ranks, rule: str) -> None:
    settings = dict(RULES[rule][1]) if rule != "neurms" else {"variant": "U"}
    found = counted(pool, 4, rule, settings, "hsdp")
    assert found["step"] == found["predicted"]
    first = 2 if rule == "neurms" else 0
    assert len(set(found["step"][:first])) <= 1, "one sum of statistics along each axis"
    assert found["step"][first : first + 2] == FINITE * 2, "one agreement along each axis"
