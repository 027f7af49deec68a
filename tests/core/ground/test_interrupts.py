"""Ctrl-C during a step: the step is done, then comes the interrupt."""

# Only a block of several statements shows that the later ones run.
# ruff: noqa: PT012

from __future__ import annotations

import signal
import threading

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
