"""Which steps are looked at, against the rule written out."""

from __future__ import annotations

import pytest

from neurms.callbacks.profiler.schedule import Schedule


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("first", [0, 3, 11])
def test_statistics_fall_on_every_nth_step_and_times_before_them(
    every: int, warmup: int, first: int
) -> None:
    schedule = Schedule(every, warmup)
    schedule.start(first)
    steps = range(first, first + 17)
    due = [step >= warmup and (step - warmup) % every == 0 for step in range(first + 18)]
    for step in steps:
        looks = schedule.wake_at
        found = schedule.look(step)
        ahead = every > 1 and not due[step] and due[step + 1]
        assert found == ("statistics" if due[step] else "times" if ahead else None)
        assert (found is not None) == (looks <= step)
        assert schedule.wake_at > step
