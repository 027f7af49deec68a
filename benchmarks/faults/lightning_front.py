"""The fault matrix's cells for a Lightning Trainer."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

import neurms
from benchmarks.faults.cases import (
    BATCHES,
    LR,
    OPTIMIZERS,
    STRIKES,
    Hostile,
    batch,
    bits,
    no_space,
    same,
)
from benchmarks.faults.faults import FAULTS, Parts
from benchmarks.faults.plain_front import network
from benchmarks.faults.recipes import AtomicCheckpointIO
from neurms.callbacks import NeuRMSCallback
from neurms.core.taps.hooks import HookTap
from neurms.integrations.lightning import optimizer_config

CALLBACK = "NeuRMSCallback"
NAMES = (CALLBACK, *OPTIMIZERS)


class Module(LightningModule):
    """The network under one of :data:`NAMES`."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.settings, self.parts = name, settings, Parts()
        self.net = network(self.parts)
        self.parts.model = self
        self.parts.weight = self.net[4 if "backward" in name else 3].weight
        self.far = False

    def training_step(self, numbers: Any, index: int) -> Tensor:
        """Return the loss of the batch with this number."""
        inputs, targets = batch(int(numbers))
        targets = targets + (1e4 if self.far and numbers == 0 else 0.0)
        out = self.net(inputs.to(next(self.parameters()).dtype))
        return mse_loss(out.float(), targets)

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        if self.name == CALLBACK:
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)
        kind, own = OPTIMIZERS[self.name]
        return optimizer_config(self, kind, lr=LR, **own, **self.settings)


class Strike(Callback):
    """Holds a fault over one batch and notes the state before it."""

    def __init__(self, fault: Any) -> None:
        self.fault, self.stack, self.before = fault, ExitStack(), None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin."""
        if batch_idx == STRIKES:
            self.before = _bits(trainer, pl_module)
            self.stack.enter_context(self.fault(pl_module.parts))

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.stack.close()


def _bits(trainer: Trainer, module: LightningModule) -> Any:
    callbacks = [c.state_dict() for c in trainer.callbacks if isinstance(c, NeuRMSCallback)]
    skipped = [{k: v for k, v in state.items() if k != "skipped_steps"} for state in callbacks]
    return bits(
        [dict(module.net.state_dict()), trainer.optimizers[0].state_dict()["state"], skipped]
    )


class Fit:
    """One call of ``fit``, with what came of it."""

    def __init__(
        self,
        name: str,
        folder: Path | None = None,
        *,
        fault: Any = None,
        resume: Path | None = None,
        data: Dataset[int] | None = None,
        workers: int = 0,
        steps: int = BATCHES,
        settings: dict[str, Any] | None = None,
        extra: tuple[Callback, ...] = (),
        far: bool = False,
        quiet: bool = True,
        **trainer: Any,
    ) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.CRITICAL)
        if quiet:
            warnings.simplefilter("ignore")
        self.name, settings = name, settings or {}
        self.module = Module(name, settings)
        self.module.far = far
        self.strike = Strike(fault) if fault else None
        callbacks: list[Callback] = [*extra, *([self.strike] if self.strike else [])]
        if name == CALLBACK:
            callbacks.append(NeuRMSCallback(variant="F", log=False, **settings))
        if folder is not None:
            callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1))
        plugins = [*trainer.pop("plugins", []), *([AtomicCheckpointIO()] if folder else [])]
        self.trainer = Trainer(
            max_epochs=1,
            limit_train_batches=steps,
            accelerator="cpu",
            callbacks=callbacks,
            plugins=plugins,
            enable_checkpointing=folder is not None,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer,
        )
        loader = DataLoader(data or Numbers(), batch_size=None, num_workers=workers)
        self.error: BaseException | None = None
        try:
            self.trainer.fit(
                self.module, loader, ckpt_path=resume, weights_only=True if resume else None
            )
        except AssertionError:
            raise
        except (Exception, SystemExit) as error:
            self.error = error
        finally:
            if self.strike:
                self.strike.stack.close()
            # Lightning leaves SIGINT ignored after Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def bits(self) -> Any:
        """Return weights and state."""
        return _bits(self.trainer, self.module)

    def hooks(self) -> int:
        """Return how many taps the fit has left; a NeuRMS of one's own keeps its until detached."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, neurms.NeuRMS):
                optimizer.detach()
        modules = list(self.module.modules())
        taps = sum(isinstance(h, HookTap) for m in modules for h in m._forward_hooks.values())
        return taps + sum(type(m).__name__ == "_TappedLinear" for m in modules)


class Numbers(Dataset[int]):
    """The numbers of the batches; one of them may end the process that asks for it."""

    def __init__(self, deadly: int = -1, start: int = 0) -> None:
        self.deadly, self.start = deadly, start

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> int:
        if index == self.deadly:
            os._exit(1)
        return index


def _named(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: "


def _resumes(name: str, folder: Path) -> None:
    """Hold a run resumed from the last checkpoint to one that nothing happened to."""
    last = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)[-1]
    seen = int(last.stem.split("=")[1])
    rest = Fit(name, resume=last, data=_Rest(seen))
    assert rest.error is None, f"resuming failed: {rest.error!r}"
    assert same(rest.bits(), _whole(name)), "the resumed run differs"


