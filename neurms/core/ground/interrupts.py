"""Ctrl-C and lost workers wait for the end of an optimizer's step, so that no step is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from importlib import import_module
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["WholeStep"]

# What `signal` wraps: its wrappers turn numbers into enums, at ten times the price of the calls.
_plain = import_module("_signal")

_CHILD: Any = getattr(signal, "SIGCHLD", None)
"""What a process is sent whose child has ended; Windows has no such signal."""


class WholeStep:
    """A context that puts off ``KeyboardInterrupt`` until its end, and what a lost child raises.

    A step writes a weight and its state one after the other; broken off in between, it would leave
    a model that no run has ever passed through. A second Ctrl-C breaks it off all the same. Only
    Python's own handler of SIGINT is stood in for, and only in the main thread, the one that
    signals reach: programs with a handler of their own keep it.

    Where SIGCHLD has a handler, it is called at the end: torch's ``DataLoader`` sets one that
    raises as soon as a worker of it has died, wherever the main thread is.

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

    __slots__ = ("_held", "_lost", "_on_child", "_standing_in")

    _on_child: Callable[[int, FrameType | None], object] | None

    def __enter__(self) -> Self:
        self._held = self._lost = self._standing_in = False
        self._on_child = None
        if threading.current_thread() is threading.main_thread():
            self._standing_in = _plain.getsignal(signal.SIGINT) is signal.default_int_handler
            if self._standing_in:
                _plain.signal(signal.SIGINT, self._hold)
            handler = None if _CHILD is None else _plain.getsignal(_CHILD)
            if callable(handler):
                self._on_child = handler
                _plain.signal(_CHILD, self._lose)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            signal.default_int_handler(number, frame)
        self._held = True

    def _lose(self, number: int, frame: FrameType | None) -> None:
        self._lost = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._standing_in:
            _plain.signal(signal.SIGINT, signal.default_int_handler)
        if self._on_child is not None:
            _plain.signal(_CHILD, self._on_child)
            if self._lost and error is None and not self._held:
                self._on_child(_CHILD, None)
        if self._held and error is None:
            raise KeyboardInterrupt
