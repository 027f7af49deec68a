import pytest

from benchmarks.sweep import sweep


def test_every_study_is_done_in_order() -> None:
    done: list[int] = []
    sweep([3, 1, 2], done.append)
    assert done == [3, 1, 2]


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        sweep([1], print, workers=0)
