"""The optimizer behind every recipe: when parameters move, and what training loops expect.

It *has* parameter groups, a route for every parameter, and a mover for every rule. A subclass says
which settings it has and which :class:`~neurms.core.optimizers.recipe.Recipe` they make.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from neurms.compiled.backends import current_backend, use_backend
from neurms.core.ground.errors import NonFiniteError, check_real
from neurms.core.ground.interrupts import WholeStep
from neurms.core.ground.precision import compute_dtype, without_autocast
from neurms.core.ground.spans import gradients_ready
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.beside import ModelGroups
from neurms.core.optimizers.by_owner import OwnerMover
from neurms.core.optimizers.checkpoint import restore, verified
from neurms.core.optimizers.fallback import FallbackMover, fallback_rate
from neurms.core.optimizers.gradients import bad_names, hold_nothing, is_rehearsal
from neurms.core.optimizers.groups import Params, check_parameters, completed, parameters_of
from neurms.core.optimizers.made_by import MADE_BY, made_by
from neurms.core.optimizers.mover import Mover, Share
from neurms.core.optimizers.plan import Plan, PlanRow, meta_like, skeleton, tensor_bytes
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.recipes import Recipes, default_settings
from neurms.core.optimizers.settings import GROUP_SETTINGS, CommonSettings, check_common
from neurms.core.optimizers.sharing import Sharing
from neurms.core.optimizers.view import View, seed_of
from neurms.core.optimizers.work import Work, hand_over, meet
from neurms.core.routing import (
    FALLBACK,
    Head,
    Route,
    applies_to_nothing,
    check_patterns,
    excluded,
    movable,
    route_model,
    route_tensors,
)

__all__ = ["Params", "PreconditionedOptimizer"]

_BREAKS = "a step of neurms is not part of a graph; leave fullgraph=True off the step"


class PreconditionedOptimizer(torch.optim.Optimizer):
    """Base class: a recipe for matrices and AdamW for the rest, in one optimizer object.

    Subclasses set :attr:`rule` and implement :meth:`recipe`; their ``__init__`` passes its own
    settings (which become parameter-group entries that schedulers and users may change) and the
    common ones on to this class.

    Args:
        params: A model (routed by module kind), parameters, named parameters or parameter groups.
            A group may name another rule of the library under ``"rule"``, or ``"fallback"``.
        settings: The rule's own settings, ``lr`` among them.
        common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        TypeError: Unknown setting, complex or integer parameter, a value of the wrong type.
        ValueError: A setting out of its range, a pattern of ``exclude`` that matches nothing.
    """

    rule: ClassVar[str]
    default_head: ClassVar[Head] = "fallback"
    needs_modules: ClassVar[bool] = False
    """Whether the rule needs more than gradients, so that no group can ask for it by name."""
    pickled: ClassVar[tuple[str, ...]] = (
        "backend",
        "nonfinite",
        "low_precision",
        "skipped_steps",
        "routes",
        "exclude",
        "sharing",
    )
    """Attributes that go along when an optimizer is pickled or deep-copied."""

    routes: dict[Tensor, Route]
    """What happens to each parameter, and why."""

    def __init__(
        self, params: Params, settings: Mapping[str, Any], common: Mapping[str, Any]
    ) -> None:
        chosen = check_common(self.rule, common, self.default_settings())
        self.backend = chosen["backend"]
        self.nonfinite = chosen["nonfinite"]
        self.low_precision = chosen["low_precision"]
        self.sharing = Sharing(chosen["distribute"], chosen["process_group"])
        self.exclude = tuple(chosen["exclude"])
        self.skipped_steps = 0
        self.routes = {}
        self._begin()
        defaults: dict[str, Any] = {"rule": self.rule, **settings}
        defaults |= {key: value for key, value in chosen.items() if key in GROUP_SETTINGS}
        if isinstance(params, nn.Module):
            params = self._routed(params, chosen, defaults)
        elif chosen["groups"] is not None:
            raise TypeError(
                f"groups= goes beside a model, and params={type(params).__name__} is none; pass "
                "the model, or the groups themselves as params"
            )
        super().__init__(params, defaults)
        check_patterns(self.routes.values(), self.exclude)
        if idle := applies_to_nothing(self.rule, self.routes.values()):
            warn_user(idle)

    def _routed(
        self, model: nn.Module, chosen: CommonSettings, defaults: Mapping[str, Any]
    ) -> list[Any]:
        """Route a model and the groups beside it; return parameters or groups of them, named."""
        beside = ModelGroups.of(model, chosen["groups"], defaults, type(self))
        own, head = self.exclude, chosen["head"] or self.default_head
        # A rule that taps layers must not tap what a group gives to another one.
        self.exclude = (*own, *beside.apart(self.rule))
        routes = beside.routed(self.route(model, head), self.rule)
        self.exclude = own
        self.routes.update({route.parameter: route for route in routes})
        return beside.filled(routes)

    def _begin(self) -> None:
        """Make what neither copies nor pickles hold."""
        self._recipes = Recipes(type(self), by_rows=self.sharing.by_rows)
        self._movers: dict[str, Mover] = {}
        self._work: Work | None = None
        groups: list[dict[str, Any]] = getattr(self, "param_groups", [])
        self._known: list[list[Tensor]] = [list(group["params"]) for group in groups]

    # ---------------------------------------------------------------- parameters and groups

    def route(self, model: nn.Module, head: Head) -> Iterable[Route]:
        """Return the route of every parameter of a model."""
        return route_model(model, self.rule, head=head, exclude=self.exclude)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with settings of its own and possibly another rule.

        Args:
            param_group: As in ``torch.optim``; ``"rule"`` may name another rule of the library or
                ``"fallback"``.

        Raises:
            ValueError: A setting is out of its range, or a parameter comes twice; nothing was added
                in either case.
            TypeError: A parameter is no tensor, or complex, or integer.
        """
        group = self._completed(param_group)
        routes = self._new_routes(group)
        super().add_param_group(group)
        self.routes.update({route.parameter: route for route in routes})
        self._known.append(list(group["params"]))
        self._work = None

    def _completed(self, param_group: Any) -> dict[str, Any]:
        check_real("lr", self.defaults["lr"])
        rate = float(self.defaults["lr"]) or float(self.default_settings()["lr"])
        group = completed(param_group, self.rule, self.defaults, rate)
        if group["rule"] != FALLBACK:
            self.recipe_of(group)
        return group

    def _new_routes(self, group: Mapping[str, Any]) -> list[Route]:
        """Return routes for the parameters of a group that have none yet."""
        named = parameters_of(group)
        routes = [self.routes[p] for _, p in named if p in self.routes]
        if new := [(name, p) for name, p in named if p not in self.routes]:
            routes = self.route_parameters(new, group)
        check_parameters(routes, self.low_precision)
        if group["rule"] == FALLBACK:
            return routes
        recipe = self.recipe_of(group)
        self.sharing.check(routes, recipe, self.mover_of(group["rule"]))
        return [movable(route, recipe.least_units, recipe.least_features) for route in routes]

    def route_parameters(
        self, named: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[Route]:
        """Return the routes of parameters that come without their model."""
        if self.exclude and any(name is None for name, _ in named):
            raise ValueError(
                f"exclude={self.exclude!r} needs names; pass the model or model.named_parameters()"
            )
        start = len(self.routes)
        unnamed = ((name or f"param_{start + i}", p) for i, (name, p) in enumerate(named))
        routes = route_tensors(unnamed, group["rule"])
        # A pattern may be meant for another group; __init__ checks that each one matches somewhere.
        return excluded(routes, self.exclude, every=False)

    # ---------------------------------------------------------------- recipes and movers

    @classmethod
    @abstractmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a parameter group's settings make; raises on a bad setting."""

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """Return the defaults of the rule's own settings, from its constructor's signature."""
        return default_settings(cls)

    def recipe_of(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a parameter group under a rule."""
        return self._recipes.of(group)

    def checked_recipe(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a group's settings make; raises as the constructor would."""
        return self._recipes.checked(group)

    def mover_of(self, rule: str) -> Mover:
        """Return what moves the parameters that a rule, or the fallback, takes."""
        kind = FALLBACK if rule == FALLBACK else self.rule if rule == self.rule else ""
        if kind not in self._movers:
            self._movers[kind] = self._made_mover(kind)
        return self._movers[kind]

    def _made_mover(self, kind: str) -> Mover:
        return FallbackMover() if kind == FALLBACK else OwnerMover(self._recipes.of, self.sharing)

    @staticmethod
    def fallback_lr(group: Mapping[str, Any]) -> float:
        """Return AdamW's current rate; see :func:`~.fallback.fallback_rate`."""
        return fallback_rate(group)

    # ---------------------------------------------------------------- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss; called first, with gradients on.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            NonFiniteError: A gradient or statistic is NaN or infinite, or would make state so, and
                ``nonfinite="raise"``.
                Parameters and state are as they were before the call.
            SparseGradientError: A gradient is sparse.
        """
        arguments = () if closure is None else (closure,)
        if torch.compiler.is_dynamo_compiling():
            return _outside_of_graphs(self, *arguments)
        if _is_watched(self):
            return self._watched_step(*arguments)
        loss = self._step(*arguments)
        # A profiler that looks at few steps has no more than this.
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (self, *arguments), {})
        return loss

    # Keeps torch from wrapping it: its hooks and its profiler's span cost a tenth of a millisecond
    # where caches are cold, as they are after a backward pass, also when nobody listens.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as ``torch.optim`` does.

        Args:
            set_to_none: Drop them; False sets them to zero.
        """
        observed = torch.autograd.profiler._is_profiler_enabled
        if not set_to_none or observed or torch.compiler.is_dynamo_compiling():
            super().zero_grad(set_to_none)
            return
        # Without the span for a profiler, which takes longer than this where nobody listens.
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        recorded = torch.is_grad_enabled()
        # As torch.no_grad() does, in a third of the calls.
        torch.set_grad_enabled(False)
        try:
            gradients_ready()
            work = self.work()
            try:
                self.take(work.due())
            finally:
                work.release()
        finally:
            torch.set_grad_enabled(recorded)
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)

    def work(self) -> Work:
        """Return the views of all parameters, made anew where groups or parameters have changed."""
        if self._work is None or not self._work.holds(self):
            swapped = meet(self, self._known)
            self._known = [list(group["params"]) for group in self.param_groups]
            self._work = Work(self)
            hand_over(self, swapped)
        return self._work

    def take_part(self) -> None:
        """Take part in what other ranks exchange in a step, on a rank that has no batch for it."""

    def take(self, views: Sequence[View], first: Callable[[], None] | None = None) -> bool:
        """Move the parameters of ``views``, or return False and change nothing.

        Args:
            views: Parameters with their gradients.
            first: What is done before they move, if they do.

        Raises:
            NonFiniteError: A gradient is bad and ``nonfinite="raise"``.
        """
        self.sharing.assign(self, strict=True)
        if hold_nothing(views):
            self._rehearse(views, steps=1)
            return True
        if not any(self.state.values()) and is_rehearsal(views):
            self._rehearse(views, steps=0)
            return True
        views = self.sharing.met(self, views)
        shares, routes = self._shares(views), [view.route for view in views]
        for mover, own in shares:
            mover.prepare(own)
        if not all(map(is_, routes, [view.route for view in views])):
            # What a mover has learnt has changed one.
            shares = self._shares(views)
        judging = None if first is not None else self._judging(shares, views)
        others = [share for share in shares if share is not judging]
        unread = [view for _, own in others for view in own]
        if others and (bad := bad_names(unread, [mover for mover, _ in others])):
            self.on_nonfinite(bad)
            return False
        device = views[0].device if views else torch.device("cpu")
        try:
            with self._on_backend(), without_autocast(device), WholeStep():
                if judging is not None:
                    mover, own = judging
                    if mover.attempt(own):
                        shares = others
                    elif bad := bad_names(own, ()):
                        self.on_nonfinite(bad)
                        return False
                if first is not None:
                    first()
                self._make_states(views)
                self.move(shares)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NonFiniteError(
                "a statistic of finite gradients overflowed or became singular, and this step was "
                "broken off half done; load the last checkpoint, then lower lr or clip gradients"
            ) from error
        return True

    @staticmethod
    def _judging(shares: Sequence[Share], views: Sequence[View]) -> Share | None:
        """Return the share whose mover judges gradients as it moves, where all state is there."""
        mover, own = shares[-1] if shares else (None, ())
        # A step that is refused must not leave a new entry.
        if mover is None or not mover.judges(own) or not all([view.state for view in views]):
            return None
        return shares[-1]

    def _on_backend(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend == current_backend() else use_backend(self.backend)

    def move(self, shares: Sequence[Share]) -> None:
        """Take the step of parameters whose gradients are good."""
        for mover, views in shares:
            mover.move(views)

    def _shares(self, views: Sequence[View]) -> list[Share]:
        """Return the views of each mover, the fallback's first."""
        rules = [view.route.rule for view in views]
        # Rules are few, and a comprehension makes no call for a view.
        return [
            (self.mover_of(rule), [v for v, own in zip(views, rules, strict=True) if own == rule])
            for rule in dict.fromkeys((FALLBACK, *rules))
            if rule in rules
        ]

    def _make_states(self, views: Sequence[View]) -> None:
        for view in views:
            if not view.state:
                # Not sooner: a step that is refused leaves no entry.
                view.state = self.state[view.parameter]
                view.state.update(self.state_for(view.parameter, view.route, view.group))

    def _rehearse(self, views: Sequence[View], steps: int) -> None:
        """Make state and count steps, and move nothing."""
        self._make_states(views)
        for view in views:
            view.state["step"] += steps

    def on_nonfinite(self, names: Sequence[str]) -> None:
        """Leave a step out whose gradients or statistics are bad, or raise."""
        if self.nonfinite == "skip":
            self.skipped_steps += 1
            return
        raise NonFiniteError(
            f"the gradient of {', '.join(map(repr, names[:5]))} is NaN or infinite, or so large "
            "that what is kept of it would be; nothing was changed. "
            'Lower lr, clip gradients, or pass nonfinite="skip" to leave such steps out'
        )

    # ---------------------------------------------------------------- parameters that change

    def complete(self, group: dict[str, Any]) -> list[Route]:
        """Give a group that somebody wrote all settings; return routes of what is new in it."""
        for key, value in self._completed(group).items():
            group.setdefault(key, value)
        parameters = group["params"]
        if len(group.get("param_names", parameters)) != len(parameters) and all(
            parameter in self.routes for parameter in parameters
        ):
            # Somebody has divided a group, and not its names.
            group["param_names"] = [self.routes[parameter].name for parameter in parameters]
        routes = [r for r in self._new_routes(group) if r.parameter not in self.routes]
        if "param_names" not in group and any("param_names" in g for g in self.param_groups):
            known = {**self.routes, **{route.parameter: route for route in routes}}
            group["param_names"] = [known[p].name for p in group["params"]]
        return routes

    def replaced(self, old: Route, new: Route) -> None:
        """Be told that a parameter stands in another one's place, with its route."""

    def reroute(self, route: Route) -> None:
        """Give a parameter to another rule; it begins there without state."""
        self.routes[route.parameter] = route
        self.state.pop(route.parameter, None)
        self.work().view_of(route.parameter).reroute(route)

    # ---------------------------------------------------------------- state

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return fresh state for a parameter like ``like`` (which may be on the meta device)."""
        state = self.mover_of(route.rule).state_for(like, route, group)
        state = {**state, **self._seed(like, route, group), **self._master(like)}
        return self.sharing.kept(route.parameter, state)

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the keys and shapes that a checkpoint must hold for ``parameter``."""
        route = self.routes[parameter]
        state = self.mover_of(route.rule).expected_state(like, route, group, saved)
        # Checkpoints of earlier releases have none.
        seed = {"seed": seed_of(route, group)} if "seed" in saved else {}
        return {**state, **seed, **self._master(like)}

    def _seed(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, int]:
        """Return the seed of a parameter's draws where there are any; its name may change."""
        rounds = self.low_precision == "stochastic" and compute_dtype(like) != like.dtype
        draws = not route.is_fallback and "seed" in self._recipes.settings_of(group["rule"])
        return {"seed": seed_of(route, group)} if rounds or draws else {}

    def _master(self, like: Tensor) -> dict[str, Tensor]:
        if self.low_precision != "master" or compute_dtype(like) == like.dtype:
            return {}
        return {"master": like.detach().to(compute_dtype(like), copy=True)}

    def state_bytes(self) -> int:
        """Return the measured bytes of all optimizer state held right now."""
        return sum(tensor_bytes(state) for state in self.state.values())

    # ---------------------------------------------------------------- tables, copies, checkpoints

    def __format__(self, spec: str) -> str:
        """Return torch's text, and where Keras is in use what it takes instead.

        ``model.compile(optimizer=neurms.RACS(...))`` puts the optimizer into the error's message
        like this, and nothing else of that error is ours.
        """
        text = format(repr(self), spec)
        if "keras" not in sys.modules:
            return text
        cure = f"keras_optimizer({self.rule!r}, learning_rate={self.defaults['lr']!r})"
        return f"{text}\nKeras takes neurms.integrations.keras.{cure} instead"

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: torch's part and :attr:`pickled`."""
        own = {name: getattr(self, name) for name in self.pickled}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle; torch calls it for checkpoints, too."""
        super().__setstate__(state)
        self._begin()

    def plan(self) -> Plan:
        """Return the table of what happens to each parameter, with predicted state bytes."""
        rows = []
        self.sharing.assign(self)
        for view in self.work():
            parameter, route = view.parameter, view.route
            recipe = None if route.is_fallback else self.recipe_of(view.group)
            reason = route.reason + self.sharing.reason(parameter, recipe)
            state = self.state_for(meta_like(parameter), route, view.group)
            moves = parameter.requires_grad and not view.empty
            rows.append(
                PlanRow(
                    route.name,
                    route.kind,
                    route.rule,
                    reason if parameter.requires_grad else f"{reason} (frozen)",
                    tuple(parameter.shape),
                    tensor_bytes(state) if moves else 0,
                )
            )
        return Plan(rows)

    @classmethod
    def predict(cls, model: nn.Module, **settings: Any) -> Plan:
        """Return the plan that the rule would have for ``model``, which is left as it is.

        Args:
            model: The model; only shapes, dtypes and module kinds are read.
            **settings: The rule's settings and the common ones.

        Returns:
            One row for each distinct parameter.
        """
        make: Callable[..., PreconditionedOptimizer] = cls
        if not cls.needs_modules and settings.get("update") != "backward":
            return make(model, **settings).plan()
        # Constructing a rule that reads modules would put its taps on them.
        seen, groups = skeleton(model), settings.pop("groups", None)
        beside = None if groups is None else ModelGroups.of(model, groups).on(seen)
        return make(seen, **settings, groups=beside).plan()

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, and under ``"made_by"`` a note that nothing reads back.

        Every rank must call it where matrices have owners, whose state comes in even parts.
        Hooks of ``register_state_dict_post_hook`` get the note too, and what they make is returned.
        """
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = OrderedDict()
        try:
            saved = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        saved["state"] = self.sharing.spread(self, saved["state"])
        saved[MADE_BY] = made_by(self.backend)
        for hook in list(hooks.values()):
            changed = hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore settings and state exactly as saved, matching parameters by name where known.

        Hooks of ``register_load_state_dict_pre_hook`` and ``..._post_hook`` run before the check
        and after the restoration, and what they change counts.

        Args:
            state_dict: What :meth:`state_dict` returned, on any device, its groups in any order.

        Raises:
            CheckpointError: It belongs to another optimizer or model; nothing was changed.
        """
        self.work()
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.restore(self.verified(state_dict))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def verified(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict found to be this optimizer's, in the order of its groups.

        Raises:
            CheckpointError: It belongs to another optimizer or model.
        """
        return verified(self, state_dict)

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Take a verified state dict over."""
        self.sharing.assign(self)
        restore(self, state_dict)


@torch.compiler.disable(reason=_BREAKS)  # type: ignore[untyped-decorator]
def _outside_of_graphs(optimizer: PreconditionedOptimizer, *arguments: Any) -> Any:
    """Take a step as it is: a graph of torch.compile is broken there and goes on behind it."""
    return PreconditionedOptimizer.step(optimizer, *arguments)


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's profiler, or a hook other than the optimizer's own post hooks, is there."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )
