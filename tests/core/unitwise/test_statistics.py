"""Pending sums: they add up, become the right means, and are exchanged between ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.ground.ranks import ALONE, Ranks
from neurms.core.taps import Sums
from neurms.core.unitwise.statistics import PendingSums, synchronize

TWO = Ranks((None,), 2)


def sums(d: Tensor, h: Tensor | None = None) -> Sums:
    """Return what a tap delivers for D (rows, m) and H (rows, n)."""
    features = None if h is None else h.square().sum(0)
    return Sums(d.square().sum(0), len(d), features, 0 if h is None else len(h))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class TestPendingSums:
    def test_empty(self) -> None:
        pending = PendingSums()
        moments = pending.moments("mean")
        assert moments.units is None
        assert moments.features is None
        assert pending.is_finite()

    def test_mean_squares_of_per_row_errors(self) -> None:
        d, h = normal(6, 3), normal(8, 4)  # a convolution reads other positions than it writes
        pending = PendingSums()
        pending.add(sums(d, h))
        for reduction, per_row in (("mean", 6 * d), ("sum", d)):
            moments = pending.moments(reduction)  # type: ignore[arg-type]
            torch.testing.assert_close(moments.units, per_row.square().mean(0))
            torch.testing.assert_close(moments.features, h.square().mean(0))

    def test_parts_of_a_mean_loss_are_the_whole(self) -> None:
        per_row, h = normal(6, 3), normal(6, 4)
        whole, parts = PendingSums(), PendingSums()
        whole.add(sums(per_row / 6, h))
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            parts.add(sums(per_row[part] / 6, h[part]))
        for a, b in ((whole, parts), (parts, whole)):
            torch.testing.assert_close(a.moments("mean").units, b.moments("mean").units)
            torch.testing.assert_close(a.moments("mean").features, b.moments("mean").features)
        assert parts.rows == parts.feature_rows == 6

    def test_adding_writes_into_nothing(self) -> None:
        first, second = sums(normal(2, 3), normal(2, 2)), sums(normal(4, 3), normal(4, 2))
        kept = [t.clone() for t in (first.unit_square_sum, first.feature_square_sum)]
        pending = PendingSums()
        pending.add(first)
        twin = pending.copy()
        foreseen = pending.plus(second)
        assert (pending.rows, foreseen.rows) == (2, 6)
        pending.add(second)
        assert torch.equal(pending.units, foreseen.units)
        assert (twin.rows, twin.feature_rows) == (2, 2)
        assert torch.equal(first.unit_square_sum, kept[0])
        assert torch.equal(first.feature_square_sum, kept[1])
        pending.clear()
        assert (pending.units, pending.features, pending.rows, pending.feature_rows) == (
            None,
            None,
            0,
            0,
        )

    def test_empty_batches_count_for_nothing(self) -> None:
        pending = PendingSums()
        pending.add(sums(normal(0, 3), normal(0, 2)))
        assert pending.moments("mean").units is None
        assert pending.moments("sum").features is None
        d = normal(2, 3)
        pending.add(sums(d, normal(2, 2)))
        torch.testing.assert_close(pending.moments("sum").units, d.square().mean(0))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", ["units", "features"])
    def test_is_finite(self, where: str, value: float) -> None:
        d, h = normal(2, 3), normal(2, 2)
        (d if where == "units" else h)[1, 1] = value
        pending = PendingSums()
        pending.add(sums(d, h))
        assert not pending.is_finite()


class TestSynchronize:
    """Real processes are another file's; here, what is sent and what comes of it."""

    @pytest.fixture
    def exchange(self, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        """Pretend that a second rank sent the same numbers."""
        sent: list[Tensor] = []

        def all_reduce(flat: Tensor, group: object) -> None:
            sent.append(flat.clone())
            flat.mul_(2)

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        return sent

    def test_one_flat_exchange(self, exchange: list[Tensor]) -> None:
        d, h = normal(4, 3), normal(5, 2)
        one, two = PendingSums(), PendingSums()
        one.add(sums(d, h))
        two.add(sums(normal(4, 7)))
        synchronize([one, two, PendingSums()], [(3, 2), (7, 0), (4, 0)], "mean", d, TWO)
        assert [len(flat) for flat in exchange] == [3 + 2 + 2 + 7 + 2 + 4 + 2]
        assert (one.rows, one.feature_rows, two.rows, two.feature_rows) == (8, 10, 8, 0)
        # Twice the sums over twice the rows, errors halved because the loss is a mean of two means.
        torch.testing.assert_close(one.units, 2 * d.square().sum(0) / 4)
        torch.testing.assert_close(one.moments("mean").units, (4 * d).square().mean(0))
        torch.testing.assert_close(one.moments("mean").features, h.square().mean(0))
        assert two.features is None

    def test_of_a_summed_loss(self, exchange: list[Tensor]) -> None:
        d = normal(4, 3)
        pending = PendingSums()
        pending.add(sums(d))
        synchronize([pending], [(3, 0)], "sum", d, TWO)
        torch.testing.assert_close(pending.moments("sum").units, d.square().mean(0))

    def test_a_rank_without_rows_takes_part(self, exchange: list[Tensor]) -> None:
        pending = PendingSums()
        synchronize([pending], [(3, 2)], "mean", torch.zeros(1), TWO)
        assert [flat.tolist() for flat in exchange] == [[0.0] * 7]
        assert pending.moments("mean").units is None

    def test_alone_nothing_is_exchanged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(torch.distributed, "all_reduce")
        pending = PendingSums()
        pending.add(sums(normal(4, 3)))
        units = pending.units
        synchronize([pending], [(3, 0)], "mean", torch.zeros(1), ALONE)
        assert pending.units is units
