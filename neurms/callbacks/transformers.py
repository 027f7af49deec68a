"""The profiler for Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from neurms.callbacks.profiler.callback import ProfilesTraining
from neurms.core.ground.extras import require
from neurms.core.unitwise.rule import LossReduction
from neurms.report.curves import TRAIN_LOSS
from neurms.report.scalars import MEANS

require("transformers", extra="transformers")
require("accelerate", extra="transformers")

from transformers import (  # noqa: E402
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

__all__ = ["PreconditionerProfiler", "to_loggers"]


class PreconditionerProfiler(ProfilesTraining, TrainerCallback):
    """Shows what each layer pays for its preconditioner, and whether the factorisation holds.

    Every ``every_n_steps`` optimizer steps one is looked at (see
    :class:`~neurms.callbacks.profiler.engine.Profiler`); weights come out bit for bit as without
    it. The mean rho and the share of overhead enter the Trainer's next log entry as ``neurms/rho``
    and ``neurms/overhead``. When training ends a table is printed and, with ``output``,
    ``report.html`` written: a recommendation, curves, plots, layers. The losses and metrics that
    the Trainer logs are in its curves. It works with every optimizer, from
    :func:`~neurms.integrations.transformers.trainer_optimizers` or the Trainer's own.

    Args:
        every_n_steps: Distance between two optimizer steps that are looked at.
        warmup_steps: Steps before the first of them.
        layers: Name patterns of the layers to profile; None takes all.
        beta: Decay of the averages of v and u for each step, where the optimizer keeps none.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over rows.
        output: Folder for the run file that ``neurms report`` reads, and for ``report.html`` at the
            end; None writes none. A resumed training appends to the run there; another one gets a
            folder of its own, ``output-2``, ...
        overwrite: Whether a new run replaces the one in ``output`` instead.
        max_elements: Entries of a weight beyond which a part of its units is looked at.
        log: Called with all numbers of a step that was looked at, ``neurms/<layer>/<what>``;
            :func:`to_loggers` makes what brings them to TensorBoard and its like. None leaves it at
            the two means. It may be set later, as ``profiler.log``, when the Trainer exists.
        print_table: Whether a table is printed when training ends.

    Raises:
        ValueError: A setting is out of its range.
        ImportError: transformers or accelerate is not installed.

    Reference:
        Settled here: the Trainer has no event for a training that fails, so that hooks of a step
        that was looked at stay until the next training begins.

    Example:
        >>> profiler = PreconditionerProfiler(every_n_steps=50)
        >>> profiler.profiler is None  # Trainer(..., callbacks=[profiler]).train() makes it
        True
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        warmup_steps: int = 10,
        layers: Sequence[str] | None = None,
        beta: float = 0.99,
        loss_reduction: LossReduction = "mean",
        output: str | Path | None = None,
        overwrite: bool = False,
        max_elements: int = 2**22,
        log: Callable[[dict[str, float]], object] | None = None,
        print_table: bool = True,
    ) -> None:
        given = dict(locals())
        super().__init__("call trainer.train", given)
        self.log = log
        self._means: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin: model and optimizer are as they will stay, and their state has been restored."""
        self._means = {}
        optimizer = kwargs["optimizer"]
        self._begin(
            kwargs["model"],
            [_innermost(optimizer)],
            writes=state.is_world_process_zero,
            first_step=state.global_step,
            loss_scale=_loss_scale(optimizer),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the means for the next log entry, and hand all numbers to ``log``."""
        for scalars in self._new_scalars():
            self._means = {name: scalars[name] for name in MEANS & scalars.keys()}
            if self.log is not None:
                self.log(scalars)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the means into the entry, for the callbacks after this one and for the history."""
        found: Mapping[str, Any] = kwargs.get("logs") or {}
        self._keep({_NAMES.get(name, name): v for name, v in found.items() if _is_metric(name)})
        for entry in (kwargs.get("logs"), state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update({name: v for name, v in self._means.items() if name not in entry})
        self._means = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the run and print the table."""
        self._finish(speaks=state.is_world_process_zero)


def to_loggers(trainer: Trainer) -> Callable[[dict[str, float]], None]:
    """Return what hands numbers to a Trainer's loggers, and to no progress bar and no console.

    Args:
        trainer: The Trainer whose loggers (``report_to=...``) are meant.

    Returns:
        A function for :class:`PreconditionerProfiler`'s ``log``.

    Example:
        >>> profiler = PreconditionerProfiler(every_n_steps=50)
        >>> # trainer = Trainer(model, arguments, callbacks=[profiler], ...)
        >>> # profiler.log = to_loggers(trainer)
    """

    def log(numbers: dict[str, float]) -> None:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, (PrinterCallback, ProgressCallback, PreconditionerProfiler)):
                continue
            callback.on_log(
                trainer.args, trainer.state, trainer.control, model=trainer.model, logs=numbers
            )

    return log


_NAMES = {"loss": TRAIN_LOSS}
"""What the Trainer calls things -> what a report does."""


def _is_metric(name: str) -> bool:
    measured = name.endswith(("_runtime", "_per_second", "_time"))
    return name == "loss" or (name.startswith("eval_") and not measured)


def _innermost(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's wrappers, whose own step hooks nobody calls."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    found: Optimizer = optimizer
    return found


def _loss_scale(optimizer: Any) -> Callable[[], Tensor | float | None]:
    """Return what tells the scale of Accelerate's GradScaler, None without one."""
    scaler = getattr(optimizer, "scaler", None)
    # The public get_scale() waits for the device in every layer's backward.
    return lambda: None if scaler is None else scaler._scale
