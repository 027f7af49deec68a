"""The tapped layers of a model: their taps come and go together, and are judged together."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from torch import Tensor, nn

from neurms.compiled.finite import within
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError
from neurms.core.ground.warn import warn_user
from neurms.core.routing import Route
from neurms.core.taps.backward import BackwardUpdateTap, is_tapped_linear
from neurms.core.taps.guard import GradientGuard
from neurms.core.taps.hooks import HookTap, forget_compiled_graphs

__all__ = ["TapSet", "has_own_linear"]


class Layer(Protocol):
    """A layer with a tap, of which it is the sink."""

    route: Route
    weight: Tensor
    dirty: bool
    """Whether there is something that :meth:`clear` forgets."""

    @property
    def tap(self) -> HookTap | BackwardUpdateTap | None:
        """Its tap."""

    def clear(self) -> None:
        """Forget what no step has taken."""


class Owner(Protocol):
    """An optimizer or preconditioner, as a set of taps knows it."""

    nonfinite: Literal["raise", "skip"]


L = TypeVar("L", bound=Layer)
Held = TypeVar("Held", bound=Owner)


class TapSet(Generic[L, Held]):
    """Tapped layers, the guard of gradients beside them, and what backward has said of them.

    Args:
        owner: The optimizer or preconditioner; held weakly, so that it goes when its user lets go
            of it, and the taps with it.
    """

    def __init__(self, owner: Held) -> None:
        self.owner_ref = weakref.ref(owner)
        """Returns the owner while there is one: what hooks ask in every layer."""
        self._layers: dict[Tensor, L] = {}
        self._ids: set[int] = set()
        self._guard: GradientGuard | None = None
        self._guarded: list[Tensor] = []
        self._compiled = False
        self._bad: list[str] = []
        # In the order in which backward came by.
        self._updated: dict[str, None] = {}

    @property
    def owner(self) -> Held:
        """The optimizer or preconditioner."""
        owner = self.owner_ref()
        if owner is None:
            raise ReferenceError("the optimizer of these layers no longer exists")
        return owner

    def __iter__(self) -> Iterator[L]:
        return iter(self._layers.values())

    def of(self, weight: Tensor) -> L | None:
        """Return the layer of a weight, or None."""
        return self._layers.get(weight)

    # ------------------------------------------------------------- taps

    def hold(self, layers: Iterable[L], model: nn.Module, guarded: Iterable[Tensor]) -> None:
        """Take layers in, whose taps :meth:`put` puts in place.

        Args:
            layers: Layers, each with its tap.
            model: Holds them; if it is compiled, it is traced anew so that taps are seen.
            guarded: Parameters whose gradients nobody may change where others have none.
        """
        self._layers.update({layer.weight: layer for layer in layers})
        self._ids = {id(weight) for weight in self._layers}
        self._compiled = any(map(_is_compiled, model.modules()))
        self._guarded = list(guarded)

    def put(self) -> None:
        """Put all taps in place, or none; those that are there already stay."""
        missing = [layer.tap for layer in self if layer.tap is not None and not layer.tap.attached]
        try:
            for tap in missing:
                tap.attach()
        except BaseException:
            self.detach()
            raise
        if self._compiled and missing:
            forget_compiled_graphs()
        without = {x.weight for x in self if isinstance(x.tap, BackwardUpdateTap)}
        if without and self._guard is None:
            self._guard = GradientGuard(p for p in self._guarded if p not in without)

    def detach(self) -> None:
        """Remove every tap; layers go on with the statistics that they have."""
        for layer in self:
            if layer.tap is not None:
                layer.tap.detach()
        if self._compiled:
            forget_compiled_graphs()
        if self._guard is not None:
            self._guard.detach()
            self._guard = None

    def remove(self, layer: L) -> None:
        """Take a layer out and its tap off."""
        del self._layers[layer.weight]
        self._ids.discard(id(layer.weight))
        if layer.tap is not None:
            layer.tap.detach()

    def replace(self, old: Route, new: Route) -> L | None:
        """Have a layer follow its weight to the parameter in its place; return it without a tap."""
        layer = self._layers.get(old.parameter)
        if layer is not None:
            self.remove(layer)
            layer.route, layer.weight = new, new.parameter
            self._layers[new.parameter] = layer
            self._ids.add(id(new.parameter))
        return layer

    def unformed(self) -> dict[str, int]:
        """Return the names of weights whose gradients are never formed, and the bytes of those."""
        return {
            layer.route.name: layer.weight.numel() * layer.weight.element_size()
            for layer in self
            if isinstance(layer.tap, BackwardUpdateTap) and layer.weight.requires_grad
        }

    # ------------------------------------------------------------- what backward does

    @property
    def updated(self) -> list[str]:
        """Names of the layers that backward has updated since the last step."""
        return list(self._updated)

    def clear(self) -> None:
        """Drop what no step has taken, and let backward updates begin anew."""
        self._bad.clear()
        self._updated.clear()
        # After each step and once more in zero_grad: layers that have seen nothing cost no call.
        for layer in self._layers.values():
            if layer.dirty:
                layer.clear()
            tap = layer.tap
            if tap is not None and tap.used:
                tap.rearm()

    def forget(self) -> None:
        """As :meth:`clear`, along with gradients."""
        self.clear()
        if self._guard is not None:
            self._guard.forget()

    def check_use(self, layers: Iterable[L], moving: Collection[int]) -> None:
        """Raise if somebody needs a gradient that is never formed.

        Args:
            layers: Layers of this step.
            moving: Identities of the parameters that have a gradient in it.

        Raises:
            UnsupportedTrainingError: Gradients were changed, or a weight used outside its layer.
        """
        if self._guard is not None:
            self._guard.check()
        for layer in layers if self._updated and not self._ids.isdisjoint(moving) else ():
            if id(layer.weight) in moving and layer.route.name in self._updated:
                raise UnsupportedTrainingError(
                    f"weight {layer.route.name!r} was updated during backward and has a gradient "
                    'too: it is used outside its layer, which update="backward" cannot see; use '
                    'update="step"'
                )

    def bad_names(self) -> list[str]:
        """Return the layers whose update was left out."""
        return list(self._bad)

    def warn_of_dropped(self, names: Sequence[str]) -> None:
        """Warn of averages that hold a gradient which somebody drops, if there are any."""
        if names:
            warn_user(
                f"zero_grad() came before step(), and the average of {names[0]!r} holds the "
                'gradient that it drops: update="backward" adds to it during backward'
            )

    def accepts(self, layer: L, seen: Sequence[Tensor], bounds: Sequence[float]) -> bool:
        """As :meth:`judges`, of what shows whether D and H are finite.

        Args:
            layer: The layer.
            seen: What shows it.
            bounds: What the entries of each may be at most.
        """
        return self.judges(layer, within(seen, bounds))

    def judges(self, layer: L, good: bool) -> bool:
        """Return whether a layer may be updated in backward.

        Args:
            layer: The layer.
            good: Whether its D and H are.

        Raises:
            NonFiniteError: They are not and ``nonfinite`` is ``"raise"``; names what was updated
                before.
        """
        name = layer.route.name
        if good:
            self._updated[name] = None
            return True
        if self.owner.nonfinite == "skip":
            self._bad.append(name)
            return False
        before = ", ".join(self._updated) or "no layer"
        self.clear()
        for other in self:
            if isinstance(other.tap, BackwardUpdateTap):
                other.tap.abandon()
        raise NonFiniteError(
            f"the error signal or input of {name!r} is NaN or infinite; it was left as it was, but "
            f'update="backward" had already updated in this pass: {before}. Lower lr, or use '
            'update="step", which checks everything before it changes anything'
        )


def has_own_linear(route: Route) -> bool:
    """Return whether a rule takes the very weight that an ``nn.Linear`` multiplies with.

    Of that class exactly: nobody knows what a subclass does with its weight.
    """
    module = route.module
    if module is None or route.is_fallback or route.parameter.ndim != 2:
        return False
    # A subclass may be one that a dead optimizer's tap has left behind.
    linear = type(module) is nn.Linear or is_tapped_linear(module)
    return linear and module._parameters.get("weight") is route.parameter


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
