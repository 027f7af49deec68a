"""Two checkouts are compared contender by contender, in the same round."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.before_after import compared


class Fake:
    """A checkout whose clock runs at a known rate, and drifts for both sides alike."""

    def __init__(self, names: list[str], rate: float, log: list[str], key: str) -> None:
        self.names, self.rate, self.log, self.key = names, rate, log, key

    def seconds(self, name: str, number: int) -> float:
        self.log.append(self.key)
        return self.rate * (1 + number) * (2.0 if name == "slow" else 1.0)


def test_ratios_are_of_one_round_and_of_what_both_have() -> None:
    log: list[str] = []
    sides: dict[str, Any] = {
        "before": Fake(["slow", "quick", "gone"], 1.0, log, "before"),
        "after": Fake(["quick", "slow", "new"], 0.5, log, "after"),
    }
    found = compared(sides, rounds=8, warmup=1)
    assert set(found) == {"slow", "quick"}
    assert found["slow"]["ratio"] == pytest.approx(0.5)
    assert found["slow"]["low"] == found["slow"]["high"] == pytest.approx(0.5)
    # Rounds 1 to 8 are counted: the median of 2 ... 9.
    assert found["quick"]["before"] == pytest.approx(5.5e3)
    assert log.count("before") == log.count("after") == 18
    firsts = log[::2]
    assert {"before", "after"} == set(firsts)
