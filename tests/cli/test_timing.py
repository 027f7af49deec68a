import pytest

from neurms.cli import timing
from neurms.cli.methods import Method


def test_ratios_are_paired_and_medians(monkeypatch) -> None:
    """The second method takes twice the first one's time, however loaded the round."""
    load = [1.0, 1.0, 50.0, 1.0, 3.0, 9.0]
    calls = []

    def turn_of(method, *_):
        done = iter(load)

        def turn():
            calls.append(method.title)
            return next(done) * method.lr

        return turn

    monkeypatch.setattr(timing, "_turn", turn_of)
    methods = (Method("one", "sgd", 1e-3), Method("two", "sgd", 2e-3))
    rounds = []
    times = timing.step_times(methods, None, rounds=5, report=rounds.append)
    assert [time.ratio for time in times] == pytest.approx([1.0, 2.0])
    assert [time.milliseconds for time in times] == pytest.approx([3.0, 6.0])
    assert calls[2:6] == ["one", "two", "two", "one"]
    assert rounds == [1, 2, 3, 4, 5]
