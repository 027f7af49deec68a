"""Taps for Keras layers: the activation is swapped, since that is where Z passes.

A Keras layer applies its activation itself, so that a hook on its output would see dL/dA of a fused
``Dense(..., activation="relu")``. Even ``activation=None`` is a call of ``linear``. While a tap is
attached, ``layer.activation`` is a function that shows Z to the tap before it does what it did, and
``layer.call`` one that tells the tap H; nothing else of the layer changes, and nothing stays when
the tap goes.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from neurms.core.taps.hooks import HookTap
from neurms.core.taps.protocol import Sink
from neurms.integrations.keras.layout import kernel_activity

__all__ = ["ActivationTap"]

_BREAKS = "a neurms tap reads real tensors"
_ABSENT = object()
_Function: TypeAlias = "Callable[[Tensor], Tensor]"


class ActivationTap(HookTap):
    """A :class:`~neurms.core.taps.hooks.HookTap` that sees Z where a Keras layer activates it.

    The first activation within a call of the layer counts. ``keras.RematScope("activations")`` has
    backward activate the same Z again, outside of any call; that is the same D.

    Args:
        layer: The Keras layer under the rule.
        weight: Its kernel.
        sink: Receives its sums.
        features: Whether H is observed too.
        backend: How the reductions run.
    """

    def __init__(
        self, layer: Any, weight: Tensor, sink: Sink, *, features: bool, backend: str = "auto"
    ) -> None:
        super().__init__(
            layer.torch_params,
            weight,
            sink,
            activity=kernel_activity(layer),
            features=features,
            backend=backend,
        )
        self._layer = weakref.ref(layer)
        self._replaced: dict[str, Any] = {}
        self._inputs: Any = _ABSENT

    @property
    def attached(self) -> bool:
        """Whether the layer calls this tap."""
        return bool(self._replaced)

    def attach(self) -> None:
        """Stand in for the layer's activation and call; again does nothing."""
        layer = self._layer()
        if layer is None:
            raise ReferenceError("the tapped layer no longer exists; build a new optimizer")
        if self.attached:
            return
        stand_ins: dict[str, Any] = {
            "activation": self._activation(layer.activation),
            "call": self._call(layer.call),
        }
        own = vars(layer)
        self._replaced = {name: own.get(name, _ABSENT) for name in stand_ins}
        # Not setattr, which would have Keras track, and torch register, what is only lent.
        own.update(stand_ins)

    def detach(self) -> None:
        """Put back what the layer had; graphs recorded already still deliver."""
        layer = self._layer()
        replaced, self._replaced, self._inputs = self._replaced, {}, _ABSENT
        if layer is None:
            return
        own = vars(layer)
        for name, value in replaced.items():
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value

    @torch.compiler.disable(reason=_BREAKS)
    def see(self, outputs: Tensor) -> None:
        """Observe Z, with the H of the call that computed it; without a call it was seen before."""
        inputs, self._inputs = self._inputs, _ABSENT
        if inputs is not _ABSENT:
            self.observe(inputs, outputs)

    def _activation(self, original: _Function | None) -> _Function:
        tap = self

        def activation(outputs: Tensor) -> Tensor:
            tap.see(outputs)
            return outputs if original is None else original(outputs)

        # A copy of the name: a layer that is saved in the meantime saves its own activation.
        named = isinstance(original, types.FunctionType)
        return functools.wraps(original)(activation) if named and original else activation

    def _call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        tap = self

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if args else kwargs.get("inputs")
            tap._inputs = inputs if tap.features else None
            return original(*args, **kwargs)

        return call
