"""The fault matrix's cells for a plain training loop."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
from benchmarks.faults.faults import FAULTS, Parts, Saboteur, TrainingFault
from neurms.core.ground.errors import CheckpointError, NonFiniteError, UnsupportedTrainingError
from neurms.core.taps.hooks import HookTap

NAMES = tuple(OPTIMIZERS)


class Passing(nn.Module):
    """A layer in which a fault may sit."""

    def __init__(self, saboteur: Saboteur) -> None:
        super().__init__()
        self.saboteur = saboteur

    def forward(self, passing: Tensor) -> Tensor:
        """Return what the saboteur makes of it."""
        return self.saboteur(passing)


def network(parts: Parts) -> nn.Sequential:
    """Return a network with a hidden layer, a norm and places to hurt."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 6),
        nn.Tanh(),
        Passing(parts.middle),
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
        Passing(parts.end),
    )
    parts.model = model
    return model


class Run:
    """A model and its optimizer."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        self.kind, own = OPTIMIZERS[name]
        self.parts = Parts()
        self.model = network(self.parts).to(dtype)
        self.optimizer = neurms.create(self.kind, self.model, lr=LR, **own, **settings)
        backward = own.get("update") == "backward"
        self.parts.weight = self.model[4].weight if backward else self.model[3].weight

    def train(self, numbers: Iterable[int], fault: Any = None, context: Any = None) -> Run:
        """Take a step on each batch, the last of them under a fault, all of it in a context."""
        numbers = list(numbers)
        for number in numbers:
            struck = fault is not None and number == numbers[-1]
            with fault(self.parts) if struck else nullcontext(), context or nullcontext():
                inputs, targets = batch(number)
                dtype = next(self.model.parameters()).dtype
                mse_loss(self.model(inputs.to(dtype)).float(), targets).backward()
                self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def bits(self) -> Any:
        """Return weights and state."""
        return bits([dict(self.model.state_dict()), self.optimizer.state_dict()["state"]])

    def hooks(self) -> int:
        """Return how many taps are on the model once the optimizer is gone."""
        if isinstance(self.optimizer, neurms.NeuRMS):
            self.optimizer.detach()
        modules = list(self.model.modules())
        taps = sum(isinstance(h, HookTap) for m in modules for h in m._forward_hooks.values())
        return taps + sum(type(m).__name__ == "_TappedLinear" for m in modules)


def struck(name: str, fault: str, folder: Path, **settings: Any) -> str:
    """Return what comes of a fault in the middle of a step."""
    run = Run(name, **settings).train(range(STRIKES))
    before = run.bits()
    error = _error_of(run, FAULTS[fault])
    after = run.bits()
    run.optimizer.zero_grad()
    backward = name == "NeuRMS backward"
    if error is None and settings.get("nonfinite") == "skip":
        assert backward or same(before, after), "a skipped step changed something"
        outcome = "bad layers left out" if backward and not same(before, after) else "skipped"
    elif error is None:
        assert same(after, Run(name).train(range(STRIKES + 1)).bits()), "the step was not taken"
        outcome = "no effect"
    elif same(before, after):
        outcome = "as before"
    elif isinstance(error, KeyboardInterrupt) and same(
        after, Run(name).train(range(STRIKES + 1)).bits()
    ):
        outcome = "step finished first"
    else:
        assert backward, f"{error!r} left something changed"
        if isinstance(error, NonFiniteError):
            assert "had already updated" in str(error), str(error)
        outcome = "layers above had moved"
    if not isinstance(error, UnsupportedTrainingError):  # removed hooks are gone for good
        _goes_on(name, run, outcome)
    assert run.hooks() == 0, "a hook was left behind"
    return f"{_kind(error)}{outcome}"


def _error_of(run: Run, fault: Any) -> BaseException | None:
    try:
        run.train([STRIKES], fault)
    except (NonFiniteError, UnsupportedTrainingError, TrainingFault, KeyboardInterrupt) as error:
        return error
    return None


def _kind(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: "


def _goes_on(name: str, run: Run, outcome: str) -> None:
    """Hold training on to a run that never saw the step, or took it."""
    rest = range(STRIKES, BATCHES)
    run.train(rest)
    taken = {"as before": [0, 1], "skipped": [0, 1], "no effect": [0, 1, STRIKES]}
    taken["step finished first"] = taken["no effect"]
    if outcome in taken:
        twin = Run(name).train([*taken[outcome], *rest])
        assert same(run.bits(), twin.bits()), "training goes on differently"
    assert all(p.isfinite().all() for p in run.model.parameters()), "a weight is not finite"


def full_disk(name: str, folder: Path) -> str:
    """Save while the disk is full; the file before must be whole, and training go on."""
    run, path = Run(name).train(range(STRIKES)), folder / "state.pt"

    def save() -> None:
        partial = path.with_suffix(".partial")
        torch.save(run.bits(), partial)
        os.replace(partial, path)

    save()
    run.train([STRIKES])
    before = run.bits()
    try:
        with no_space():
            save()
    except (OSError, RuntimeError) as error:
        kind = type(error).__name__
    else:
        raise AssertionError("the disk was not full")
    assert same(run.bits(), before)
    weights, state = torch.load(path, weights_only=True)
    assert same([weights, state], Run(name).train(range(STRIKES)).bits())
    return f"{kind}: file before whole"


def restored(name: str, folder: Path, damage: str) -> str:
    """Load a checkpoint that is truncated, hostile, of another optimizer or another version."""
    run, path = Run(name).train(range(STRIKES)), folder / "state.pt"
    witness = folder / "witness"
    saved = run.optimizer.state_dict()
    if damage == "hostile pickle":
        saved["state"][0]["more"] = Hostile(str(witness))
    if damage == "of another version":
        del saved["param_groups"][0]["fallback_lr"]
    if damage == "of another optimizer":
        other = "RACS" if name != "RACS" else "RMNP"
        saved = Run(other).train(range(STRIKES)).optimizer.state_dict()
    torch.save(saved, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    fresh = Run(name).train(range(3))
    before = fresh.bits()
    try:
        fresh.optimizer.load_state_dict(torch.load(path, weights_only=True))
    except (CheckpointError, pickle.UnpicklingError, RuntimeError, OSError) as error:
        kind = type(error).__name__
    else:
        assert damage == "none", "it was loaded"
        kind = "loads with weights_only"
        fresh.model.load_state_dict(run.model.state_dict())
        assert same(fresh.bits(), run.bits())
        return kind
    assert not witness.exists(), "the pickle ran"
    assert same(fresh.bits(), before), "something changed"
    return f"{kind}: as before"


class _Dying(Dataset[int]):
    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> int:
        if index == STRIKES:
            os._exit(1)
        return index


def dying_worker(name: str, folder: Path) -> str:
    """Lose a loader's worker process; the weights must be those after the batches before."""
    run = Run(name)
    try:
        for number in DataLoader(_Dying(), batch_size=None, num_workers=1):
            run.train([int(number)])
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
    else:
        raise AssertionError("the worker did not die")
    # The loss of the worker may be noticed a batch early.
    twins = [Run(name).train(range(n)).bits() for n in range(STRIKES + 1)]
    assert any(same(run.bits(), twin) for twin in twins)
    assert run.hooks() == 0
    return "RuntimeError: as before"


