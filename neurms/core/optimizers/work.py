"""The views of an optimizer's parameters, kept from step to step for as long as they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from neurms.core.ground.errors import SparseGradientError, UnsupportedTrainingError
from neurms.core.ground.precision import LowPrecision, compute_dtype
from neurms.core.ground.shards import placed_like
from neurms.core.optimizers.view import View
from neurms.core.routing import Route

__all__ = ["HasParameters", "Swapped", "Work", "hand_over", "meet"]

Group = dict[str, Any]


class HasParameters(Protocol):
    """What views are made of: an optimizer."""

    low_precision: LowPrecision
    routes: dict[Tensor, Route]
    param_groups: list[Group]
    state: Any

    def complete(self, group: Group) -> list[Route]:
        """Give a group that somebody wrote all settings; return routes of what is new in it."""

    def replaced(self, old: Route, new: Route) -> None:
        """Be told that a parameter stands in another one's place."""

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: Group, saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return state with the keys and shapes that a parameter must have."""


@dataclass(frozen=True)
class Members:
    """A parameter group as it was when its views were made."""

    group: Group
    parameters: list[Tensor]
    views: list[View]

    def hold(self, group: Group) -> bool:
        """Return whether a group is this one, and has the same parameters."""
        now = group["params"]
        return (
            group is self.group
            and len(now) == len(self.parameters)
            and all(map(is_, now, self.parameters))
        )


class Work:
    """The views of all parameters of an optimizer.

    Args:
        optimizer: The optimizer, whose groups all have routes (see :func:`meet`).
    """

    def __init__(self, optimizer: HasParameters) -> None:
        self._state = optimizer.state
        self._holders: list[Tensor] = []
        self._states: list[dict[str, Any]] = []
        self._members: list[Members] = []
        self._views: dict[int, View] = {}
        index = 0
        for group in optimizer.param_groups:
            views = []
            for parameter in group["params"]:
                route, state = optimizer.routes[parameter], self._state.get(parameter, {})
                low = optimizer.low_precision
                view = View(index, route, group, state, parameter, low)
                views.append(view)
                # By identity: a tensor's own hash is a call of Python's.
                self._views[id(parameter)] = view
                index += 1
            self._members.append(Members(group, list(group["params"]), views))

    def holds(self, optimizer: HasParameters) -> bool:
        """Return whether groups, parameters, their dtypes and devices are still the same."""
        groups, members = optimizer.param_groups, self._members
        return (
            self._state is optimizer.state
            and len(groups) == len(members)
            and all(map(Members.hold, members, groups))
        )

    def __iter__(self) -> Iterator[View]:
        return (view for members in self._members for view in members.views)

    @property
    def parameters(self) -> list[list[Tensor]]:
        """The parameters of each group."""
        return [members.parameters for members in self._members]

    def view_of(self, parameter: Tensor) -> View:
        """Return a parameter's view."""
        return self._views[id(parameter)]

    def current(self, parameter: Tensor) -> View:
        """Return a parameter's view with its state of now, where a step has not yet looked."""
        view = self._views[id(parameter)]
        view.state = self._state.get(parameter, {})
        if parameter.dtype is not view.kept or parameter.device != view.device:
            _follow(view)
        return view

    def due(self, gradients: Mapping[Tensor, Tensor] | None = None) -> list[View]:
        """Return the view of each non-empty parameter that has a gradient, which it holds then.

        Args:
            gradients: Parameter -> gradient; None for those in ``.grad``.

        Raises:
            SparseGradientError: A gradient is sparse.
        """
        due: list[View] = []
        self._look_at_states()
        for members in self._members:
            ascends = members.group["maximize"]
            parameters = [view.parameter for view in members.views]
            found = (
                [parameter.grad for parameter in parameters]
                if gradients is None
                else [gradients.get(parameter) for parameter in parameters]
            )
            there = [
                (view, gradient)
                for view, gradient in zip(members.views, found, strict=True)
                if gradient is not None and not view.empty
            ]
            for view, gradient in there:
                if gradient.layout is not torch.strided:
                    raise SparseGradientError(
                        f"the gradient of {view.route.name!r} is sparse; build the embedding with "
                        "sparse=False or give it to torch.optim.SparseAdam"
                    )
                parameter = view.parameter
                if parameter.dtype is not view.kept or parameter.device != view.device:
                    _follow(view)
                view.gradient = -gradient if ascends else gradient
            due += [view for view, _ in there]
        return due

    def _look_at_states(self) -> None:
        """Give views the states of now, if any has come, gone or been replaced."""
        state = self._state
        # By identity, in three calls for all: a tensor's own hash is a call of Python's.
        if (
            len(state) == len(self._states)
            and all(map(is_, state, self._holders))
            and all(map(is_, state.values(), self._states))
        ):
            return
        for view in self:
            view.state = state.get(view.parameter, {})
        self._holders, self._states = list(state), list(state.values())

    def release(self) -> None:
        """Let go of gradients, which a view must not keep alive."""
        for members in self._members:
            for view in members.views:
                view.gradient = view.parameter


