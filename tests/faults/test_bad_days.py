"""What the fault matrix found, one test each: the page tells all of it, these run every time."""

from __future__ import annotations

import copy
import math
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.core.ground.errors import (
    CheckpointError,
    NonFiniteError,
    UnsupportedTrainingError,
    check_kinds,
)
from neurms.core.optimizers import fallback
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from tests.core.optimizers.training import RULES, assert_same_state, make, small_model
from tests.core.optimizers.training import train as train_small
from tests.core.unitwise.neurms_models import (
    assert_same,
    batches,
    cross_entropy,
    mlp,
    pair,
    snapshot,
    train,
    vectors,
)


@pytest.mark.parametrize("rule", RULES)
def test_ctrl_c_in_a_step_comes_after_it(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = small_model(), small_model()
    optimizer, other = make(rule, model), make(rule, twin)
    train_small(twin, other, 1)
    original = fallback.adamw_update_

    def pressed(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        original(*args, **kwargs)

    monkeypatch.setattr(fallback, "adamw_update_", pressed)
    with pytest.raises(KeyboardInterrupt):
        train_small(model, optimizer, 1)
    assert_same_state(dict(model.state_dict()), dict(twin.state_dict()))
    assert_same_state(optimizer.state_dict(), other.state_dict())


class TestHooksRemovedByTheUser:
    def test_the_step_is_refused(self) -> None:
        model, optimizer = pair()
        train(model, optimizer, batches(2))
        for module in model.modules():
            module._forward_hooks.clear()
        x, y = vectors()
        cross_entropy(model, x, y).backward()
        before = snapshot(model, optimizer)
        with pytest.raises(UnsupportedTrainingError, match=r"tap of layer '0\.weight' was removed"):
            optimizer.step()
        assert_same(before, snapshot(model, optimizer))
        optimizer.detach()
        optimizer.step()  # asked for: on with the statistics it has

    def test_a_preconditioner_refuses_too(self) -> None:
        model = mlp()
        preconditioner = GradientPreconditioner(model, variant="U")
        for module in model.modules():
            module._forward_hooks.clear()
        x, y = vectors()
        cross_entropy(model, x, y).backward()
        with pytest.raises(UnsupportedTrainingError, match="forward hooks cleared"):
            preconditioner.precondition_(model.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_a_step_inside_autocast_is_the_same_step(rule: str) -> None:
    results = []
    for inside in (False, True):
        model = small_model()
        optimizer = make(rule, model)
        inputs, targets = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1)), [0]
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(inputs).float(), torch.tensor(targets * 5))
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
            optimizer.zero_grad()
        results.append((dict(model.state_dict()), optimizer.state_dict()))
    assert_same_state(*results)


def test_a_statistic_that_no_decomposition_takes_is_told() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = neurms.BlockAdam([weight], lr=1e-3, interval=1)
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    optimizer.state[weight]["second_moment"].fill_(math.inf)
    with pytest.raises(NonFiniteError, match="broken off half done; load the last checkpoint"):
        optimizer.step()


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (math.nan, "holds a NaN"),
            (math.inf, "holds a NaN or an infinity"),
        ],
    )
    def test_bad_numbers(self, value: float, message: str) -> None:
        model = small_model()
        optimizer = make("racs", model)
        train_small(model, optimizer, 2)
        saved = optimizer.state_dict()
        key = next(k for k, v in saved["state"][2].items() if torch.is_tensor(v) and v.ndim)
        bad = copy.deepcopy(saved)
        bad["state"][2][key].flatten()[0] = value
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state_dict(bad)
        assert_same_state(optimizer.state_dict(), saved)

    @pytest.mark.parametrize("damage", [-1, -5])
    def test_a_step_count_that_no_run_reaches(self, damage: int) -> None:
        model = small_model()
        optimizer = make("rmnp", model)
        train_small(model, optimizer, 2)
        bad = copy.deepcopy(optimizer.state_dict())
        bad["state"][2]["step"] = damage
        with pytest.raises(CheckpointError, match=f"'step' .* is {damage}, which no run"):
            optimizer.load_state_dict(bad)

    @pytest.mark.parametrize(
        "change",
        [
            lambda s: s.update(layers=3),
            lambda s: s.update(skipped_steps=-1),
            lambda s: s["layers"]["0.weight"].update(step=2.0),
            lambda s: s["layers"].update({"0.weight": 7}),
            lambda s: s["layers"]["0.weight"].update(
                v=s["layers"]["0.weight"]["v"].double()
                if "v" in s["layers"]["0.weight"]
                else torch.ones(1)
            ),
        ],
    )
    def test_a_preconditioners_own(self, change: Any) -> None:
        model = mlp()
        preconditioner = GradientPreconditioner(model, variant="U")
        x, y = vectors()
        cross_entropy(model, x, y).backward()
        preconditioner.precondition_(model.parameters())
        kept = copy.deepcopy(preconditioner.state_dict())
        bad = copy.deepcopy(kept)
        change(bad)
        with pytest.raises(CheckpointError):
            preconditioner.load_state_dict(bad)
        assert_same_state(preconditioner.state_dict(), kept)


@pytest.mark.parametrize(
    ("default", "value", "error"),
    [
        (True, 1, TypeError),
        (3, True, TypeError),
        (3, 2.0, TypeError),
        (0.5, "0.5", TypeError),
        (0.5, None, TypeError),
        (0.5, {}, TypeError),
        (0.5, math.nan, ValueError),
        ("a", 1, TypeError),
        ((0.9,), 0.9, TypeError),
    ],
)
def test_kinds_of_settings(default: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="some="):
        check_kinds({"some": default}, {"some": value})
    check_kinds({"some": default}, {"some": default})
    check_kinds({"some": default}, {"some": None}, optional=("some",))


def test_lightning_resumed_without_the_callbacks_statistics(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from neurms.callbacks import NeuRMSCallback
    from tests.callbacks.lightning_runs import Classifier, data, trainer

    before = trainer(max_epochs=1)
    before.fit(Classifier(), data())
    before.save_checkpoint(tmp_path / "last.ckpt")
    after = trainer(NeuRMSCallback(variant="U"), max_epochs=2)
    with pytest.warns(UserWarning, match="saved without NeuRMSCallback's statistics"):
        after.fit(Classifier(), data(), ckpt_path=tmp_path / "last.ckpt")
    after.save_checkpoint(tmp_path / "next.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*NeuRMSCallback's statistics")
        last = trainer(NeuRMSCallback(variant="U"), max_epochs=3)
        last.fit(Classifier(), data(), ckpt_path=tmp_path / "next.ckpt")


def test_keras_ctrl_c_comes_after_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    keras = pytest.importorskip("keras")
    from neurms.integrations.keras import keras_neurms

    weights = []
    for press in (False, True):
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        layers = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.LayerNormalization()]
        model = keras.Sequential([*layers, keras.layers.Dense(2)])
        model.compile(keras_neurms(learning_rate=0.1, variant="U"), loss="mse")
        original = fallback.adamw_update_

        def pressed(*args: Any, own: Any = original, **kwargs: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            own(*args, **kwargs)

        if press:
            monkeypatch.setattr(fallback, "adamw_update_", pressed)
        inputs = torch.arange(12.0).view(4, 3).numpy()
        try:
            model.train_on_batch(inputs, inputs[:, :2])
            assert not press
        except KeyboardInterrupt:
            assert press
        weights.append([v.numpy() for v in (*model.weights, *model.optimizer.variables)])
    for first, second in zip(*weights, strict=True):
        assert (first == second).all()