def precision(name: str, folder: Path, kind: str) -> str:
    """Train with low precision: finite weights that move, wide statistics, an exact resume."""
    dtype = torch.bfloat16 if kind == "bfloat16 parameters" else torch.float32
    cast = torch.float16 if kind == "autocast float16" else torch.bfloat16
    context: Any = None if dtype != torch.float32 else torch.autocast("cpu", cast)
    run = Run(name, dtype).train(range(3), context=context)
    first = Run(name, dtype).train(range(2), context=context)
    second = Run(name, dtype)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train([2], context=context)
    assert same(run.bits(), second.bits()), "a resumed run differs"
    weights = list(run.model.parameters())
    assert all(p.isfinite().all() and p.dtype == dtype for p in weights)
    assert not same([*map(bits, weights)], [*map(bits, Run(name, dtype).model.parameters())])
    tensors = [v for s in run.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert all(t.dtype != torch.bfloat16 for t in tensors if t.ndim), "statistics were rounded"
    return "trains, resumes"


def overflow(name: str, folder: Path) -> str:
    """Let a GradScaler overflow: the step it leaves out must leave no trace."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    settings = {"loss_scale": scaler.get_scale} if OPTIMIZERS[name][0] == "neurms" else {}
    try:
        run = Run(name, **settings)
    except ValueError as error:
        if "GradScaler" not in str(error):
            raise
        return "ValueError: refused"
    fresh = Run(name, **settings).bits()
    for number in range(3):
        inputs, targets = batch(number)
        far = targets + (1e4 if number == 0 else 0.0)
        scaler.scale(mse_loss(run.model(inputs), far)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        if number == 0:
            assert same(run.bits(), fresh), "the overflow left a trace"
    assert same(run.bits(), Run(name).train([1, 2]).bits()), "the scale is not divided out"
    return "skipped"
