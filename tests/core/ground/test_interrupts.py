"""Ctrl-C during a step, or a lost child: the step is done, then comes what it raises."""

# Only a block of several statements shows that the later ones run.
# ruff: noqa: PT012

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from neurms.core.ground.interrupts import WholeStep


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_interrupt_comes_after_the_step() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), WholeStep():
        press()
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_does_not_wait() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), WholeStep():
        press()
        press()
        done.append(1)
    assert not done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_step_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), WholeStep():
        press()
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nested_steps_end_with_the_outer_one() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), WholeStep():
        with WholeStep():
            press()
        done.append(1)
    assert done == [1]


def test_a_handler_of_the_programs_own_is_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with WholeStep():
            press()
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_set_no_handler() -> None:
    errors: list[BaseException] = []

    def step() -> None:
        try:
            with WholeStep():
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert not errors


@pytest.fixture
def lost() -> Iterator[list[int]]:
    """Have a handler of SIGCHLD that raises, as a DataLoader with workers has."""
    seen: list[int] = []

    def handler(number: int, frame: object) -> None:
        seen.append(number)
        raise RuntimeError("a worker has died")

    before = signal.signal(signal.SIGCHLD, handler)
    yield seen
    signal.signal(signal.SIGCHLD, before)


def test_a_lost_worker_is_told_after_the_step(lost: list[int]) -> None:
    handler, done = signal.getsignal(signal.SIGCHLD), []
    with pytest.raises(RuntimeError, match="died"), WholeStep():
        signal.raise_signal(signal.SIGCHLD)
        done.append(1)
    assert done == [1]
    assert lost == [signal.SIGCHLD]
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_nested_steps_tell_of_it_once_at_the_outer_end(lost: list[int]) -> None:
    done = []
    with pytest.raises(RuntimeError, match="died"), WholeStep():
        with WholeStep():
            signal.raise_signal(signal.SIGCHLD)
        done.append(1)
    assert done == [1]
    assert lost == [signal.SIGCHLD]


def test_the_handler_stays_where_nothing_happens(lost: list[int]) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    with WholeStep():
        pass
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert not lost


def test_an_error_of_the_step_stands_before_a_lost_worker(lost: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), WholeStep():
        signal.raise_signal(signal.SIGCHLD)
        raise ZeroDivisionError
    assert not lost
