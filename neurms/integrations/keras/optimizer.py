"""The Keras optimizer behind every rule: Keras's arguments and files around the torch engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Self

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch import Tensor

from neurms.core.ground.errors import CheckpointError
from neurms.core.ground.interrupts import WholeStep
from neurms.core.optimizers.plan import Plan, PlanRow
from neurms.core.optimizers.registry import optimizer_class
from neurms.core.routing import FALLBACK
from neurms.integrations.keras.engine import Engine, make_engine
from neurms.integrations.keras.owners import Surroundings
from neurms.integrations.keras.rates import base_rate
from neurms.integrations.keras.routing import (
    VariableRoute,
    lasting,
    parameter_of,
    route_variables,
)
from neurms.integrations.keras.settings import (
    check_backend,
    check_settings,
    default_rate,
    needs_taps,
    takes_biases,
)

__all__ = ["NeurmsOptimizer"]

_NEVER_BUILT = 2
"""Variables of an optimizer that was saved before it was built: iterations and learning rate."""


class NeurmsOptimizer(keras.optimizers.Optimizer):
    """A rule of this library as a Keras optimizer on the torch backend.

    Kernels get the rule, everything else AdamW, as in the torch optimizers; see :meth:`plan`. Each
    step happens in place on Keras's own variables; a rule's state are variables of the optimizer,
    so that ``.keras`` files hold it. A subclass names its :attr:`rule`.

    Keras clips and accumulates gradients, averages weights and schedules the rate before and after
    the rule. ``weight_decay`` means what it means in Keras: W <- W - lr weight_decay W for *every*
    variable that is not excluded, where the torch optimizers decay the rule's matrices only. For
    those it enters where the rule wants it (before the update, after it, or inside).

    Args:
        learning_rate: A float, a schedule or a callable; None is the rule's default.
        weight_decay: Decoupled weight decay, or None.
        clipnorm: Bound on each gradient's norm.
        clipvalue: Bound on each gradient's entries.
        global_clipnorm: Bound on the norm of all gradients together.
        use_ema: Keep an exponential moving average of the weights.
        ema_momentum: Its decay.
        ema_overwrite_frequency: Steps between overwriting the weights by their average.
        loss_scale_factor: Constant factor of the loss, divided out of gradients.
        gradient_accumulation_steps: Batches whose gradients are averaged for one step.
        name: The optimizer's name.
        exclude_from_weight_decay: Regular expressions; a variable whose name (or path, for
            expressions with a slash) contains one is not decayed. It survives saving, and so does
            what :meth:`exclude_from_weight_decay` sets.
        base_learning_rate: What ``fallback_lr`` goes with: AdamW's rate is
            fallback_lr learning_rate / base_learning_rate, so 0 where the learning rate is. None: a
            schedule's peak, which :func:`~neurms.integrations.keras.rates.peak_of` finds; else the
            learning rate at construction, or the rule's default where that is 0.
        **settings: The rule's own settings and the common ones, by the torch optimizer's names.

    Raises:
        ValueError: Keras runs on another backend than torch; a setting is out of its range; a
            schedule has no peak and ``base_learning_rate`` is None.
        TypeError: The rule has no such setting.
    """

    rule: ClassVar[str] = ""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        exclude_from_weight_decay: Sequence[str] = (),
        base_learning_rate: float | None = None,
        **settings: Any,
    ) -> None:
        check_backend(f"neurms's Keras optimizer {type(self).__name__}")
        chosen = check_settings(self.rule, settings, weight_decay)
        rate = default_rate(self.rule) if learning_rate is None else learning_rate
        super().__init__(
            learning_rate=rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
        )
        self._settings: Mapping[str, Any] = MappingProxyType(chosen)
        self._base_rate = base_rate(rate, base_learning_rate, default_rate(self.rule))
        self._anchors: tuple[str, ...] = ()
        self._names: Mapping[int, str] = MappingProxyType({})
        self._engine: Engine | None = None
        self._entries: tuple[VariableRoute, ...] = ()
        self._frozen: tuple[PlanRow, ...] = ()
        self._missed: Any = None
        self._missed_counts: tuple[int, ...] = ()
        self._seeds: Any = None
        if exclude_from_weight_decay:
            self.exclude_from_weight_decay(var_names=exclude_from_weight_decay)

    # ---------------------------------------------------------------- building

    def build(self, variables: Sequence[Any]) -> None:
        """Route the variables, make the rule's state for them, and have Keras save it.

        Args:
            variables: The model's trainable variables.

        Raises:
            ValueError: A pattern of ``exclude`` matches no variable, or the rule finds no layer.
        """
        if self.built:
            return
        variables = list(variables)
        around = Surroundings.of(variables, self)
        self._names = MappingProxyType({id(v): around.name_of(v) for v in variables})
        entries = self._routed(variables, around)
        engine = self._made_engine(entries) if entries else None
        super().build(variables)
        if engine is None:
            return
        self._engine, self._entries = engine, tuple(entries)
        self._frozen = tuple(_frozen_rows(around, variables))
        self._missed = self.add_variable((len(entries),), dtype="int32", name="missed_steps")
        for entry in entries:
            self._add_state(engine, entry)
        self._add_seeds()
        self._variables_restored()
        self._surrounded(around)

    def _surrounded(self, around: Surroundings) -> None:
        """Take notice of the models that the optimizer was built for."""

    def _routed(self, variables: Sequence[Any], around: Surroundings) -> list[VariableRoute]:
        # Keras itself overwrites some variables with their "gradients" (float8 scales).
        own = [v for v in variables if not self._overwrite_variable_with_gradient(v)]
        return route_variables(
            own,
            around,
            self.rule,
            head=self._settings["head"] or optimizer_class(self.rule).default_head,
            exclude=self._settings["exclude"],
            taps=needs_taps(self.rule, self._settings),
            biases=takes_biases(self.rule),
        )

    def _made_engine(self, entries: Sequence[VariableRoute]) -> Engine:
        settings = {
            **self._settings,
            "exclude": (),
            "head": None,
            "weight_decay": self.weight_decay or 0.0,
            "lr": self._base_rate,
        }
        engine = make_engine(self.rule, [entry.route for entry in entries], settings)
        exempt = [e.route.parameter for e in entries if not self._use_weight_decay(e.variable)]
        engine.exempt(exempt)
        return engine

    def _add_state(self, engine: Engine, entry: VariableRoute) -> None:
        """Make a parameter's state; its tensors are the values of variables that Keras saves."""
        parameter = entry.route.parameter
        optimizer = engine.optimizer
        group = optimizer.work().view_of(parameter).group
        state = optimizer.state_for(parameter.detach(), optimizer.routes[parameter], group)
        prefix = entry.route.name.replace("/", "_")
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = self._lent(value, f"{prefix}_{key}")
        optimizer.state[parameter].update(state)

    def _lent(self, value: Tensor, name: str) -> Tensor:
        variable = self.add_variable(
            tuple(value.shape),
            initializer=lambda shape, dtype=None: value,
            dtype=str(value.dtype).removeprefix("torch."),
            name=name,
        )
        return parameter_of(variable)

    def _add_seeds(self) -> None:
        """Keep the seeds of draws in a variable, for a file may go on under other names."""
        seeds = [state["seed"] for state in self._drawing()]
        if seeds:
            self._seeds = self.add_variable((len(seeds),), dtype="int64", name="seeds")
            with torch.no_grad():
                parameter_of(self._seeds).copy_(torch.tensor(seeds, dtype=torch.int64))

    def _drawing(self) -> list[dict[str, Any]]:
        """Return the states that hold a seed, in the order of the variables."""
        states = (self.engine.optimizer.state[entry.route.parameter] for entry in self._entries)
        return [state for state in states if "seed" in state]

    # ---------------------------------------------------------------- the step

    # Graphs of jit_compile=True end here: how Ctrl-C is held back is no matter of tensors.
    @torch.compiler.disable(reason="one step of a neurms optimizer runs as it is")
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Apply gradients, all of them or none though Ctrl-C is pressed; see Keras.

        Raises:
            NotImplementedError: It is called in a ``keras.StatelessScope``.
        """
        if in_stateless_scope():
            self._refuse_stateless()
        with WholeStep():
            super().apply(grads, trainable_variables)
            self._gradients_applied()

    def _gradients_applied(self) -> None:
        """Take notice of the end of a call of :meth:`apply`, before Ctrl-C gets through."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable; Keras itself hands over all at once."""
        self._backend_update_step([gradient], [variable], learning_rate)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Leave weight decay to the engine, which knows where a rule wants it."""

    @torch.no_grad()
    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        gradients = self._by_parameter(grads, trainable_variables)
        self._begin_step()
        assert self._engine is not None
        self._engine.advance(gradients, float(keras.ops.convert_to_tensor(learning_rate)))
        self._end_step()

    def _by_parameter(self, grads: Sequence[Any], variables: Sequence[Any]) -> dict[Tensor, Tensor]:
        parameters = {id(entry.variable): entry.route.parameter for entry in self._entries}
        gradients = {}
        for gradient, variable in zip(grads, variables, strict=True):
            parameter, value = parameters[id(variable)], parameter_of(variable)
            if parameter is not value:
                # A flat view; the variable's storage may have moved since (model.to(device)).
                parameter.data = value.detach().view(-1)
            gradients[parameter] = keras.ops.convert_to_tensor(gradient).view(parameter.shape)
        return gradients

    @torch.no_grad()
    def _backend_reset_gradient_accumulators(self) -> None:
        made = (v for v in self._accumulated_gradients if v is not None)
        torch._foreach_zero_([parameter_of(variable) for variable in made])

    @torch.no_grad()
    def _backend_increment_gradient_accumulators(
        self, grads: Sequence[Any], acc_grads: Sequence[Any]
    ) -> None:
        torch._foreach_add_([parameter_of(v) for v in acc_grads], list(grads))

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> NoReturn:
        """Refuse functional updates, which Keras has for JAX.

        Raises:
            NotImplementedError: Always.
        """
        self._refuse_stateless()

    def _refuse_stateless(self) -> NoReturn:
        # A wrapper's stateless_apply, too, ends in apply, which would write into real variables.
        raise NotImplementedError(
            f"{type(self).__name__} updates variables in place and has no functional form; call "
            "optimizer.apply(grads, trainable_variables)"
        )

    # ---------------------------------------------------------------- step counts

    def _begin_step(self) -> None:
        """Give each parameter its step count: the iterations, less those without a gradient."""
        assert self._engine is not None
        iterations = int(self.iterations)
        for entry, missed in zip(self._entries, self._missed_counts, strict=True):
            state = self._engine.optimizer.state[entry.route.parameter]
            state["step"] = max(iterations - missed, 0)

    def _end_step(self) -> None:
        assert self._engine is not None
        iterations = int(self.iterations) + 1
        states = (self._engine.optimizer.state[entry.route.parameter] for entry in self._entries)
        missed = tuple(iterations - state["step"] for state in states)
        if missed != self._missed_counts:
            self._missed_counts = missed
            parameter_of(self._missed).copy_(torch.tensor(missed, dtype=torch.int32))

    def _variables_restored(self) -> None:
        """Bring what is kept beside the variables in line with their values."""
        if self._engine is None:
            return
        self._missed_counts = tuple(parameter_of(self._missed).tolist())
        if self._seeds is not None:
            seeds = parameter_of(self._seeds).tolist()
            for state, seed in zip(self._drawing(), seeds, strict=True):
                state["seed"] = seed
        self._begin_step()

    # ---------------------------------------------------------------- weight decay

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from weight decay, before the optimizer is built.

        Args:
            var_list: Variables.
            var_names: Regular expressions searched for in variable names, or in paths if they hold
                a slash.

        Raises:
            TypeError: ``var_names`` is one text.
        """
        if isinstance(var_names, str):
            raise TypeError(f"var_names={var_names!r} must be a sequence; write ({var_names!r},)")
        super().exclude_from_weight_decay(var_list, list(var_names or ()))
        self._anchors = tuple(var_names or ())

    def _use_weight_decay(self, variable: Any) -> bool:
        paths = (variable.path, self._names.get(id(variable), ""))
        if any(re.search(a, path) for a in self._anchors if "/" in a for path in paths):
            return False
        used: bool = super()._use_weight_decay(variable)
        return used

    def _lasting_anchors(self) -> list[str]:
        """Return the exclusions as they hold in a model loaded from a file, whose paths differ."""
        plain = [anchor for anchor in self._anchors if "/" not in anchor]
        if not self._entries:
            return list(self._anchors)
        out = (e for e in self._entries if not self._use_weight_decay(e.variable))
        rest = (e for e in out if not any(re.search(a, e.variable.name) for a in plain))
        return [*plain, *(f"^{re.escape(entry.route.name)}$" for entry in rest)]

    def _lasting_exclude(self) -> list[str]:
        patterns = self._settings["exclude"]
        if not self._entries:
            return list(patterns)
        return [name for pattern in patterns for name in lasting(self._entries, pattern)]

    # ---------------------------------------------------------------- saving

    def get_config(self) -> dict[str, Any]:
        """Return everything needed to make the same optimizer, without its state."""
        return {
            **super().get_config(),
            **self._settings,
            "exclude": self._lasting_exclude(),
            "exclude_from_weight_decay": self._lasting_anchors(),
            "base_learning_rate": self._base_rate,
        }

    def load_own_variables(self, store: Any) -> None:
        """Restore the state, all of it or nothing.

        Raises:
            CheckpointError: The state was saved by another optimizer or for another model.
        """
        count, own = len(store.keys()), self.variables
        if count == len(own):
            self._check_shapes(store)
        elif self.built and count > _NEVER_BUILT:
            raise CheckpointError(
                f"the file holds {count} variables of an optimizer, {self.name!r} has {len(own)}: "
                "it was saved with other settings, another optimizer or another model; nothing "
                "was loaded. Compile with the optimizer that it was saved with, or load the model "
                "with compile=False"
            )
        super().load_own_variables(store)
        if self.built:
            self._variables_restored()

    def _check_shapes(self, store: Any) -> None:
        for index, variable in enumerate(self.variables):
            saved, own = tuple(store[str(index)].shape), tuple(variable.shape)
            if saved != own:
                raise CheckpointError(
                    f"the file's variable {index} has shape {saved}, {variable.path!r} has {own}: "
                    "it belongs to another optimizer or model; nothing was loaded"
                )

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all of the optimizer's variables."""
        super().set_weights(weights)
        self._variables_restored()

    # ---------------------------------------------------------------- what it does, and to what

    def plan(self) -> Plan:
        """Return the table of what happens to each variable, with its state bytes.

        Raises:
            ValueError: The optimizer is not built yet.
        """
        if self.built and self._engine is None:
            return Plan([])
        return Plan([*self.engine.optimizer.plan(), *self._frozen])

    def state_bytes(self) -> int:
        """Return the bytes of the rule's and AdamW's state, without Keras's own variables."""
        return self.engine.optimizer.state_bytes()

    @property
    def engine(self) -> Engine:
        """The torch optimizer inside, and what moves it.

        Raises:
            ValueError: The optimizer is not built yet.
        """
        if self._engine is None:
            raise ValueError(
                f"{self.name!r} is not built; call optimizer.build(model.trainable_variables), or "
                "fit, first"
            )
        return self._engine

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Make the optimizer from :meth:`get_config`'s dictionary."""
        made: Self = super().from_config(dict(config), custom_objects)
        return made


def _frozen_rows(around: Surroundings, variables: Sequence[Any]) -> list[PlanRow]:
    moving = {id(variable) for variable in variables}
    rows = []
    for variable in around.variables(variables):
        # What is trained but not by this optimizer is in the plan of another one.
        if id(variable) not in moving and not variable.trainable:
            kind = type(around.owners_of(variable)[0]).__name__
            name = around.name_of(variable)
            rows.append(PlanRow(name, kind, FALLBACK, "frozen", tuple(variable.shape), 0))
    return rows
