"""One owner for each matrix: the weights of replicas bit for bit, a part of the work and state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import neurms
from neurms.core.optimizers.registry import is_torch
from tests.core.distributed import checkpointing, counting, owning, trainings
from tests.core.distributed.ranks import Ranks
from tests.core.distributed.test_traffic import MATRICES
from tests.core.distributed.test_trainings import RULES
from tests.core.distributed.trainings import train
from tests.core.unitwise.neurms_models import assert_same

QUICK = ("alice", "lamb", "muon", "racs", "soap")
ALL = [name for name in neurms.available() if not is_torch(name) and name != "neurms"]


def settings_of(rule: str) -> dict[str, Any]:
    return dict(RULES[rule][1]) if rule in RULES else dict(trainings.NEEDS.get(rule, {}))


def assert_forms_agree(found: list[dict[str, Any]]) -> None:
    for one in found:
        owned = {form: sum("owns it" in reason for reason in one[form]["reasons"]) for form in one}
        assert owned == {"owner": 3, "replicate": 0}
        assert_same(one["owner"]["weights"], found[0]["replicate"]["weights"])
        assert one["owner"]["local_bytes"] == one["owner"]["planned_bytes"]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("rule", [rule if rule in QUICK else slow(rule) for rule in ALL])
def test_owners_make_what_replicas_make(pool: Ranks, rule: str, wrap: str) -> None:
    job = {"rule": rule, "settings": settings_of(rule), "wrap": wrap}
    assert_forms_agree(pool.run(2, owning.forms, **job))


DIVIDED = ["soap", "shampoo", "alice", "muon", "eigen_adam", "shared_basis"]
REPEATABLE = {"shampoo", "alice", "muon", "shared_basis"}
"""The others make directions of rounding here, which differs with the number of ranks."""


def assert_goes_on(rule: str, found: list[Any], wanted: list[Any], *, alike: bool) -> None:
    for one in found:
        assert_same(one["kept"], wanted[0]["kept"])
        assert_same(one["weights"], found[0]["weights"])
    if alike:
        # DDP sums its first gradients in other buckets than later ones, and so in another order.
        assert_same(found[0]["weights"], wanted[0]["weights"])
        assert_same(found[0]["state"], wanted[0]["state"])
    elif rule in REPEATABLE:
        for a, b in zip(found[0]["weights"], wanted[0]["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


PAIRS = [(rule, wrap) for rule in DIVIDED for wrap in ("ddp", "fsdp")]
FEW = [pair if pair in (("soap", "ddp"), ("muon", "fsdp")) else slow(*pair) for pair in PAIRS]


@pytest.mark.parametrize(("rule", "wrap"), FEW)
def test_checkpoints_of_owners_go_on_anywhere(
    pool: Ranks, rule: str, wrap: str, tmp_path: Path
) -> None:
    """Saved on four; loaded on one, two and three, by owners and by replicas, and back."""
    first = {"rule": rule, "folder": str(tmp_path / "first")}
    owner, replica = (settings_of(rule) | {"distribute": form} for form in ("owner", "replicate"))
    wanted = pool.run(4, checkpointing.save, **first, settings=owner, wrap=wrap)
    for ranks, settings, way in (
        (4, owner, wrap),
        (1, owner, "none"),
        (2, replica, wrap),
        (3, owner, "fsdp" if wrap == "ddp" else "ddp"),
    ):
        found = pool.run(ranks, checkpointing.resume, **first, settings=settings, wrap=way)
        assert_goes_on(rule, found, wanted, alike=ranks == 4 and wrap == "fsdp")
    # One process's checkpoint, which owners divide.
    second = {"rule": rule, "folder": str(tmp_path / "second")}
    alone = pool.run(1, checkpointing.save, **second, settings=replica, wrap="none")
    found = pool.run(3, checkpointing.resume, **second, settings=owner, wrap=wrap)
    assert_goes_on(rule, found, alone, alike=False)


ELSEWHERE = {"lamb", "lars", "nora", "racs", "rmnp"}
"""Worked on by rows, whose checkpoints test_checkpointing.py has."""
OTHERS = [rule for rule in ALL if rule not in (*DIVIDED, *ELSEWHERE)]
DRAWN_OF_ROUNDING = {"fira", "galore", "low_rank_soap"}
"""As far as their bases have more directions than the gradient."""


@pytest.mark.slow
@pytest.mark.parametrize("rule", OTHERS)
def test_every_other_rule_goes_on_with_fewer_ranks(pool: Ranks, rule: str, tmp_path: Path) -> None:
    """Saved on four ranks; state bit for bit on three, two and one, random draws included."""
    job = {"rule": rule, "settings": settings_of(rule), "folder": str(tmp_path / "saved")}
    wanted = pool.run(4, checkpointing.save, **job)
    for ranks, wrap in ((4, "fsdp"), (3, "fsdp"), (2, "ddp"), (1, "none")):
        found = pool.run(ranks, checkpointing.resume, **job, wrap=wrap)
        assert_same(found[0]["kept"], wanted[0]["kept"])
        if ranks == 4:
            assert_same(found[0]["weights"], wanted[0]["weights"])
        elif rule not in DRAWN_OF_ROUNDING:
            for a, b in zip(found[0]["weights"], wanted[0]["weights"], strict=True):
                # Roots of ill-conditioned blocks (BlockAdam) are 2e-10 apart.
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", ["soap", "muon"])
def test_a_whole_state_of_owners(pool: Ranks, rule: str) -> None:
    settings = {"distribute": "owner"}
    for answer in pool.run(2, checkpointing.full_states, rule=rule, settings=settings):
        assert_same(answer["state"], answer["full"])
        assert_same(answer["state"], answer["again"])


SHARED = {
    "alice": {"rank": 6, "leading": 2, "interval": 2},
    "eigen_adam": {"interval": 2},
    "muon": {},
    "shampoo": {"interval": 2, "merge_dims": False},
    "shared_basis": {"lr": 0.01, "rank": 6},
    "soap": {"interval": 2},
}


@pytest.mark.parametrize(("rule", "wrap"), FEW)
def test_four_ranks_have_about_a_quarter_each(pool: Ranks, rule: str, wrap: str) -> None:
    """State, and the operations of the steps: of products, and n^3 for each factorization."""
    settings = SHARED[rule] | {"distribute": "owner"}
    alone = owning.shares(0, 1, rule=rule, settings=settings, wrap="none")
    found = pool.run(4, owning.shares, rule=rule, settings=settings, wrap=wrap)
    print(
        rule, wrap, [round(one[k] / alone[k], 3) for k in ("bytes", "operations") for one in found]
    )
    for one in found:
        assert one["bytes"] == one["planned"] == one["reported"] <= 0.30 * alone["bytes"]
        assert one["reasons"] == found[0]["reasons"]
        assert one["operations"] <= 0.35 * alone["operations"]
    total = sum(one["operations"] for one in found)
    assert total >= 0.999 * alone["operations"] > 0, "what nobody does would be a small share too"


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_gradients_of_the_next_round_travel_before_steps_of_this_one(
    pool: Ranks, wrap: str
) -> None:
    settings = {"distribute": "owner"}
    found = pool.run(2, owning.sent_in_small_rounds, rule="muon", settings=settings, wrap=wrap)
    for one in found:
        assert one["step"] == one["predicted"]
    kinds = [kind for kind, _ in found[0]["step"]]
    # Three matrices of two owners: a round of two and a round of one.
    inner = ["all-to-all"] * 4 if wrap == "fsdp" else ["broadcast"] * 3
    assert kinds == ["all-reduce", *inner, "all-reduce"]
    if wrap == "fsdp":
        _, there, next_there, back, next_back, _ = zip(
            *([size for _, size in one["step"]] for one in found), strict=True
        )
        assert sum(there) == sum(back) > sum(next_there) == sum(next_back)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", slow("hsdp")])
@pytest.mark.parametrize("rule", ["muon", "soap", "lamb", "racs", "alice"])
def test_what_is_sent_was_predicted(pool: Ranks, rule: str, wrap: str) -> None:
    settings = settings_of(rule) | {"distribute": "owner"}
    ranks = 4 if wrap == "hsdp" else 2
    found = pool.run(ranks, counting.calls, rule=rule, settings=settings, wrap=wrap)
    for one in found:
        assert one["step"] == one["predicted"]
        assert [kind for kind, _ in one["step"]] == [kind for kind, _ in found[0]["step"]]
    if wrap == "ddp":
        sizes = [size for kind, size in found[0]["step"] if kind == "broadcast"]
        assert sum(sizes) == 4 * sum(m * n for m, n in MATRICES), "each weight once"
    if wrap == "fsdp":
        sent = sum(size for one in found for kind, size in one["step"] if kind == "all-to-all")
        read = 3 if rule == "lamb" else 2
        assert sent == 4 * read * sum(m * n for m, n in MATRICES), "there and back"


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("rule", [*DIVIDED, "lamb", "racs"])
def test_four_owners_make_what_replicas_make(pool: Ranks, rule: str, wrap: str) -> None:
    job = {"rule": rule, "settings": settings_of(rule), "wrap": wrap}
    assert_forms_agree(pool.run(4, owning.forms, **job))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("rule", ["racs", "lamb", "muon"])
def test_large_matrices_in_several_rounds(pool: Ranks, rule: str, wrap: str) -> None:
    """Two are beyond what is stacked, so that DDP's take fused steps and go alone, in place."""
    job = {"rule": rule, "settings": {}, "wrap": wrap, "dtype": "float32", "width": 3000}
    assert_forms_agree(pool.run(2, owning.in_small_rounds, **job, steps=2))