@cache
def _whole(name: str) -> Any:
    """Return the end of a run to which nothing happens."""
    return Fit(name).bits()


class _Rest(Numbers):
    """The batches from a number on: Lightning does not skip those that were seen."""

    def __getitem__(self, index: int) -> int:
        return index + self.start

    def __init__(self, start: int) -> None:
        super().__init__(start=start)


def struck(name: str, fault: str, folder: Path, **settings: Any) -> str:
    """Return what comes of a fault in the middle of a step."""
    fit = Fit(name, folder, fault=FAULTS[fault], settings=settings)
    assert fit.strike is not None
    assert fit.hooks() == 0, "a hook was left behind"
    if fit.error is None:
        if settings.get("nonfinite") == "skip":
            alike = same(fit.bits(), _without(name))
            assert alike or name == "NeuRMS backward", "the step was not skipped"
            return "skipped" if alike else "bad layers left out"
        assert same(fit.bits(), _whole(name)), "something changed"
        return "no effect"
    _resumes(name, folder)
    alike = same(fit.bits(), fit.strike.before)
    if fault == "Ctrl-C in the step":
        return "SystemExit: step finished, resumes"
    assert alike or "backward" in name, f"{fit.error!r} left something changed"
    return f"{_named(fit.error)}{'as before' if alike else 'layers above had moved'}, resumes"


@cache
def _without(name: str) -> Any:
    """Return the end of a run that never sees the batch at which faults strike."""
    return Fit(name, data=_Without(), steps=BATCHES - 1, settings={"nonfinite": "skip"}).bits()


class _Without(Numbers):
    """All batches but the one that the fault spoils."""

    def __len__(self) -> int:
        return BATCHES - 1

    def __getitem__(self, index: int) -> int:
        return index + (index >= STRIKES)


class _Full(Callback):
    """Fills the disk from one batch on."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Fill."""
        if batch_idx == STRIKES:
            self.stack.enter_context(no_space())


def full_disk(name: str, folder: Path) -> str:
    """Save while the disk is full."""
    disk = _Full()
    try:
        fit = Fit(name, folder, extra=(disk,))
    finally:
        disk.stack.close()
    assert isinstance(fit.error, (OSError, RuntimeError)), "the disk was not full"
    assert fit.hooks() == 0
    _resumes(name, folder)
    return f"{_named(fit.error)}resumes"


def restored(name: str, folder: Path, damage: str) -> str:
    """Resume from a checkpoint that is truncated, hostile or of another optimizer or version."""
    other = "RACS" if name != "RACS" else "RMNP"
    owner = other if damage == "of another optimizer" else name
    Fit(owner, folder, fault=FAULTS["exception in forward"])
    path, witness = next(iter(folder.glob("*.ckpt"))), folder / "witness"
    content = torch.load(path, weights_only=True)
    if damage == "hostile pickle":
        content["more"] = Hostile(str(witness))
    if damage == "of another version":
        if name == CALLBACK:
            key = next(k for k in content["callbacks"] if CALLBACK in k)
            del content["callbacks"][key]["variant"]
        else:
            del content["optimizer_states"][0]["param_groups"][0]["fallback_lr"]
    torch.save(content, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "none":
        _resumes(name, folder)
        return "loads with weights_only"
    if name == CALLBACK and damage == "of another optimizer":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            Fit(name, resume=path, quiet=False)
        assert any("begin anew" in str(warning.message) for warning in said)
        return "UserWarning: statistics begin anew"
    fit = Fit(name, resume=path)
    assert not witness.exists(), "the pickle ran"
    assert fit.error is not None, "it was loaded"
    assert fit.hooks() == 0
    return f"{_named(fit.error).rstrip(': ')}"


def dying_worker(name: str, folder: Path) -> str:
    """Lose a loader's worker process."""
    fit = Fit(name, folder, data=Numbers(deadly=BATCHES - 1), workers=1)
    assert "exited unexpectedly" in str(fit.error)
    assert fit.hooks() == 0
    _resumes(name, folder)
    return f"{_named(fit.error)}resumes"


def precision(name: str, folder: Path, kind: str) -> str:
    """Train with low precision."""
    if kind == "autocast float16":
        return "refused by Lightning (CPU)"
    given = "bf16-true" if kind == "bfloat16 parameters" else "bf16-mixed"
    fit = Fit(name, folder, precision=given)
    if fit.error is not None:
        raise fit.error
    weights = list(fit.module.parameters())
    assert all(p.isfinite().all() for p in weights)
    assert (weights[0].dtype == torch.bfloat16) == (given == "bf16-true")
    assert fit.hooks() == 0
    return "trains"


def overflow(name: str, folder: Path) -> str:
    """Let a GradScaler overflow in the first step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    fit = Fit(name, plugins=[plugin], steps=3, far=True)
    assert fit.hooks() == 0
    if fit.error is not None:
        assert "GradScaler" in str(fit.error) or "precision" in str(fit.error), repr(fit.error)
        return f"{_named(fit.error)}refused"
    assert same(fit.bits(), Fit(name, data=_Rest(1), steps=2).bits()), "the overflow left a trace"
    return "skipped"
