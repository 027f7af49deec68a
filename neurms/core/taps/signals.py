"""A tap that also shows D and H themselves, for as long as a firing lasts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from neurms.core.taps.accumulation import destination
from neurms.core.taps.hooks import HookTap
from neurms.core.taps.protocol import Sink

__all__ = ["ShowsSignals", "SignalSink", "SignalTap"]


@runtime_checkable
class SignalSink(Sink, Protocol):
    """Receives a layer's D and H besides their sums."""

    def signals(self, errors: Tensor, inputs: Tensor) -> None:
        """Look at D and H; called before :meth:`add` gets the sums of the same firing.

        Args:
            errors: D in the shape of the layer's output, neither unscaled nor to be written.
            inputs: H in the shape of the layer's input, not to be written.
        """

    def watching(self) -> AbstractContextManager[Any]:
        """Return a context manager in which all of the tap's own work is done."""


class ShowsSignals(HookTap):
    """What makes a tap hold H until D arrives, and show both; mixed into an engine's tap.

    ``enabled`` says whether forwards are observed; it is cheaper to change than hooks of a compiled
    module.
    """

    enabled = True
    _held: Tensor | None = None

    def observe(self, inputs: Any, outputs: Any, weight: Tensor | None = None) -> None:
        """Observe one product of ``inputs`` with the weight, unless switched off."""
        if not self.enabled:
            return
        sink = cast("SignalSink | None", self._sink())
        with nullcontext() if sink is None else sink.watching():
            self._held = inputs.detach() if isinstance(inputs, Tensor) else None
            try:
                super().observe(inputs, outputs, weight)
            finally:
                self._held = None

    def _on_errors(
        self, weight: Tensor, feature_sums: Tensor | None, feature_rows: int
    ) -> Callable[[Tensor], Tensor | None]:
        deliver = super()._on_errors(weight, feature_sums, feature_rows)
        inputs = self._held

        def show(errors: Tensor) -> Tensor | None:
            sink = cast("SignalSink | None", self._sink())
            if sink is None or inputs is None:
                return None
            with sink.watching():
                if destination(weight) == "grad":
                    sink.signals(errors.detach(), inputs)
                return deliver(errors)

        return show


class SignalTap(ShowsSignals):
    """A :class:`~neurms.core.taps.hooks.HookTap` that shows D and H besides their sums.

    Autograd holds H too, for the weight's gradient, so that this costs no memory except under a
    checkpoint. The hook stands *behind* the module's other forward hooks: where variant B rescales
    D, it sees the D that the weight's gradient is made of.

    Args:
        module: The layer.
        weight: The parameter that the layer multiplies H with.
        sink: Receives the signals and the sums.
        **settings: As for :class:`~neurms.core.taps.hooks.HookTap`.
    """

    def __init__(
        self, module: nn.Module, weight: Tensor, sink: SignalSink, **settings: Any
    ) -> None:
        if not isinstance(sink, SignalSink):
            raise TypeError(f"sink={sink!r} must have the methods signals and watching too")
        super().__init__(module, weight, sink, features=True, **settings)

    def attach(self) -> None:
        """Put the hook in place, behind the module's other forward hooks; again does nothing."""
        attached = self.attached
        super().attach()
        module = self._module()
        if not attached and module is not None and self._handle is not None:
            self._handle.remove()
            self._handle = module.register_forward_hook(self, with_kwargs=True)
