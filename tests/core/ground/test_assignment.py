"""Owners of matrices, against bounds that hold for any list and the best of all divisions."""

from __future__ import annotations

import itertools

import torch

from neurms.core.ground.assignment import Load, assigned, rounds


def shares(loads: list[Load], owners: list[int], ranks: int, name: str) -> list[float]:
    total = sum(getattr(load, name) for load in loads)
    return [
        sum(getattr(load, name) for load, owner in zip(loads, owners, strict=True) if owner == rank)
        / total
        for rank in range(ranks)
    ]


def test_small_lists_are_divided_nearly_as_well_as_can_be() -> None:
    """Longest first is at most 4/3 - 1/(3 R) of the best for one measure (Graham, 1969)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sides = torch.randint(1, 50, (7, 2), generator=generator).tolist()
        # One measure: state in proportion to work.
        loads = [Load.of(m, n, float(m * n * min(m, n))) for m, n in sides]
        found = max(shares(loads, assigned(loads, 3), 3, "work"))
        best = min(
            max(shares(loads, list(owners), 3, "work"))
            for owners in itertools.product(range(3), repeat=7)
        )
        assert found <= best * (4 / 3 - 1 / 9) + 1e-12


def test_work_and_state_are_both_divided() -> None:
    """Where the one says nothing of the other: much work with little state, and the reverse."""
    loads = [Load(100.0, 1.0)] * 8 + [Load(1.0, 100.0)] * 8
    owners = assigned(loads, 4)
    for name in ("work", "size"):
        assert max(shares(loads, owners, 4, name)) == 0.25


def test_what_is_held_counts() -> None:
    held = [Load(10.0, 10.0), Load(0.0, 0.0)]
    assert assigned([Load(4.0, 4.0), Load(3.0, 3.0)], 2, held) == [1, 1]
    assert held == [Load(10.0, 10.0), Load(0.0, 0.0)]


def test_matrices_without_state_or_work_find_an_owner() -> None:
    assert sorted(assigned([Load(0.0, 0.0)] * 2, 2)) == [0, 0]
    assert assigned([], 3) == []


def test_rounds_hold_everything_once_and_no_more_than_fits() -> None:
    owners, sizes = [0, 1, 0, 1, 0, 0], [50, 20, 100, 10, 30, 20]
    found = rounds(owners, sizes, 60)
    assert found == [[2, 1, 3], [0], [4, 5]]
    for one in found:
        for owner in (0, 1):
            own = [sizes[i] for i in one if owners[i] == owner]
            assert len(own) <= 1 or sum(own) <= 60
