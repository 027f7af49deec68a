"""The optimizer behind every recipe: routing, state, fallback, checks and checkpoints.

A subclass says which settings it has and which :class:`Recipe` they make; everything that a
training loop expects of a ``torch.optim.Optimizer`` is done here once.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from neurms.compiled.backends import use_backend
from neurms.core.diagnostics.spans import gradients_ready, span
from neurms.core.distributed.shards import (
    is_sharded,
    local,
    local_state,
    own_part,
    row_shard,
    wrapped_rows,
)
from neurms.core.errors import NonFiniteError, check_kinds, check_real
from neurms.core.interrupts import WholeStep
from neurms.core.layout import Layout
from neurms.core.optimizers.checkpoint import restore, verified
from neurms.core.optimizers.fallback import adamw_state, adamw_update_
from neurms.core.optimizers.plan import Plan, PlanRow, meta_like, skeleton, tensor_bytes
from neurms.core.optimizers.recipe import FusedStep, Recipe
from neurms.core.optimizers.settings import GROUP_SETTINGS, check_common, check_group
from neurms.core.optimizers.work import (
    BATCH_LIMIT,
    Item,
    batches,
    gathered,
    is_rehearsal,
    nonfinite_names,
    shard_for,
    updates_of,
)
from neurms.core.precision import compute_dtype, without_autocast, write_
from neurms.core.routing import (
    FALLBACK,
    Head,
    Route,
    check_patterns,
    excluded,
    route_model,
    route_tensors,
)
from neurms.core.structures.base import Context

__all__ = ["Params", "PreconditionedOptimizer"]

Params: TypeAlias = (
    "nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]"
)


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
        "_routes",
        "_exclude",
    )
    """Attributes that go along when an optimizer is pickled or deep-copied."""

    def __init__(
        self, params: Params, settings: Mapping[str, Any], common: Mapping[str, Any]
    ) -> None:
        chosen = check_common(self.rule, common)
        self.backend = chosen["backend"]
        self.nonfinite = chosen["nonfinite"]
        self.low_precision = chosen["low_precision"]
        self.skipped_steps = 0
        self._routes: dict[Tensor, Route] = {}
        self._exclude = chosen["exclude"]
        self._recipes: dict[Any, Recipe] = {}
        defaults: dict[str, Any] = {"rule": self.rule, **settings}
        defaults |= {key: value for key, value in chosen.items() if key in GROUP_SETTINGS}
        if isinstance(params, nn.Module):
            for route in self._route(params, chosen["head"] or self.default_head):
                self._routes[route.parameter] = route
            params = [(route.name, p) for p, route in self._routes.items()]
        super().__init__(params, defaults)
        check_patterns(self._routes.values(), self._exclude)

    @classmethod
    @abstractmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a parameter group's settings make; raises on a bad setting."""

    # ---------------------------------------------------------------- parameters and groups

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
        if group["rule"] != FALLBACK:
            self._recipe(group)
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"params holds {tensor!r}, a {type(tensor).__name__}; pass tensors")
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError("params holds a parameter twice; pass each parameter once")
        routes = self._routes_of(group)
        for route in routes:
            self._check_dtype(route)
        super().add_param_group(group)
        self._routes.update({route.parameter: route for route in routes})

    def _check_dtype(self, route: Route) -> None:
        dtype = route.parameter.dtype
        if not dtype.is_floating_point:
            raise TypeError(
                f"parameter {route.name!r} has dtype {dtype}; only real floating dtypes can be "
                "preconditioned, give complex or integer ones to another optimizer"
            )
        if dtype == torch.float16 and self.low_precision == "stochastic":
            raise ValueError(
                f"low_precision='stochastic' rounds to bfloat16, and parameter {route.name!r} is "
                "float16; choose 'master' or 'nearest'"
            )

    def _completed(self, param_group: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group={param_group!r} must be a dictionary with 'params'")
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif isinstance(group["params"], set):
            raise TypeError("params must have an order that is the same in every run; pass a list")
        else:
            group["params"] = list(group["params"])
        group.setdefault("rule", self.rule)
        if group["rule"] not in (self.rule, FALLBACK):
            from neurms.core.optimizers.registry import optimizer_class

            for key, value in optimizer_class(group["rule"]).default_settings().items():
                group.setdefault(key, value)
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        check_real("lr", group["lr"])
        check_group(group)
        group.setdefault("base_lr", float(group["lr"]))
        return group

    def _route(self, model: nn.Module, head: Head) -> list[Route]:
        return route_model(model, self.rule, head=head, exclude=self._exclude)

    def _routes_of(self, group: dict[str, Any]) -> list[Route]:
        named = [p if isinstance(p, tuple) else (None, p) for p in group["params"]]
        known = [self._routes[p] for _, p in named if isinstance(p, Tensor) and p in self._routes]
        if len(known) == len(named):
            return known
        if self._exclude and any(name is None for name, _ in named):
            raise ValueError(
                f"exclude={self._exclude!r} needs names; pass the model or model.named_parameters()"
            )
        start = len(self._routes)
        routes = route_tensors(
            ((name or f"param_{start + i}", p) for i, (name, p) in enumerate(named)), group["rule"]
        )
        # A pattern may be meant for another group; __init__ checks that each one matches somewhere.
        return excluded(routes, self._exclude, every=False)

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """Return the defaults of the rule's own settings, from its constructor's signature."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def _recipe(self, group: Mapping[str, Any]) -> Recipe:
        """Return the group's recipe, made anew only when a setting has changed."""
        maker = self._maker(group["rule"])
        names = self.defaults if maker is type(self) else _setting_names(group["rule"])
        values = [group.get(name) for name in names if name != "lr"]
        key = (maker, *(tuple(v) if isinstance(v, list) else v for v in values))
        try:
            made = self._recipes.get(key)
        except TypeError:
            made = None
        if made is None:
            made = self.checked_recipe(group)
            if len(self._recipes) > 64:
                self._recipes.clear()
            self._recipes[key] = made
        return made

    def checked_recipe(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a group's settings make; raises as the constructor would."""
        maker: Any = self._maker(group["rule"])
        defaults, optional = _setting_kinds(maker)
        check_kinds(defaults, group, optional)
        recipe: Recipe = maker.recipe(group)
        return recipe

    def _maker(self, rule: str) -> type[PreconditionedOptimizer]:
        if rule == self.rule:
            return type(self)
        from neurms.core.optimizers.registry import optimizer_class

        maker = optimizer_class(rule)
        if maker.needs_modules:
            raise ValueError(
                f"rule={rule!r} reads what modules compute, which a parameter group does not show; "
                f"use neurms.{maker.__name__}(model)"
            )
        return maker

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
            TypeError: A gradient is sparse.
        """
        arguments = () if closure is None else (closure,)
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

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients_ready()
        self._take(gathered(self.param_groups, self._routes))
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)

    def take_part(self) -> None:
        """Take part in what other ranks exchange in a step, on a rank that has no batch for it."""

    def _take(self, items: Sequence[Item]) -> bool:
        """Update the items' parameters, or return False and change nothing for a bad gradient."""
        if not self.state and is_rehearsal(items):
            self._prepare(items)
            return True
        if bad := self._bad_names(items):
            self._on_nonfinite(bad)
            return False
        device = items[0].parameter.device if items else torch.device("cpu")
        try:
            with use_backend(self.backend), without_autocast(device), WholeStep():
                self._update(items)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NonFiniteError(
                "a statistic of finite gradients overflowed or became singular, and this step was "
                "broken off half done; load the last checkpoint, then lower lr or clip gradients"
            ) from error
        return True

    def _bad_names(self, items: Sequence[Item]) -> list[str]:
        return nonfinite_names(items, self._greatest(items))

    def _greatest(self, items: Sequence[Item]) -> list[float]:
        """Return how large each gradient may be; AdamW's may overflow as they do in torch."""
        groups = {id(item.group): item.group for item in items if item.rule != FALLBACK}
        recipes = {key: self._recipe(group) for key, group in groups.items()}
        return [
            math.inf if item.rule == FALLBACK else recipes[id(item.group)].greatest(item.parameter)
            for item in items
        ]

    def _on_nonfinite(self, names: Sequence[str]) -> None:
        if self.nonfinite == "skip":
            self.skipped_steps += 1
            return
        raise NonFiniteError(
            f"the gradient of {', '.join(map(repr, names[:5]))} is NaN or infinite, or so large "
            "that what is kept of it would be; nothing was changed. "
            'Lower lr, clip gradients, or pass nonfinite="skip" to leave such steps out'
        )

    def _update(self, items: Sequence[Item]) -> None:
        self._prepare(items)
        fallback = [item for item in items if item.rule == FALLBACK]
        self._update_fallback(fallback)
        self._update_rule([item for item in items if item.rule != FALLBACK])

    def _prepare(self, items: Sequence[Item]) -> None:
        """Make the state of parameters that move for the first time."""
        for item in items:
            if not self.state[item.parameter]:
                self.state[item.parameter].update(self._new_state(item.parameter, item.group))

    def _update_rule(self, items: Sequence[Item]) -> None:
        if rest := [item for item in items if not self._moves_at_once(item)]:
            self._update_by_transforms(rest)

    def _update_by_transforms(self, items: Sequence[Item]) -> None:
        made = {id(item.group): self._recipe(item.group) for item in items}
        recipes = [made[id(item.group)] for item in items]
        for recipe, alike in batches(items, recipes, self.state):
            states = [self.state[item.parameter] for item in alike]
            for state in states:
                state["step"] += 1
            # Not sooner: matrices that are gathered would all be whole at once.
            batch = [item.placed(recipe, s) for item, s in zip(alike, states, strict=True)]
            if batch[0].begun:
                _, recipe = recipe.parts
            with span("scale", [item.parameter for item in batch]):
                gradients = [self._matrix(item, item.gradient) for item in batch]
                updates = updates_of(recipe, batch, gradients, states)
            for item, update in zip(batch, updates, strict=True):
                with span("update", [item.parameter]):
                    self._apply(item, recipe, update)

    def _moves_at_once(self, item: Item) -> bool:
        """Take a large matrix's step by its recipe's fused form; return whether it could."""
        parameter = item.parameter
        if parameter.numel() < BATCH_LIMIT:
            return False
        recipe = self._recipe(item.group)
        if recipe.fused is None:
            return False
        if is_sharded(parameter):
            if not recipe.row_local or row_shard(parameter, item.route.layout) is None:
                return False
            with span("update", [parameter]):
                moved = self._fused(recipe.fused, item.placed(recipe, self.state[parameter]))
            if not moved:
                # A rank without rows sums along with the others, in the same order as they.
                self._update_by_transforms([item])
            return True
        with span("update", [parameter]):
            return self._fused(recipe.fused, item)

    def _fused(self, fused: Callable[[FusedStep], None], item: Item) -> bool:
        target = self._target(item)
        weight = self._matrix(item, target)
        if weight is not target and weight.data_ptr() != target.data_ptr():
            return False
        if not weight.numel():
            return False
        gradient = self._matrix(item, item.gradient)
        # By rows or, as Keras stores kernels, by columns; but both alike.
        if weight.is_contiguous():
            stored = gradient.is_contiguous()
        else:
            stored = weight.mT.is_contiguous() and gradient.mT.is_contiguous()
        if not stored:
            return False
        state, lr = self.state[item.parameter], float(item.group["lr"])
        state["step"] += 1
        decay = 1.0 - lr * item.group["weight_decay"]
        context = Context(state["step"], seeds=(item.seed,), shard=item.shard)
        own = state if item.shard is None else local_state(state)
        fused(FusedStep(weight, gradient, own, context, lr, decay))
        self._written(item, target)
        return True

    def _update_fallback(self, items: Sequence[Item]) -> None:
        for group in {id(item.group): item.group for item in items}.values():
            own = [item for item in items if item.group is group]
            with span("update", [item.parameter for item in own]):
                self._update_by_adamw(own, group)

    def _update_by_adamw(self, own: Sequence[Item], group: Mapping[str, Any]) -> None:
        targets = [self._target(item) for item in own]
        gradients = [local(item.gradient) for item in own]
        adamw_update_(
            targets,
            [g.to(target.dtype) for g, target in zip(gradients, targets, strict=True)],
            [self.state[item.parameter] for item in own],
            lr=self.fallback_lr(group),
            betas=tuple(group["fallback_betas"]),
            weight_decay=group["fallback_weight_decay"],
        )
        for item, target in zip(own, targets, strict=True):
            self._written(item, target)

    @staticmethod
    def fallback_lr(group: Mapping[str, Any]) -> float:
        """Return AdamW's current rate: ``fallback_lr``, scaled as ``lr`` has been meanwhile."""
        base = group["base_lr"]
        return float(group["fallback_lr"] * (float(group["lr"]) / base if base else 1.0))

    # ---------------------------------------------------------------- one parameter

    def _new_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return all of a parameter's state; runs on meta tensors to predict memory."""
        return self.state_for(parameter, self._routes[parameter], group)

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return fresh state for a parameter like ``like`` (which may be on the meta device)."""
        if route.is_fallback:
            state = adamw_state(like)
        else:
            state = {"step": 0, **_matrix_state(self._recipe(group), like, route.layout)}
        if self.low_precision == "master" and compute_dtype(like) != like.dtype:
            state["master"] = like.detach().to(compute_dtype(like), copy=True)
        return state

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the keys and shapes that a checkpoint must hold for ``parameter``."""
        return self.state_for(like, self._routes[parameter], group)

    def _matrix(self, item: Item, tensor: Tensor) -> Tensor:
        dtype = compute_dtype(item.parameter)
        return item.layout.matrix(tensor if tensor.dtype is dtype else tensor.to(dtype))

    def _target(self, item: Item) -> Tensor:
        """Return the tensor to update: the parameter, its master copy, or a float32 copy.

        Of a sharded one it is what this rank holds.
        """
        parameter = item.parameter
        if parameter.dtype == compute_dtype(parameter):
            return local(parameter)
        master = self.state[parameter].get("master")
        if master is not None:
            return local(master)
        return local(parameter).to(compute_dtype(parameter))

    def _written(self, item: Item, target: Tensor) -> None:
        """Bring the parameter up to date after its :meth:`_target` was changed."""
        if target.dtype != item.parameter.dtype:
            step = self.state[item.parameter]["step"]
            generator = torch.Generator().manual_seed((item.seed * 1_000_003 + step) % 2**63)
            write_(local(item.parameter), target, self.low_precision, generator)

    def _apply(self, item: Item, recipe: Recipe, update: Tensor) -> None:
        lr, decay = float(item.group["lr"]), item.group["weight_decay"]
        if self.state[item.parameter]["step"] < recipe.decay_from:
            decay = 0.0
        target = self._target(item)
        if decay and recipe.decay == "before":
            target.mul_(1.0 - lr * decay)
        step = item.layout.from_matrix(update)
        target.add_(step if item.shard else own_part(step, item.parameter), alpha=-lr)
        if decay and recipe.decay == "after":
            target.mul_(1.0 - lr * decay)
        self._written(item, target)

    # ---------------------------------------------------------------- tables, copies, checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: torch's part and :attr:`pickled`."""
        own = {name: getattr(self, name) for name in self.pickled}
        return {**super().__getstate__(), **own, "_recipes": {}}

    def plan(self) -> Plan:
        """Return the table of what happens to each parameter, with predicted state bytes."""
        rows = []
        for group in self.param_groups:
            for parameter in group["params"]:
                route = self._routes[parameter]
                state = self.state_for(meta_like(parameter), route, group)
                moves = parameter.requires_grad and parameter.numel()
                rows.append(
                    PlanRow(
                        route.name,
                        route.kind,
                        route.rule,
                        route.reason if parameter.requires_grad else f"{route.reason} (frozen)",
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
        # Constructing a rule that reads modules would put its taps on them.
        seen = skeleton(model) if cls.needs_modules else model
        return make(seen, **settings).plan()

    def state_bytes(self) -> int:
        """Return the measured bytes of all optimizer state held right now."""
        return sum(tensor_bytes(state) for state in self.state.values())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore settings and state exactly as saved, matching parameters by name where known.

        Args:
            state_dict: What :meth:`state_dict` returned, on any device, its groups in any order.

        Raises:
            CheckpointError: It belongs to another optimizer or model; nothing was changed.
        """
        state_dict = verified(self, state_dict)
        super().load_state_dict(state_dict)
        restore(self, state_dict)


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's profiler, or a hook other than the optimizer's own post hooks, is there."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )


def _matrix_state(recipe: Recipe, like: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return a recipe's fresh state for a parameter like ``like``.

    Of a sharded parameter a rank keeps what belongs to its own rows for transforms that need no
    more, and for the others the state of the whole matrix, as every other rank does.
    """
    shard = shard_for(recipe, like, layout)
    shape, dtype = layout.matrix_shape, compute_dtype(like)
    whole = torch.empty(shape, dtype=dtype, device=like.device)
    if shard is None:
        return recipe.init(whole)
    head, rest = (recipe, None) if recipe.row_local else recipe.parts
    rows = whole.new_empty((shard.rows, shape[1]))
    own = wrapped_rows(head.init(rows), head.row_axes(rows), like, shard.total)
    return own if rest is None else own | rest.init(whole)


@functools.cache
def _setting_names(rule: str) -> tuple[str, ...]:
    from neurms.core.optimizers.registry import optimizer_class

    return (*optimizer_class(rule).default_settings(), "weight_decay")


@functools.cache
def _setting_kinds(
    maker: type[PreconditionedOptimizer],
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the defaults of a rule's own settings, and the names of those that may be None."""
    parameters = inspect.signature(maker.__init__).parameters.values()
    optional = frozenset(p.name for p in parameters if "None" in str(p.annotation))
    return maker.default_settings(), optional
