"""The overhead benchmark on a network of no size: its parts are there and its shares are theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from benchmarks.overhead_plot import draw


@pytest.mark.parametrize("mode", overhead.MODES | overhead.MOMENTS)
def test_shares_are_those_of_the_parts(mode: str) -> None:
    threads = torch.get_num_threads()
    try:
        found = overhead.measured(8, 4, 1, mode)
    finally:
        torch.set_num_threads(threads)
    parts = [found[f"{part}_us"] for part in overhead.PARTS]
    assert all(part > 0 for part in (found["forward_us"], found["backward_us"], found["update_us"]))
    assert found["share"] == pytest.approx((found["reduce_us"] + found["scale_us"]) / sum(parts))
    assert found["share"] < found["share_with_bookkeeping"] < 1


def test_every_combination_comes_once_and_cheap_ones_first() -> None:
    found = overhead.combinations()
    assert len(set(found)) == len(found) == 7 * 4 * 2 * len(overhead.MODES)
    assert found[0][:2] == (64, 32)
    assert found[-1][:3] == (4096, 2048, 1)


def test_laws_and_picture_come_of_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [
        {
            "mode": mode,
            "threads": threads,
            "batch": batch,
            "width": width,
            "kernels_us": width * 5.0,
        }
        | {"share": batch / width**0.9, "share_with_bookkeeping": batch / width**0.5}
        for width, batch, threads, mode in overhead.combinations()
    ]
    laws = overhead.laws(runs)
    assert set(laws) == {f"{m}, {t} threads" for m in overhead.MODES for t in (1, 2)}
    for law in laws.values():
        assert law["kernels"]["k"] == pytest.approx(-0.9)
        assert law["all"]["k"] == pytest.approx(-0.5)
        assert law["kernels, batch 32"]["runs"] == 7
        assert law["kernels, arithmetic"]["runs"] < law["kernels"]["runs"]
    draw(runs, laws, tmp_path / "new" / "picture.svg")
    assert "reduce + scale" in (tmp_path / "new" / "picture.svg").read_text()
