"""How a kernel runs: eager, TorchInductor or TorchScript, behind one call.

A kernel has one definition, a plain function of tensors, and that definition is its specification.
The other forms are derived from it: ``inductor`` is ``torch.compile`` of it, ``torchscript`` is
``torch.jit.script`` of it. Nothing here holds state, modules or parameters.

What this file promises:

* a learning rate, a step count or a schedule never recompiles: they enter as 0-d tensors;
* sizes are symbolic from the first compilation, so a new batch size recompiles at most once;
* ``auto`` runs the native form of a kernel (:meth:`Kernel.native`) where it has one that suits the
  operands, else the eager definition; the choice depends on shapes and dtypes alone;
* there is one silent-proof fallback: ``inductor`` without a C++ compiler warns once, naming the
  cure, and runs the eager definition. Every other failure is raised;
* kernels may be called from any thread. A context variable does not follow into the threads of
  autograd, so code in a backward hook fixes its choice with :meth:`Kernel.on`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

from neurms.compiled._forms import InductorForm, script

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "eager", "inductor", "torchscript")

_backend: ContextVar[str] = ContextVar("neurms_backend", default="auto")


def validate_backend(name: str) -> str:
    """Check a backend's name where it enters.

    Args:
        name: One of ``BACKENDS``.

    Returns:
        The same name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in BACKENDS:
        choices = ", ".join(repr(choice) for choice in BACKENDS)
        raise ValueError(f"backend={name!r} is unknown; choose one of {choices}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every kernel called inside the ``with`` block, in this thread, on one backend.

    Args:
        name: ``"auto"`` (the default outside any block), ``"eager"``, ``"inductor"`` or
            ``"torchscript"``. ``"auto"`` is the eager definition: it needs no warm-up, and eager's
            row tiles already keep its temporaries in cache.

    Yields:
        Nothing.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> import torch
        >>> from neurms.compiled import column_square_sum, use_backend
        >>> with use_backend("torchscript"):
        ...     column_square_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([10., 20.])
    """
    token = _backend.set(validate_backend(name))
    try:
        yield
    finally:
        _backend.reset(token)


def current_backend() -> str:
    """Name of the backend that a kernel called here and now runs on."""
    return _backend.get()


class Kernel(Generic[P, R]):
    """A function of tensors with interchangeable backends; made by :func:`kernel`.

    Calling it runs the current backend (:func:`use_backend`). Gradients are never recorded:
    kernels serve statistics and updates, which nobody differentiates, and a fixed grad mode keeps
    a double backward from triggering a compilation.

    Attributes:
        eager: The plain definition.
    """

    def __init__(self, fn: Callable[P, R]) -> None:
        self.eager = fn
        self._inductor = InductorForm(fn)
        self._native: Callable[P, R] | None = None
        self._suits: Callable[..., bool] = lambda *args: False
        self._lock = threading.Lock()
        self._forms: dict[str, Callable[P, R]] = {}
        functools.update_wrapper(self, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the current backend."""
        if torch.compiler.is_compiling():
            return self.eager(*args, **kwargs)
        return self.on(_backend.get())(*args, **kwargs)

    def on(self, backend: str) -> Callable[P, R]:
        """The form that runs on one backend, whatever the context and the thread.

        Args:
            backend: One of ``BACKENDS``.

        Returns:
            A callable with the kernel's signature.

        Raises:
            ValueError: If the backend is unknown.
        """
        form = self._forms.get(backend)
        if form is None:
            validate_backend(backend)
            with self._lock:
                form = self._forms.setdefault(backend, self._make(backend))
        return form

    def _make(self, backend: str) -> Callable[P, R]:
        if backend == "auto" and self._native is not None:
            return torch.no_grad()(self._positional(self._chosen))
        if backend == "torchscript":
            return torch.no_grad()(script(self.eager))
        if backend == "inductor":
            return torch.no_grad()(self._positional(self._inductor))
        return torch.no_grad()(self.eager)

    def native(
        self, suits: Callable[..., bool]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a native form of this kernel, which ``auto`` takes where ``suits(*args)``.

        Args:
            suits: Says whether the native form serves these operands; the eager one does else.

        Returns:
            A decorator that returns the function it is given.
        """

        def register(form: Callable[..., Any]) -> Callable[..., Any]:
            self._native, self._suits = form, suits
            return form

        return register

    def _chosen(self, *args: Any) -> R:
        native: Callable[..., R] = self._native or self.eager
        return native(*args) if self._suits(*args) else cast(Callable[..., R], self.eager)(*args)

    def _positional(self, form: Callable[..., R]) -> Callable[P, R]:
        signature = inspect.signature(self.eager)
        length = len(signature.parameters)

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) == length:
                return form(*args)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return form(*bound.args)

        return run

    def __reduce__(self) -> str:
        """Pickle and deep-copy by name: a model whose hooks hold a kernel stays copyable."""
        return self.__name__  # type: ignore[attr-defined,no-any-return]

    def __repr__(self) -> str:
        """The kernel's name and signature home."""
        return f"<kernel {self.__module__}.{self.__name__}>"  # type: ignore[attr-defined]


def kernel(fn: Callable[P, R]) -> Kernel[P, R]:
    """Make a kernel of its eager definition.

    Args:
        fn: A module-level function of tensors, optional tensors and numbers, annotated, within
            the subset of Python that ``torch.jit.script`` accepts.

    Returns:
        The kernel, callable like the function.
    """
    return Kernel(fn)


def compilations(kernel: Kernel[..., Any]) -> int:
    """How many graphs TorchInductor has been handed for a kernel in this process.

    Args:
        kernel: Any kernel.

    Returns:
        The count; 0 as long as the kernel has not run on ``"inductor"``.
    """
    return kernel._inductor.compilations
