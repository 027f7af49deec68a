"""Keras callbacks: what NeuRMS does during ``fit``, in Keras's own logs.

A callback puts numbers into the ``logs`` that Keras hands round, where History, CSVLogger,
TensorBoard and the progress bar find them; it stands before those in the list of callbacks.
"""

from __future__ import annotations

from typing import Any

from neurms.core.ground.extras import require
from neurms.core.unitwise.scale_summary import scale_summary

keras = require("keras", extra="keras")

from neurms.callbacks.profiler.keras import PreconditionerProfiler  # noqa: E402
from neurms.integrations.keras.owners import innermost  # noqa: E402

__all__ = ["NeuRMSCallback", "PreconditionerProfiler"]


class NeuRMSCallback(keras.callbacks.Callback):  # type: ignore[name-defined]
    """Log what NeuRMS's scale factors do, for a model compiled with ``keras_neurms``.

    ``neurms/scale_median`` is the median unit factor s over all layers,
    ``neurms/feature_scale_median`` that of c (variants F and P), ``neurms/clipped_fraction`` the
    share of factors at a bound. They come at the end of each epoch, and with ``every_n_steps`` in
    the logs of every n-th batch too. The optimizer attaches its taps step by step itself; the
    callback sees to it that none is left when training ends.

    Args:
        every_n_steps: Batches between entries in the batch logs; None for none. Reading factors
            makes the program wait for an accelerator.

    Raises:
        ValueError: ``every_n_steps`` is not positive.
        TypeError: (When training begins) the model's optimizer is another one than NeuRMS.

    Example:
        >>> import numpy
        >>> from neurms.integrations.keras import keras_neurms
        >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
        >>> model.compile(optimizer=keras_neurms(), loss="mse")
        >>> x, y = numpy.ones((4, 3)), numpy.ones((4, 2))
        >>> history = model.fit(x, y, verbose=0, callbacks=[NeuRMSCallback()]).history
        >>> sorted(history)
        ['loss', 'neurms/clipped_fraction', 'neurms/feature_scale_median', 'neurms/scale_median']
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} must be at least 1, or None")
        self.every_n_steps = every_n_steps
        self._steps = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the optimizer."""
        self._optimizer()
        self._steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Log the factors every n steps."""
        self._steps += 1
        if self.every_n_steps and logs is not None and self._steps % self.every_n_steps == 0:
            logs.update(self._summary())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log the factors of each epoch."""
        if logs is not None:
            logs.update(self._summary())

    def on_train_end(self, logs: Any = None) -> None:
        """Leave no tap behind."""
        self._optimizer().detach()

    def _summary(self) -> dict[str, float]:
        own = self._optimizer()
        # The engine is there from the first batch on.
        matrices = own.engine.optimizer.moment_layers() if own.built else ()
        found = scale_summary([*own.layers, *matrices])
        return {f"neurms/{name}": float(value) for name, value in found.items()}

    def _optimizer(self) -> Any:
        optimizer = innermost(self.model.optimizer)
        if not hasattr(type(optimizer), "layers"):
            raise TypeError(
                f"NeuRMSCallback logs what NeuRMS does, and the model was compiled with "
                f"{type(optimizer).__name__}; compile it with "
                "neurms.integrations.keras.keras_neurms(), or leave the callback out"
            )
        return optimizer
