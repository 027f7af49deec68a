"""The derived forms of a kernel: TorchInductor's and TorchScript's."""

from __future__ import annotations

import functools
import importlib
import logging
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

_logger = logging.getLogger("neurms.compiled")
_warned_no_compiler = threading.Event()
_import_lock = threading.Lock()


@contextmanager
def _jit_deprecation_silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        yield


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether TorchInductor finds a C++ compiler (``CXX``, else its own search); asked once."""
    with _import_lock, _jit_deprecation_silenced():  # raised by torch's own modules, on import
        importlib.import_module("torch._inductor.compile_fx")
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _warn_no_compiler() -> None:
    if _warned_no_compiler.is_set():
        return
    _warned_no_compiler.set()
    warnings.warn(
        "backend='inductor' needs a C++ compiler and none was found, so the eager definitions run "
        "instead. Install one (for example `apt install g++`), or name it in the environment "
        "variable CXX, or choose backend='eager'.",
        RuntimeWarning,
        stacklevel=3,
    )


class InductorForm:
    """``torch.compile`` of one eager definition, with one cache per kind of call.

    TorchDynamo bounds the compilations per code object and then refuses. The number of axes, the
    dtypes, the layout in memory, axes of no or one element and which optional arguments are
    present are legitimate reasons to compile again, so each such combination gets a copy of the
    code object, and with it a bound of its own.
    """

    def __init__(self, eager: Callable[..., Any]) -> None:
        self.compilations = 0
        self._eager = eager
        self._variants: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        if not has_cpp_compiler():
            _warn_no_compiler()
            return self._eager(*args)
        key = tuple(_kind(arg) if isinstance(arg, Tensor) else type(arg) for arg in args)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._add_variant(key)
        # Detached, because TorchDynamo would fix the sizes of an nn.Parameter to each layer's own;
        # one that comes twice stays one, for it takes no two arguments of the same memory.
        detached = {id(arg): arg.detach() for arg in args if isinstance(arg, Tensor)}
        return variant(*[detached.get(id(arg), arg) for arg in args])

    def _add_variant(self, key: tuple[Any, ...]) -> Callable[..., Any]:
        with self._lock:
            if key not in self._variants:
                compiled = torch.compile(
                    _copy_function(self._eager), backend=self._compile, fullgraph=True, dynamic=True
                )
                self._variants[key] = _one_at_a_time(compiled)
            return self._variants[key]

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with self._lock:
            self.compilations += 1
        name = self._eager.__name__
        _logger.info("compiling %s (kept on disk for later runs)", name)
        start = time.perf_counter()
        compiled = compile_fx(graph, inputs)
        _logger.info("compiled %s in %.1f s", name, time.perf_counter() - start)
        return compiled


def _kind(t: Tensor) -> tuple[Any, ...]:
    # Sizes and strides of 0 and 1 are constants of a graph, all others are symbols.
    sizes = tuple([min(size, 2) for size in t.shape])
    strides = tuple([min(stride, 2) for stride in t.stride()])
    return t.dtype, t.device, sizes, strides, t.is_contiguous()


def _one_at_a_time(fn: Callable[..., Any]) -> Callable[..., Any]:
    # Threads that arrive together would each compile, and 8 of them exhaust TorchDynamo's bound.
    lock = threading.Lock()

    def call(*args: Any) -> Any:
        with lock:
            return fn(*args)

    return call


def _copy_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    source = cast(types.FunctionType, fn)
    copy = types.FunctionType(
        source.__code__.replace(), source.__globals__, source.__name__, source.__defaults__
    )
    return functools.update_wrapper(copy, source)


def script(fn: Callable[..., Any]) -> Callable[..., Any]:
    """TorchScript's form of an eager definition."""
    # Deprecated since torch 2.13, kept as the form that needs neither compiler nor warm-up.
    with _jit_deprecation_silenced():
        return cast(Callable[..., Any], torch.jit.script(fn))