@pytest.mark.parametrize("precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_low_precision(pool: Ranks, wrap: str, precision: str) -> None:
    settings = {"low_precision": precision}
    for rule in ("muon", "lamb"):
        job = {"rule": rule, "settings": settings, "wrap": wrap, "dtype": "bfloat16"}
        assert_forms_agree(pool.run(2, owning.forms, **job))


def test_owners_decide_which_gradients_are_there_and_good(pool: Ranks) -> None:
    found = pool.run(2, owning.odd_gradients)
    for one in found:
        assert len(one["found"]) == 12
        assert all(one["found"].values()), one["found"]
        assert_same(one["weights"], found[0]["weights"])
        assert one["steps"] == found[0]["steps"]
    assert pool.run(2, owning.skipped) == [1, 1]


@pytest.mark.parametrize("wrap", ["none", "fsdp"])
def test_what_breaks_an_owner_is_told_to_all(pool: Ranks, wrap: str) -> None:
    for message in pool.run(2, owning.broken, wrap=wrap):
        assert "broken off half done" in message


def test_owners_stay_when_parameters_come_and_when_copies_are_made(pool: Ranks) -> None:
    for one in pool.run(2, owning.changes):
        assert "owns it" not in one["before"]["down.weight"], "frozen"
        for name in ("conv.weight", "up.weight"):
            assert "owns it" in one["before"][name]
            assert one["after"][name] == one["before"][name]
        assert "of 2 owns it" in one["after"]["down.weight"]
        assert "of 2 owns it" in one["after"]["later"]
        assert one["twin"]
        assert one["again"]
        assert one["bytes"][0] < 0.9 * (one["bytes"][0] + one["bytes"][1])


def test_refusals(pool: Ranks) -> None:
    starts = (
        "distribute=\"rows\": 'soap' needs the whole of",
        "distribute=\"owner\": 'param_0' is not cut along one axis",
        'distribute="owner" among 2 ranks, and neither',
        "distribute='owner' means nothing to 'neurms'",
        "distribute='owner' takes whole gradients",
        'distribute="owner" has each matrix moved by one rank',
    )
    for messages in pool.run(2, owning.refusals):
        assert len(messages) == len(starts)
        for message, start in zip(messages, starts, strict=True):
            assert message.startswith(start)
            assert "; " in message, "a cure"


@pytest.mark.parametrize("form", ["auto", "rows", "owner", "replicate"])
def test_one_process_does_the_same_in_each_form(form: str) -> None:
    for rule in ("soap", "racs", "neurms"):
        found, wanted = (
            train(rule=rule, settings={"distribute": each}, steps=2) for each in (form, "auto")
        )
        assert_same(found["weights"], wanted["weights"])
        assert_same(found["state"], wanted["state"])
    with pytest.raises(ValueError, match="distribute='ranks' is not known"):
        neurms.SOAP(trainings.Network(), distribute="ranks")  # type: ignore[arg-type]
