"""The seam through which a profiler sees where an optimizer's time goes.

The library's own code says *what* it is doing to *which* parameters::

    with span("reduce", [weight]):
        ...

Without an observer a span is one look at a global name and an empty context manager: about a tenth
of a microsecond, and no profiler has to replace a method to be told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

from torch import Tensor

__all__ = [
    "Observer",
    "SpanKind",
    "gradients_ready",
    "is_observed",
    "observed_by",
    "span",
    "spanned",
    "spanning",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

SpanKind: TypeAlias = Literal["reduce", "scale", "update", "bookkeeping"]
"""``"reduce"``: statistics are gathered; ``"scale"``: factors are formed or applied to something
that is not yet the weight, statistics gathered in the same pass included; ``"update"``: the pass
over the weight. The first two stand tightly around kernels, inside a ``"bookkeeping"`` for all that
calls them, checks and adds up."""


class Observer(Protocol):
    """Who is told of spans. Calls come from whatever thread does the work."""

    def span(
        self, kind: SpanKind, parameters: Sequence[Tensor] | None
    ) -> AbstractContextManager[None]:
        """Return a context manager around one piece of work.

        Args:
            kind: What is done.
            parameters: For which parameters, together; None means those of the span around it.
        """

    def gradients_ready(self) -> None:
        """Be told that gradients are complete and that nothing has scaled them yet."""


_NOTHING: AbstractContextManager[None] = nullcontext()
_observer: Observer | None = None


def span(
    kind: SpanKind, parameters: Sequence[Tensor] | None = None
) -> AbstractContextManager[None]:
    """Return a context manager that tells the observer, if there is one, of a piece of work.

    Example:
        >>> with span("reduce"):
        ...     pass
    """
    return _NOTHING if _observer is None else _observer.span(kind, parameters)


def spanning(
    kind: SpanKind, parameters: Sequence[Tensor] | None, call: Callable[..., _R], *args: Any
) -> _R:
    """Return ``call(*args)``, made in a span: one call of Python's instead of three.

    Example:
        >>> spanning("reduce", None, sum, [1, 2])
        3
    """
    if _observer is None:
        return call(*args)
    with _observer.span(kind, parameters):
        return call(*args)


def is_observed() -> bool:
    """Return whether anybody is told of spans, who wants to hear of layers one at a time."""
    return _observer is not None


def spanned(
    kind: SpanKind,
) -> Callable[[Callable[Concatenate[Any, _P], _R]], Callable[Concatenate[Any, _P], _R]]:
    """Make every call of a method a span of its object's ``weight``."""

    def decorate(
        method: Callable[Concatenate[Any, _P], _R],
    ) -> Callable[Concatenate[Any, _P], _R]:
        @functools.wraps(method)
        def spanning(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if _observer is None:
                return method(self, *args, **kwargs)
            with _observer.span(kind, [self.weight]):
                return method(self, *args, **kwargs)

        return spanning

    return decorate


def gradients_ready() -> None:
    """Tell the observer that ``.grad`` is complete; optimizers call it before they change any."""
    if _observer is not None:
        _observer.gradients_ready()


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Make ``observer`` the one that is told, and restore the one before it afterwards.

    There is one observer for the process, not one for each thread: backward passes run in threads
    of autograd's own.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before