def _follow(view: View) -> None:
    """Bring a parameter's state to the dtype and the device that its model has moved to."""
    parameter, before, now = view.parameter, view.dtype, compute_dtype(view.parameter)
    for key, value in view.state.items():
        if isinstance(value, Tensor):
            dtype = now if value.dtype is before else value.dtype
            view.state[key] = value.to(parameter.device, dtype)
    if parameter.dtype is now:
        view.state.pop("master", None)
    view.recipe = None
    view.look()


class Swapped(NamedTuple):
    """A parameter in the place of another one, in a group."""

    old: Route
    new: Route
    group: Group


def meet(optimizer: HasParameters, known: Sequence[Sequence[Tensor]]) -> list[Swapped]:
    """Route parameters that came by another way than ``add_param_group``.

    Lightning's finetuning callbacks write whole groups into ``param_groups``, and Accelerate puts
    sharded parameters in the place of those that the optimizer was built with.

    Args:
        optimizer: The optimizer.
        known: The parameters of each group as they were last.

    Returns:
        What was swapped, for :func:`hand_over`.

    Raises:
        UnsupportedTrainingError: Matrices have been flattened and put together.
    """
    swapped: list[Swapped] = []
    for position, group in enumerate(optimizer.param_groups):
        before = known[position] if position < len(known) else ()
        swapped += _swap(optimizer, group, before)
        _refuse_flattened(optimizer, group, before)
        for route in optimizer.complete(group):
            optimizer.routes[route.parameter] = route
    return swapped


def hand_over(optimizer: HasParameters, swapped: Iterable[Swapped]) -> None:
    """Give parameters that took the place of others the taps and the state of those.

    Args:
        optimizer: The optimizer, whose views are those of the new parameters already.
        swapped: What :func:`meet` has returned.
    """
    for old, new, group in swapped:
        optimizer.replaced(old, new)
        if state := optimizer.state.pop(old.parameter, None):
            expected = optimizer.expected_state(new.parameter, new.parameter, group, state)
            optimizer.state[new.parameter] = {
                key: placed_like(value, expected.get(key)) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }


def _refuse_flattened(optimizer: HasParameters, group: Group, before: Sequence[Tensor]) -> None:
    """Raise if one long vector has come in the place of several parameters, as ZeRO has it."""
    own = {id(p) for p in group["params"]}
    # What was swapped for a parameter of the same shape has no route any more.
    gone = [optimizer.routes[p] for p in before if p in optimizer.routes and id(p) not in own]
    flat = [p for p in group["params"] if p not in optimizer.routes and p.ndim == 1]
    lost = [route.name for route in gone if not route.is_fallback and route.parameter.ndim > 1]
    if flat and lost:
        raise UnsupportedTrainingError(
            f"the group that held {lost[0]!r} holds a vector of {flat[0].numel()} numbers in its "
            "place: flattened parameters (DeepSpeed's ZeRO, FSDP1, flat float32 masters) have lost "
            "the rows and columns that a rule works on; shard with "
            "torch.distributed.fsdp.fully_shard, or use DeepSpeed without ZeRO"
        )


def _swap(optimizer: HasParameters, group: Group, before: Sequence[Tensor]) -> Iterator[Swapped]:
    """Give parameters that took the place of others the routes of those."""
    if len(before) != len(group["params"]):
        return
    held = {id(p) for own in optimizer.param_groups for p in own["params"]}
    for old, new in zip(before, group["params"], strict=True):
        if new in optimizer.routes or id(old) in held or old.shape != new.shape:
            continue
        route = optimizer.routes.pop(old)
        optimizer.routes[new] = replace(route, parameter=new)
        yield Swapped(route, optimizer.routes[new], group)
