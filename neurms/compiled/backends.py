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
* a graph cannot hold an answer that is a Python bool: ``inductor`` runs the eager definition of
  such a kernel, and of one marked by :meth:`Kernel.keep_eager_on_inductor`;
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
from neurms.compiled._operators import operator, returns_tensors

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "eager", "inductor", "torchscript")

PROMPT = "prompt"
"""``auto`` for a caller that knows it has large operands, too: native forms whatever the size.

For :meth:`Kernel.on` alone: whether a model is large is its owner's to say, not a user's."""

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
    if not isinstance(name, str) or name not in BACKENDS:
        choices = ", ".join(repr(choice) for choice in BACKENDS)
        raise ValueError(f"backend={name!r} is unknown; choose one of {choices}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every kernel called inside the ``with`` block, in this thread, on one backend.

    Args:
        name: ``"auto"`` (the default outside any block), ``"eager"``, ``"inductor"`` or
            ``"torchscript"``. ``"auto"`` is the native form where there is one that suits the
            operands, else the eager definition.

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
        self._fits: Callable[..., bool] = lambda *args: False
        self._operator: Callable[..., R] | None = None
        self._compiles = returns_tensors(fn)
        self._lock = threading.Lock()
        self._forms: dict[str, Callable[P, R]] = {}
        functools.update_wrapper(self, fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the current backend."""
        if torch.compiler.is_compiling():
            return self._traced(*args, **kwargs)
        return self.on(_backend.get())(*args, **kwargs)

    def _traced(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What stands for a call in a graph: off the CPU and without a native form, its insides."""
        if self._operator is None or kwargs or not all(_is_on_cpu(arg) for arg in args):
            return self.eager(*args, **kwargs)
        return self._operator(*args)

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
            if backend != PROMPT:
                validate_backend(backend)
            with self._lock:
                form = self._forms.setdefault(backend, self._make(backend))
        return form

    def _make(self, backend: str) -> Callable[P, R]:
        if backend == PROMPT and self._native is not None:
            return self._prompt(self._native, self._fits)
        if backend == "auto" and self._native is not None:
            return without_grad(self._positional(self._chosen))
        if backend == "torchscript":
            return without_grad(self._positional(_boxed(script(self.eager), self.eager)))
        if backend == "inductor" and self._compiles:
            return without_grad(self._positional(_boxed(self._inductor, self.eager)))
        return without_grad(self.eager)

    def keep_eager_on_inductor(self) -> None:
        """Run the eager definition on ``inductor``, for one that TorchInductor cannot compile."""
        self._compiles = False

    def native(
        self,
        suits: Callable[..., bool],
        mutates: tuple[str, ...] = (),
        fits: Callable[..., bool] | None = None,
        returns: str | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a native form of this kernel, which ``auto`` takes where ``suits(*args)``.

        Graphs of torch.compile then hold the kernel as one operator.

        Args:
            suits: Says whether the native form serves these operands; the eager one does else.
            mutates: Names of the arguments that the kernel writes into.
            fits: ``suits`` but for the operands' size, for :data:`PROMPT`.
            returns: Name of the argument that the kernel returns, if it returns one.

        Returns:
            A decorator that returns the function it is given.
        """

        def register(form: Callable[..., Any]) -> Callable[..., Any]:
            self._native, self._suits, self._fits = form, suits, fits or suits
            self._operator = operator(self.eager, self._run_in_graph, mutates, returns)
            return form

        return register

    def _run_in_graph(self, *args: Any) -> R:
        return cast(Callable[..., R], self.on("auto"))(*args)

    def _chosen(self, *args: Any) -> R:
        native: Callable[..., R] = self._native or self.eager
        return native(*args) if self._suits(*args) else cast(Callable[..., R], self.eager)(*args)

    def _prompt(self, native: Callable[..., R], fits: Callable[..., bool]) -> Callable[P, R]:
        """Return a form without layers of calls, which cost more than a small native kernel."""
        otherwise = without_grad(self._positional(self.eager))
        parameters = inspect.signature(self.eager).parameters
        length = len(parameters)
        defaults = tuple(p.default for p in parameters.values())
        needed = sum(default is inspect.Parameter.empty for default in defaults)

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            count = len(args)
            if kwargs or not needed <= count <= length:
                return otherwise(*args, **kwargs)
            whole: tuple[Any, ...] = (*args, *defaults[count:])
            form: Callable[..., R] = native if fits(*whole) else otherwise
            return form(*whole)

        return run

    def _positional(self, form: Callable[..., R]) -> Callable[P, R]:
        signature = inspect.signature(self.eager)
        names = tuple(signature.parameters)
        length = len(names)
        defaults = tuple(p.default for p in signature.parameters.values())
        needed = sum(default is inspect.Parameter.empty for default in defaults)

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            # Binding costs more than a small kernel.
            if not kwargs and needed <= len(args) <= length:
                return form(*args, *defaults[len(args) :])
            if needed <= len(args) and set(names[len(args) :]).issuperset(kwargs):
                rest = zip(names[len(args) :], defaults[len(args) :], strict=True)
                return form(*args, *[kwargs[k] if k in kwargs else v for k, v in rest])
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


def _is_on_cpu(arg: object) -> bool:
    if isinstance(arg, (list, tuple)):
        return all(_is_on_cpu(item) for item in arg)
    return not isinstance(arg, torch.Tensor) or arg.device.type == "cpu"


@functools.lru_cache(maxsize=1024)
def scalar(value: float) -> torch.Tensor:
    """Return a 0-d float64 tensor, made once for each value; nobody may write it."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _boxed(form: Callable[..., R], definition: Callable[..., Any]) -> Callable[..., R]:
    """Return a compiled form that takes numbers for tensors of no axes: they do not recompile."""
    parameters = inspect.signature(definition).parameters.values()
    tensors = ["Tensor" in str(parameter.annotation) for parameter in parameters]

    def run(*args: Any) -> R:
        pairs = zip(tensors, args, strict=True)
        return form(*[scalar(x) if boxed and isinstance(x, float) else x for boxed, x in pairs])

    return run


def running_on(backend: str, form: Callable[P, R]) -> Callable[P, R]:
    """Return ``form`` with the kernels that it calls on one backend."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _backend.set(backend)
        try:
            return form(*args, **kwargs)
        finally:
            _backend.reset(token)

    return run


def without_grad(form: Callable[P, R]) -> Callable[P, R]:
    """Return ``form`` run under no_grad, whose context costs more than a small kernel."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return form(*args, **kwargs)
        with torch.no_grad():
            return form(*args, **kwargs)

    return run


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
