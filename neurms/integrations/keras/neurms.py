"""NeuRMS as a Keras optimizer: the rule that needs taps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neurms.core.unitwise.engine import Engine as Layers
from neurms.core.unitwise.statistics import PendingSums
from neurms.core.unitwise.tapped import TappedLayer
from neurms.integrations.keras.engine import Engine
from neurms.integrations.keras.optimizer import NeurmsOptimizer
from neurms.integrations.keras.owners import Surroundings, leaves
from neurms.integrations.keras.routing import VariableRoute, parameter_of
from neurms.integrations.keras.training import loss_scale_of, tap_training

__all__ = ["TappedOptimizer"]


class TappedOptimizer(NeurmsOptimizer):
    """A Keras optimizer whose rule reads the error signals and inputs of layers.

    Its taps attach themselves for each training step of the model that it is compiled into
    (``fit``, ``train_on_batch``, a custom ``train_step``) and are gone after it. A loop of your own
    puts its steps into :meth:`attach`.

    With ``gradient_accumulation_steps`` N Keras averages gradients and leaves the loss whole, so
    that the error signals are N times those of one big batch; they are divided by N. What the taps
    have gathered in an unfinished window is saved along with Keras's accumulators.
    """

    def build(self, variables: Sequence[Any]) -> None:
        """Build the optimizer and make the models that train with it run it with taps."""
        if self.built:
            return
        self._applied = False
        self._kept = False
        self._pending_variables: tuple[Any, ...] = ()
        super().build(variables)
        if self._engine is None:
            return
        accumulates = bool(self.gradient_accumulation_steps)
        for layer in self.layers:
            # Keras accumulates gradients elsewhere than in .grad.
            layer.follows_gradient = not accumulates
        if accumulates:
            made = [self._pending_of(layer) for layer in self.layers]
            self._pending_variables = tuple(made)

    def _surrounded(self, around: Surroundings) -> None:
        for model in around.models:
            tap_training(model)

    def _made_engine(self, entries: Sequence[VariableRoute]) -> Engine:
        if all(entry.route.is_fallback for entry in entries):
            kinds = sorted({entry.route.kind for entry in entries})
            raise ValueError(
                f"the variables belong to no layer that {self.rule} can tap (a trainable Dense, "
                f"EinsumDense, convolution or attention layer that is not excluded), but to {kinds}"
            )
        return super()._made_engine(entries)

    def _drawing(self) -> list[dict[str, Any]]:
        # Its probes belong to update="backward", which Keras has not.
        return super()._drawing() if self._settings["low_precision"] == "stochastic" else []

    @property
    def layers(self) -> Layers:
        """The tapped layers."""
        return self.engine.layers

    # ---------------------------------------------------------------- taps

    @contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        """Attach the taps for as long as the context lasts, for a training loop of your own.

        Args:
            model: The model that is trained; its optimizer tells the loss scale.

        Example:
            >>> import keras, torch
            >>> from neurms.integrations.keras import keras_neurms
            >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
            >>> optimizer = keras_neurms()
            >>> with optimizer.attach(model):
            ...     model(torch.ones(4, 3)).square().mean().backward()
            ...     gradients = [v.value.grad for v in model.trainable_variables]
            ...     optimizer.apply(gradients, model.trainable_variables)
        """
        if not self.built:
            self.build(model.trainable_variables)
        used = leaves(getattr(model, "optimizer", None))
        self._begin_taps(next((scaler for leaf, scaler in used if leaf is self), self))
        self._kept = True
        try:
            yield
        finally:
            self.detach()

    def detach(self) -> None:
        """Take all taps off."""
        self._kept = False
        if self._engine is not None:
            self.layers.detach()

    @contextmanager
    def training_step(self, scaler: Any) -> Iterator[None]:
        """Attach the taps for one training step; what a step without :meth:`apply` saw is dropped.

        Args:
            scaler: This optimizer, or the LossScaleOptimizer around it.
        """
        if self._engine is None or self._kept:
            yield
            return
        before = [(layer, layer.pending.copy()) for layer in self.layers]
        self._applied = False
        self._begin_taps(scaler)
        try:
            yield
        finally:
            self.layers.detach()
            if not self._applied:
                for layer, pending in before:
                    layer.restore(pending)

    def _begin_taps(self, scaler: Any) -> None:
        self.layers.loss_scale = self._loss_scale(scaler)
        self.layers.put()

    def _loss_scale(self, scaler: Any) -> Callable[[], Tensor | float] | None:
        window = self.gradient_accumulation_steps or 1
        if window == 1 and scaler is self and not self.loss_scale_factor:
            return None
        return lambda: loss_scale_of(scaler) * window

    def _gradients_applied(self) -> None:
        self._applied = True
        self._store_pending()

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """End training; see Keras."""
        super().finalize_variable_values(var_list)
        self.detach()

    # ---------------------------------------------------------------- unfinished windows

    def _pending_of(self, layer: TappedLayer) -> tuple[Any, ...]:
        prefix = layer.name.replace("/", "_")
        units, features = layer.sizes
        dtype = "float64" if layer.weight.dtype == torch.float64 else "float32"
        sizes = {"units": (units, dtype), "features": (features, dtype), "rows": (2, "int32")}
        return tuple(
            self.add_variable((size,), dtype=kind, name=f"{prefix}_pending_{part}")
            for part, (size, kind) in sizes.items()
            if size
        )

    @torch.no_grad()
    def _store_pending(self) -> None:
        if not self._pending_variables:
            return
        for layer, variables in zip(self.layers, self._pending_variables, strict=False):
            pending = layer.pending
            values = [pending.units, pending.features][: len(variables) - 1]
            for variable, value in zip(variables, values, strict=False):
                stored = parameter_of(variable)
                stored.zero_() if value is None else stored.copy_(value)
            rows = torch.tensor([pending.rows, pending.feature_rows], dtype=torch.int32)
            parameter_of(variables[-1]).copy_(rows)

    def _variables_restored(self) -> None:
        super()._variables_restored()
        if not self._pending_variables:
            return
        for layer, variables in zip(self.layers, self._pending_variables, strict=False):
            rows, feature_rows = parameter_of(variables[-1]).tolist()
            sums = [parameter_of(v).detach().clone() for v in variables[:-1]]
            pending = PendingSums(
                sums[0] if rows else None,
                sums[1] if feature_rows else None,
                rows,
                feature_rows,
            )
            layer.restore(pending)
