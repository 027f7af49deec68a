"""The profiler for torch optimizers, whose hooks tell it where a step ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from neurms.callbacks.profiler.optimizer_view import OptimizerView
from neurms.callbacks.profiler.sampling import Sampler
from neurms.callbacks.profiler.schedule import Schedule
from neurms.callbacks.profiler.subjects import subjects_of
from neurms.core.ground.errors import check_positive_int
from neurms.core.taps.hooks import forget_compiled_graphs
from neurms.core.unitwise.rule import LossReduction
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["Profiler", "profile"]


class Profiler(Sampler):
    """Measures, at some steps of a training, what each layer costs and whether its statistics hold.

    A step is looked at from the end of the optimizer step before it to its own end: all
    micro-batches are in it. Hooks are in place during those steps only, so that the others cost
    nothing; what a looked-at step does cost is measured too (``profiler_ms``). Numbers are read,
    never written: weights come out bit for bit as without the profiler.

    Statistics are those of every ``every_n_steps``-th step, times those of the step before it: what
    gathers statistics empties the processor's caches, which would show. With ``every_n_steps=1``
    both come from the same steps, and times are up to half as long again.

    Times are exclusive: a layer's ``backward_us`` does not hold the ``reduce_us`` within it. On an
    accelerator they come from events on its stream. ``reduce_us`` and ``scale_us`` are the kernels;
    what calls them, checks and adds up is ``bookkeeping_us``, by layer, and for the optimizer as a
    whole on the report. What a span of time costs by itself is measured once and taken off.
    ``gemm_us`` is D^T H, run once more by itself, because autograd computes it in one node with
    D W. For an optimizer of another library ``update_us`` is the whole step's time shared out by
    number of elements.

    On several ranks every one of them must profile; statistics are summed over all of them.

    Args:
        model: The model.
        optimizer: Its optimizer, or several; a step ends with the step of the first.
        every_n_steps: Distance between two steps that are looked at.
        warmup_steps: Steps before the first of them.
        layers: Name patterns of the layers to profile; None takes all.
        beta: Decay of the averages of v and u for each step, where the optimizer keeps none.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over rows.
        loss_scale: Callable that returns a GradScaler's current scale, or None.
        output: Folder for the run file, which grows as training goes on, and for ``report.html`` at
            its end; None keeps all in memory. A folder that holds a run already is left as it is,
            and its neighbour ``output-2``, ... taken, which :attr:`folder` tells.
        overwrite: Whether a new run replaces the one in ``output``.
        first_step: The step that training goes on with after a checkpoint: its run file is appended
            to, and steps count from there.
        max_elements: Entries of a weight beyond which E[d^2 h^2] is formed for a part of its units.
        preconditioner: The
            :class:`~neurms.core.unitwise.preconditioner.GradientPreconditioner` beside a foreign
            optimizer.

    Raises:
        ValueError: A setting is out of its range, or a pattern matches no layer.
        TypeError: ``model`` or ``optimizer`` is of another type.
        OSError: ``output`` cannot be written.

    Reference:
        NeuRMS draft, section 8.1(2): rho across layers and epochs, overhead split by kind of work.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
        ... )
        >>> optimizer = neurms.NeuRMS(model, variant="F")
        >>> with Profiler(model, optimizer, every_n_steps=2, warmup_steps=1) as profiler:
        ...     for _ in range(6):
        ...         model(torch.randn(16, 8)).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> report = profiler.report()
        >>> [(row.layer, row.shape, row.rows) for row in report]
        [('0', (4, 8), 16), ('2', (2, 4), 16)]
        >>> report.steps
        [1, 3, 5]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        every_n_steps: int = 50,
        warmup_steps: int = 10,
        layers: Sequence[str] | None = None,
        beta: float = 0.99,
        loss_reduction: LossReduction = "mean",
        loss_scale: Callable[[], Tensor | float | None] | None = None,
        output: str | Path | None = None,
        overwrite: bool = False,
        first_step: int = 0,
        max_elements: int = 2**22,
        preconditioner: Iterable[TappedLayer] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={type(model).__name__} must be an nn.Module, which has layers")
        check_positive_int("first_step", first_step, low=0)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
            raise TypeError(f"optimizer={optimizer!r} must be a torch optimizer or several of them")
        super().__init__(
            model,
            subjects_of(model, layers),
            OptimizerView(optimizers, preconditioner),
            Schedule(every_n_steps, warmup_steps),
            output,
            overwrite=overwrite,
            first_step=first_step,
            beta=beta,
            loss_reduction=loss_reduction,
            loss_scale=loss_scale or (lambda: None),
            max_elements=max_elements,
        )

        self._handles: list[Any] = []

    def attach(self) -> Self:
        """Begin to count steps, and look at the next one if it is due; again does nothing."""
        if self._handles:
            return self
        for optimizer in self.view.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        # Compiled code keeps the hooks that it was traced with, so there they stay.
        self._stay = _is_compiled(self.model)
        if self._stay:
            self._hook()
            forget_compiled_graphs()
        self.schedule.start(self.step)
        self.begin_step()
        return self

    def detach(self, *, failed: bool = False) -> None:
        """Look no more: take every hook off and close the run file. A step under way is dropped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        super().detach(failed=failed)

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.detach(failed=kind is not None)

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._window is not None:
            self._window.after_step()
        if optimizer is not self.view.optimizers[0]:
            return
        # All that a step costs that is not looked at.
        if self._window is None and self.step + 1 < self.schedule.wake_at:
            now = time.perf_counter()
            self._plain.append(now - self._since)
            self.step += 1
            self._since = now
            return
        self.end_step()
        self.begin_step()


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )


profile = Profiler
"""The same for plain loops: ``with neurms.profile(model, optimizer) as profiler:``."""
