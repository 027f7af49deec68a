"""Kernels on lists of tensors: a single layer is a list of one.

A list kernel's definition is a loop over kernels of single tensors. The table of its forms:

===============  ==================================================================
``eager``        the loop
``inductor``     the loop over compiled forms; likewise ``torchscript``
``auto``         the items that the native form serves in one call of it, the rest by
                 the loop; all by the loop where the list is small as a whole
``prompt``       as ``auto``, however small the list
===============  ==================================================================

Where caches are cold, calls of Python cost more than small kernels: a list of ten layers takes
hardly more of them than a list of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from neurms.compiled._operators import operator
from neurms.compiled.backends import PROMPT, Kernel, running_on, without_grad
from neurms.compiled.native import LEAST_ELEMENTS, library

__all__ = ["ListKernel", "beside", "entries", "list_kernel"]

P = ParamSpec("P")
R = TypeVar("R")


class ListKernel(Kernel[P, R]):
    """A kernel whose first parameters are sequences of one length; made by :func:`list_kernel`."""

    def __init__(self, fn: Callable[P, R]) -> None:
        super().__init__(fn)
        parameters = inspect.signature(fn).parameters.values()
        self._columns = sum(str(p.annotation).startswith("Sequence") for p in parameters)
        self._loop: Callable[..., R] = running_on("eager", fn)
        self._serve: Callable[..., list[bool]] = lambda *columns: []

    def native(  # type: ignore[override]
        self, serve: Callable[..., list[bool]], graph: Callable[..., R] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a native form of this kernel, which takes the items that it serves.

        Args:
            serve: Says of the columns which items the native form serves.
            graph: What stands for a call in a graph; None makes one operator of the kernel.

        Returns:
            A decorator that returns the function it is given.
        """

        def register(form: Callable[..., Any]) -> Callable[..., Any]:
            self._native, self._serve = form, serve
            self._operator = graph or operator(self.eager, self._run_in_graph, (), None)
            return form

        return register

    def natively(self, *args: Any) -> bool:
        """Run the native form if it serves every item, and return whether it did what it should.

        For kernels that return nothing or a verdict, and for callers that have another way for what
        it does not serve than the loop.
        """
        if self._native is None or False in self._serve(*args[: self._columns]):
            return False
        if library() is None:
            return False
        return self._native(*args) is not False  # type: ignore[call-arg]

    def _run_in_graph(self, *args: Any) -> R:
        # An operator's results may not share their memory.
        return _apart(super()._run_in_graph(*args))  # type: ignore[no-any-return]

    def _make(self, backend: str) -> Callable[P, R]:
        if backend not in ("auto", PROMPT):
            return without_grad(running_on(backend, self.eager))
        least = 0 if backend == PROMPT else LEAST_ELEMENTS
        return without_grad(self._positional(partial(self._joint, least)))

    def _joint(self, least: int, *args: Any) -> R:
        if entries(args[0]) < least or self._native is None or library() is None:
            return self._loop(*args)
        columns = args[: self._columns]
        served = self._serve(*columns)
        if not served or True not in served:
            return self._loop(*args)
        if False not in served:
            return self._native(*args)  # type: ignore[call-arg]
        # The loop first: what it refuses, it refuses before anything is changed.
        results, places = [], []
        forms: list[tuple[Callable[..., R], bool]] = [(self._loop, False), (self._native, True)]
        for form, wanted in forms:
            place = [i for i, one in enumerate(served) if one is wanted]
            own = [[column[i] for i in place] for column in columns]
            results.append(form(*own, *args[self._columns :]))
            places.append(place)
        return _merged(results, places)  # type: ignore[no-any-return]


def _merged(results: Sequence[Any], places: Sequence[Sequence[int]]) -> Any:
    """Put the results of parts of a list back into its order."""
    first = results[0]
    if first is None:
        return None
    if isinstance(first, bool):
        return all(results)
    if isinstance(first, tuple):
        return tuple(_merged(part, places) for part in zip(*results, strict=True))
    order = torch.tensor([i for place in places for i in place], device="cpu").argsort()
    if isinstance(first, Tensor):
        return torch.cat(list(results))[order]
    joined = [item for part in results for item in part]
    return [joined[i] for i in order.tolist()]


def _apart(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone()
    return type(result)(_apart(part) for part in result)


_elsewhere: ContextVar[int] = ContextVar("_elsewhere", default=0)


@contextmanager
def beside(elsewhere: int) -> Iterator[None]:
    """Have forms of lists be chosen as for longer ones, of which other ranks have the rest.

    Args:
        elsewhere: Entries of what is not here.
    """
    token = _elsewhere.set(elsewhere)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def entries(items: Iterable[Tensor]) -> int:
    """Return the entries of a list, and of what other ranks have of it."""
    return sum(map(Tensor.numel, items)) + _elsewhere.get()


def list_kernel(fn: Callable[P, R]) -> ListKernel[P, R]:
    """Make a kernel of lists of its eager definition.

    Args:
        fn: A module-level function, annotated, whose leading parameters are ``Sequence``. It
            returns None, a bool, a tensor with one number an item, a list, or a tuple of lists.

    Returns:
        The kernel, callable like the function.
    """
    return ListKernel(fn)
