"""The fault matrix's cells for ``keras.Model.fit``."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import signal
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import keras
import torch

from benchmarks.faults.cases import BATCHES, LR, OPTIMIZERS, STRIKES, batch, bits, no_space, same
from benchmarks.faults.faults import FAULTS, Parts, Saboteur
from benchmarks.faults.keras_recipes import AtomicSave
from neurms.integrations.keras import keras_optimizer

NAMES = tuple(name for name in OPTIMIZERS if name != "NeuRMS backward")
PARTS: list[Parts] = [Parts()]
"""Where the network of the run in hand can be hurt; layers loaded from files look here too."""


@keras.saving.register_keras_serializable("neurms_faults")
class Passing(keras.layers.Layer):
    """A layer in which a fault may sit."""

    def __init__(self, place: str, **others: Any) -> None:
        super().__init__(**others)
        self.place = place

    def call(self, inputs: Any) -> Any:
        """Return what the saboteur makes of it."""
        saboteur: Saboteur = getattr(PARTS[0], self.place)
        return saboteur(inputs)

    def get_config(self) -> dict[str, Any]:
        """Return what makes the layer again."""
        return {**super().get_config(), "place": self.place}


class Batches(keras.utils.PyDataset):
    """The batches of these numbers; one of them may end the process that asks for it."""

    def __init__(self, numbers: list[int], deadly: int = -1, far: bool = False) -> None:
        super().__init__()
        self.numbers, self.deadly, self.far = numbers, deadly, far

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        if self.numbers[index] == self.deadly:
            raise RuntimeError("the loader's worker died")
        inputs, targets = batch(self.numbers[index])
        if self.far and self.numbers[index] == 0:
            targets = targets + 1e4
        return inputs.numpy(), targets.numpy()


class Strike(keras.callbacks.Callback):
    """Holds a fault over one batch and notes the state before it."""

    def __init__(self, run: Run, fault: Any) -> None:
        super().__init__()
        self.run, self.fault, self.stack, self.seen = run, fault, ExitStack(), None
        self.before: Any = None

    def on_train_batch_begin(self, number: int, logs: Any = None) -> None:
        """Begin."""
        if number == STRIKES:
            self.before = self.run.bits()
            self.stack.enter_context(self.fault(PARTS[0]))

    def on_train_batch_end(self, number: int, logs: Any = None) -> None:
        """End."""
        self.stack.close()


class Run:
    """A compiled model; ``fit`` is one call with what came of it."""

    def __init__(
        self,
        name: str,
        file: Path | None = None,
        dtype: str = "float32",
        scaled: bool = False,
        **settings: Any,
    ) -> None:
        PARTS[0] = Parts()
        self.error: BaseException | None = None
        self.strike: Strike | None = None
        if file is not None:
            self.model = keras.models.load_model(file)
            return
        # Layers get the same names, of which random draws depend, in every run.
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        layers: list[Any] = [
            keras.layers.Dense(6, activation="tanh", dtype=dtype),
            Passing("middle"),
            keras.layers.Dense(6, dtype=dtype),
            keras.layers.LayerNormalization(dtype=dtype),
            keras.layers.Dense(3, dtype=dtype),
            Passing("end"),
        ]
        self.model = keras.Sequential([keras.Input((8,)), *layers])
        kind, own = OPTIMIZERS[name]
        optimizer = keras_optimizer(kind, learning_rate=LR, **{**own, **settings})
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**120)
        self.model.compile(optimizer=optimizer, loss="mse", auto_scale_loss=False)

    def fit(
        self,
        numbers: list[int],
        fault: Any = None,
        file: Path | None = None,
        extra: tuple[Any, ...] = (),
        **data: Any,
    ) -> Run:
        """Train on these batches."""
        PARTS[0].weight = self.model.layers[2].kernel.value
        PARTS[0].model = self.model
        self.strike = Strike(self, fault) if fault else None
        callbacks = [*([self.strike] if self.strike else []), *extra]
        callbacks += [AtomicSave(file, 1)] if file else []
        try:
            self.model.fit(Batches(numbers, **data), verbose=0, shuffle=False, callbacks=callbacks)
        except AssertionError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
        finally:
            if self.strike:
                self.strike.stack.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def bits(self) -> Any:
        """Return weights and state."""
        variables = [*self.model.weights, *self.model.optimizer.variables]
        return bits([torch.as_tensor(v.value).detach() for v in variables])

    def taps(self) -> int:
        """Return how many layers have a stand-in for their activation or call."""
        own = [vars(layer) for layer in self.model.layers]
        names = [getattr(o.get("activation"), "__qualname__", "") for o in own]
        return sum("ActivationTap" in name for name in names) + sum("call" in o for o in own)


EVERYTHING = list(range(BATCHES))


@cache
def _whole(name: str) -> Any:
    """Return the end of a run to which nothing happens."""
    return Run(name).fit(EVERYTHING).bits()


@cache
def _without(name: str) -> Any:
    """Return the end of a run that never sees the batch at which faults strike."""
    return Run(name).fit([number for number in EVERYTHING if number != STRIKES]).bits()


def _resumes(name: str, file: Path) -> None:
    run = Run(name, file)
    done = int(run.model.optimizer.iterations)
    run.fit(EVERYTHING[done:])
    assert run.error is None, repr(run.error)
    assert same(run.bits(), _whole(name)), "the resumed run differs"


def _named(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: "


def struck(name: str, fault: str, folder: Path, **settings: Any) -> str:
    """Return what comes of a fault in the middle of a step."""
    file = folder / "last.keras"
    run = Run(name, **settings).fit(EVERYTHING, FAULTS[fault], file)
    assert run.taps() == 0, "a tap was left behind"
    assert run.strike is not None
    if run.error is None and settings:
        # Keras counts the iteration that is left out, and nothing else of it.
        weights = len(run.model.weights)
        found, wanted = run.bits(), _without(name)
        assert same(found[:weights], wanted[:weights]), "the step was not skipped"
        return "skipped"
    if run.error is None:
        assert same(run.bits(), _whole(name)), "something changed"
        return "no effect"
    _resumes(name, file)
    after = run.bits()
    alike = same(after, run.strike.before)
    finished = alike or same(after, Run(name).fit(EVERYTHING[: STRIKES + 1]).bits())
    assert finished, f"{run.error!r} left something changed"
    return f"{_named(run.error)}{'as before' if alike else 'step finished'}, resumes"


class _Full(keras.callbacks.Callback):
    """Fills the disk from one batch on."""

    stack = ExitStack()

    def on_train_batch_begin(self, number: int, logs: Any = None) -> None:
        """Fill."""
        if number == STRIKES:
            self.stack.enter_context(no_space())


def full_disk(name: str, folder: Path) -> str:
    """Save while the disk is full."""
    file, disk = folder / "last.keras", _Full()
    try:
        run = Run(name).fit(EVERYTHING, file=file, extra=(disk,))
    finally:
        disk.stack.close()
    assert isinstance(run.error, (OSError, RuntimeError)), f"the disk was not full: {run.error!r}"
    assert run.taps() == 0
    _resumes(name, file)
    return f"{_named(run.error)}resumes"


def restored(name: str, folder: Path, damage: str) -> str:
    """Load a file that is truncated, hostile or of another optimizer or version."""
    file = folder / "last.keras"
    Run(name).fit(EVERYTHING, FAULTS["exception in forward"], file)
    if damage == "none":
        _resumes(name, file)
        return "loads"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if damage == "hostile pickle":
        layers = [keras.Input((8,)), keras.layers.Lambda(lambda x: x), keras.layers.Dense(3)]
        hostile = keras.Sequential(layers)
        hostile.compile(keras_optimizer(OPTIMIZERS[name][0], learning_rate=LR), loss="mse")
        hostile.save(file)
    try:
        if damage in ("truncated", "hostile pickle"):
            Run(name, file)
        else:
            _load_foreign(name, damage)
    except AssertionError:
        raise
    except Exception as error:
        return _named(error).rstrip(": ")
    raise AssertionError("it was loaded")


def _load_foreign(name: str, damage: str) -> None:
    other = name if damage == "of another version" else ("RACS" if name != "RACS" else "RMNP")
    source = Run(other).fit([0]).model.optimizer
    store = {str(i): v.numpy() for i, v in enumerate(source.variables)}
    if damage == "of another version":
        store.popitem()
    run = Run(name).fit([0])
    before = run.bits()
    try:
        run.model.optimizer.load_own_variables(store)
    finally:
        assert same(run.bits(), before), "something changed"


def dying_worker(name: str, folder: Path) -> str:
    """Lose what loads the data."""
    file = folder / "last.keras"
    run = Run(name).fit(EVERYTHING, file=file, deadly=STRIKES)
    assert isinstance(run.error, RuntimeError)
    assert run.taps() == 0
    _resumes(name, file)
    return f"{_named(run.error)}resumes"


def precision(name: str, folder: Path, kind: str) -> str:
    """Train with low precision."""
    dtypes = {
        "bfloat16 parameters": "bfloat16",
        "autocast bfloat16": "mixed_bfloat16",
        "autocast float16": "mixed_float16",
    }
    run = Run(name, dtype=dtypes[kind]).fit([0, 1, 2])
    if run.error is not None:
        raise run.error
    assert all(bool(torch.isfinite(v.value).all()) for v in run.model.weights)
    assert run.taps() == 0
    return "trains"


def overflow(name: str, folder: Path) -> str:
    """Let Keras's LossScaleOptimizer overflow."""
    run = Run(name, scaled=True)
    run.model.optimizer.build(run.model.trainable_variables)
    before = bits([v.value.detach() for v in run.model.weights])
    run.fit([0], far=True)
    if run.error is not None:
        raise run.error
    after = bits([v.value.detach() for v in run.model.weights])
    assert same(before, after), "the overflow left a trace"
    run.fit([1, 2])
    if run.error is not None:
        raise run.error
    twin = Run(name).fit([1, 2])
    found = [v.value.detach() for v in run.model.weights]
    wanted = [v.value.detach() for v in twin.model.weights]
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True)
    )
    return "skipped"
