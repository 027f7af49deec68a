"""The profiler for a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from neurms.callbacks.profiler.engine import Profiler
from neurms.callbacks.profiler.report import ProfilerReport
from neurms.callbacks.profiler.scalars import layer_scalars
from neurms.core.ground.extras import require
from neurms.core.unitwise.rule import LossReduction

require("lightning", extra="lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

__all__ = ["PreconditionerProfiler"]


class PreconditionerProfiler(Callback):
    """Shows what each layer pays for its preconditioner, and whether the factorisation holds.

    Every ``every_n_steps`` optimizer steps one is looked at (see
    :class:`~neurms.callbacks.profiler.engine.Profiler`); weights come out bit for bit as without
    it. Its numbers go to the Trainer's loggers as ``neurms/<layer>/<what>``, the mean rho and the
    share of overhead to the progress bar as well, and a table is printed when training ends. It
    works with every optimizer, with :class:`~neurms.callbacks.NeuRMSCallback` beside it or without.

    Args:
        every_n_steps: Distance between two optimizer steps that are looked at.
        warmup_steps: Steps before the first of them.
        layers: Name patterns of the layers to profile; None takes all.
        beta: Decay of the averages of v and u for each step, where the optimizer keeps none.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over rows.
        output: Folder for the run file that ``neurms report`` reads; None writes none.
        max_elements: Entries of a weight beyond which a part of its units is looked at.
        log: Whether numbers go to loggers and progress bar.
        print_table: Whether a table is printed when training ends.

    Raises:
        ImportError: Lightning or psutil is not installed.

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
        max_elements: int = 2**22,
        log: bool = True,
        print_table: bool = True,
    ) -> None:
        self.settings: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "warmup_steps": warmup_steps,
            "layers": layers,
            "beta": beta,
            "loss_reduction": loss_reduction,
            "max_elements": max_elements,
        }
        self.output = output
        self.log = log
        self.print_table = print_table
        self.profiler: Profiler | None = None
        self._logged = 0

    def report(self) -> ProfilerReport:
        """Return the report of the last fit, finished or not.

        Raises:
            RuntimeError: No fit has started.
        """
        if self.profiler is None:
            raise RuntimeError("PreconditionerProfiler has seen no training yet; call trainer.fit")
        return self.profiler.report()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin: optimizers are as they will stay, and their state has been restored."""
        if self.profiler is not None:
            self.profiler.detach()
        self.profiler = Profiler(
            pl_module,
            list(trainer.optimizers),
            loss_scale=_loss_scale(trainer),
            output=self.output if trainer.is_global_zero else None,
            preconditioner=_preconditioner(_callbacks(trainer)),
            **self.settings,
        )
        # A resumed training counts on, so that steps are those of the loggers.
        self.profiler.step = trainer.global_step
        self._logged = 0
        self.profiler.attach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a step that was looked at."""
        profiler = self.profiler
        if profiler is None or len(profiler.samples) == self._logged:
            return
        self._logged = len(profiler.samples)
        if not self.log or trainer.barebones:
            return
        scalars = layer_scalars(profiler.samples[-1])
        for name in ("neurms/rho", "neurms/overhead"):
            if name in scalars:
                pl_module.log(name, scalars.pop(name), prog_bar=True, on_step=True, on_epoch=False)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the run and print the table."""
        if self.profiler is None:
            return
        self.profiler.detach()
        if self.print_table and trainer.is_global_zero and self.profiler.samples:
            rich: Any = require("rich", extra="report")
            rich.print(self.report().table())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every hook off."""
        if self.profiler is not None:
            self.profiler.detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take every hook off, since Lightning may end without a teardown; keep what was found."""
        if self.profiler is not None:
            self.profiler.detach()


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(getattr(trainer, "callbacks", []))


def _preconditioner(callbacks: Iterable[Any]) -> Any:
    """Return what a NeuRMSCallback holds beside a foreign optimizer, if there is one."""
    found = [getattr(callback, "_preconditioner", None) for callback in callbacks]
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
