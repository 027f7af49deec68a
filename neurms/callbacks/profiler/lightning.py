"""The profiler for a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neurms.callbacks.profiler.callback import ProfilesTraining
from neurms.core.ground.extras import require
from neurms.core.unitwise.rule import LossReduction
from neurms.report.curves import TRAIN_LOSS
from neurms.report.scalars import MEANS

require("lightning", extra="lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

__all__ = ["PreconditionerProfiler"]


class PreconditionerProfiler(ProfilesTraining, Callback):
    """Shows what each layer pays for its preconditioner, and whether the factorisation holds.

    Every ``every_n_steps`` optimizer steps one is looked at (see
    :class:`~neurms.callbacks.profiler.engine.Profiler`); weights come out bit for bit as without
    it. Its numbers go to the Trainer's loggers as ``neurms/<layer>/<what>``, and two of them, the
    mean rho and the share of overhead, to the progress bar. When training ends a table is printed
    and, with ``output``, ``report.html`` written: a recommendation, curves, plots, layers. The loss
    of every batch and all metrics that the module logs are in its curves. It works with every
    optimizer, with :class:`~neurms.callbacks.NeuRMSCallback` beside it or without.

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
        log: Whether numbers go to loggers and progress bar.
        print_table: Whether a table is printed when training ends.

    Raises:
        ImportError: Lightning is not installed.

    Example:
        >>> profiler = PreconditionerProfiler(every_n_steps=50)
        >>> profiler.profiler is None  # trainer.fit makes it
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
        log: bool = True,
        print_table: bool = True,
    ) -> None:
        given = dict(locals())
        super().__init__("call trainer.fit", given)
        self.log = log
        self._begun_at = 0
        self._before: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin: optimizers are as they will stay, and their state has been restored."""
        self._begin(
            pl_module,
            list(trainer.optimizers),
            writes=trainer.is_global_zero,
            # A resumed training counts on, so that steps are those of the loggers.
            first_step=trainer.global_step,
            loss_scale=_loss_scale(trainer),
            preconditioner=_preconditioner(_callbacks(trainer)),
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which step the batch belongs to."""
        self._begun_at = 0 if self.profiler is None else self.profiler.step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's loss, and log a step that was looked at."""
        loss = _loss_of(outputs)
        if loss is not None and self.profiler is not None:
            # Lightning hands out the loss as a part of the accumulated one.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.profiler.keep(TRAIN_LOSS, loss * parts, self._begun_at)
        for scalars in self._new_scalars():
            if not self.log or trainer.barebones:
                continue
            for name in sorted(MEANS & scalars.keys()):
                value = scalars.pop(name)
                pl_module.log(name, value, prog_bar=True, on_step=True, on_epoch=False)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics of before, which are still there afterwards."""
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of this validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._keep_new(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics of before, which are still there afterwards."""
        self._before = dict(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the epoch."""
        self._keep_new(trainer)

    def _keep_new(self, trainer: Trainer) -> None:
        now = dict(trainer.callback_metrics)
        self._keep({k: v for k, v in now.items() if v is not self._before.get(k)})
        self._before = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the run and print the table."""
        self._finish(speaks=trainer.is_global_zero)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every hook off."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take every hook off, since Lightning may end without a teardown; keep what was found."""
        self._stop()


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(getattr(trainer, "callbacks", []))


def _preconditioner(callbacks: Iterable[Any]) -> Any:
    """Return what a NeuRMSCallback holds beside a foreign optimizer, if there is one."""
    found = [getattr(callback, "preconditioner", None) for callback in callbacks]
    return next((preconditioner for preconditioner in found if preconditioner is not None), None)


def _loss_scale(trainer: Trainer) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None

    def current() -> torch.Tensor | float | None:
        # The public get_scale() waits for the device in every layer's backward.
        scale: torch.Tensor | None = scaler._scale
        return scale

    return current
