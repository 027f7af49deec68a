"""Ctrl-C waits for the end of an optimizer's step, so that no step is half done."""

from __future__ import annotations

import signal
import threading
from importlib import import_module
from types import FrameType, TracebackType
from typing import Self

__all__ = ["WholeStep"]

# What `signal` wraps: its wrappers turn numbers into enums, at ten times the price of the calls.
_plain = import_module("_signal")


class WholeStep:
    """A context that puts off ``KeyboardInterrupt`` until its end.

    A step writes a weight and its state one after the other; broken off in between, it would leave
    a model that no run has ever passed through. A second Ctrl-C breaks it off all the same. Only
    Python's own handler of SIGINT is stood in for, and only in the main thread, the one that
    signals reach: programs with a handler of their own keep it.

    Example:
        >>> import signal
        >>> done = []
        >>> try:
        ...     with WholeStep():
        ...         signal.raise_signal(signal.SIGINT)
        ...         done.append("all of the step")
        ... except KeyboardInterrupt:
        ...     done.append("and then the interrupt")
        >>> done
        ['all of the step', 'and then the interrupt']
    """

    __slots__ = ("_held", "_standing_in")

    def __enter__(self) -> Self:
        self._held = False
        self._standing_in = (
            threading.current_thread() is threading.main_thread()
            and _plain.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._standing_in:
            _plain.signal(signal.SIGINT, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            signal.default_int_handler(number, frame)
        self._held = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._standing_in:
            _plain.signal(signal.SIGINT, signal.default_int_handler)
        if self._held and error is None:
            raise KeyboardInterrupt
