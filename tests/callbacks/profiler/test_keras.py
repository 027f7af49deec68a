"""The profiler in Keras's fit: statistics, logs, files, and nothing left behind."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

from neurms.callbacks.keras import PreconditionerProfiler
from neurms.core.ground import spans
from neurms.integrations.keras import keras_neurms, keras_optimizer, keras_racs
from neurms.report import ProfilerReport, read_run
from neurms.report.writer import PAGE
from tests.callbacks.profiler import truth

X = np.random.default_rng(0).normal(size=(24, 12)).astype("float32") * np.linspace(0.2, 3, 12)
Y = np.random.default_rng(1).integers(4, size=24)


def network(optimizer: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((12,)),
            keras.layers.Dense(16, activation="tanh", name="first"),
            keras.layers.Dense(4, name="last"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 2) -> Any:
    x = X.astype("float32")
    return model.fit(
        x, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    )


def profiler(**settings: Any) -> PreconditionerProfiler:
    common = {"every_n_steps": 1, "warmup_steps": 0, "print_table": False}
    return PreconditionerProfiler(**(common | settings))


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "neurms": lambda: keras_neurms(variant="F"),
    "B": lambda: keras_neurms(variant="B"),
    "racs": keras_racs,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_is_bit_identical_and_every_optimizer_is_measured(name: str) -> None:
    watched, alone = (network(OPTIMIZERS[name]()) for _ in range(2))
    watcher = profiler(every_n_steps=2, warmup_steps=1)
    fit(watched, watcher)
    fit(alone)
    for a, b in zip(watched.get_weights(), alone.get_weights(), strict=True):
        assert np.array_equal(a, b)
    report = watcher.report()
    assert report.steps == [1, 3, 5]
    assert [row.layer for row in report] == ["first", "last"]
    for row in report:
        assert row.forward_us > 0
        assert row.backward_us > 0
        assert row.update_us > 0
        assert row.rho is not None
        assert row.rows == 8
        if name not in ("neurms", "B"):
            assert row.dominance_of == ("gradient" if name == "racs" else "momentum") or (
                row.layer == "last"
            )
    assert report[0].shape == (12, 16)
    assert (report[0].units, report[0].features) == (16, 12)
    assert report[0].state_bytes > 0
    assert (report[0].scale_us > 0) == (name in ("neurms", "B", "racs"))


def test_statistics_equal_float64_truth() -> None:
    """One step by hand: D of the pre-activation, from the chain rule."""
    model = network(keras.optimizers.SGD(0.0))
    watcher = profiler()
    model.fit(X.astype("float32"), Y, batch_size=24, verbose=0, callbacks=[watcher])
    w1, b1, w2, b2 = (np.asarray(w, dtype=np.float64) for w in model.get_weights())
    h = np.tanh(X @ w1 + b1)
    logits = h @ w2 + b2
    p = np.exp(logits - logits.max(1, keepdims=True))
    d2 = (p / p.sum(1, keepdims=True) - np.eye(4)[Y]) / 24
    d1 = d2 @ w2.T * (1 - h**2)
    for name, d, inputs in (("first", d1, X), ("last", d2, h)):
        window = {"d": d, "h": inputs, "g": d.T @ inputs}
        values = watcher.profiler.samples[0]["layers"][name]
        v, u = truth.moments(window)
        assert values["rho"] == pytest.approx(truth.rho(window["g"], v, u), abs=1e-5)
        assert values["v"] == pytest.approx(truth.quantiles(v), rel=1e-4)
        assert values["u"] == pytest.approx(truth.quantiles(u), rel=1e-5)
        assert values["factorization_error"] == pytest.approx(truth.error(window), rel=1e-4)
        assert values["dominance"][:3] == pytest.approx(truth.dominance(window["g"]), rel=1e-4)


def test_numbers_reach_history_and_batch_logs() -> None:
    seen: list[dict[str, float]] = []

    class Reader(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(dict(logs))

    watcher = profiler(every_n_steps=2)
    history = fit(network("adam"), watcher, Reader()).history
    for name in ("neurms/rho", "neurms/overhead", "neurms/first/rho", "neurms/last/overhead"):
        assert len(history[name]) == 2
    assert history["neurms/first/rho"][0] == pytest.approx(
        np.mean([r for _, r in watcher.report().history("first", "rho")][:2])
    )
    assert ["neurms/rho" in logs for logs in seen[:3]] == [True, False, True]


def test_convolutions_and_the_run_file(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            keras.layers.Input((6, 6, 3)),
            keras.layers.Conv2D(5, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(4, name="head"),
        ]
    )
    model.compile(optimizer=keras_neurms(), loss="mse")
    watcher = profiler(output=tmp_path / "run", layers=["conv"])
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype("float32")
    model.fit(images, np.ones((8, 4)), batch_size=4, verbose=0, callbacks=[watcher])
    (row,) = watcher.report()
    assert row.rows == 4 * 16
    assert row.rho is not None
    assert row.width == 5
    run = read_run(tmp_path / "run")
    assert run.finished
    assert len(run.samples) == 2


@pytest.mark.parametrize("rule", ["neurms", "racs", "rmnp", "alice"])
def test_memory_is_forecast_as_it_is_measured(rule: str) -> None:
    watcher, model = profiler(), network(keras_optimizer(rule))
    fit(model, watcher, epochs=1)
    forecast = watcher.report().run.totals["memory"]
    assert forecast[rule] == model.optimizer.state_bytes()
    assert forecast["adamw"] == sum(2 * 4 * np.prod(w.shape) + 4 for w in model.get_weights())
    assert model.get_layer("first").activation is keras.activations.tanh


def test_an_error_in_fit_leaves_no_hooks_after_the_next_one() -> None:
    model, watcher = network("adam"), profiler()

    class Failing(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(model, watcher, Failing())
    fit(model, watcher)
    layer = model.get_layer("first")
    assert not layer._forward_hooks
    assert layer.activation is keras.activations.tanh
    assert "apply" not in vars(model.optimizer)
    assert spans._observer is None


def test_bad_names_and_settings() -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        fit(network("adam"), profiler(layers=["encoder"]))
    with pytest.raises(ValueError, match="every_n_steps=0"):
        profiler(every_n_steps=0)
    with pytest.raises(RuntimeError, match="has seen no training yet"):
        profiler().report()
    assert torch.is_grad_enabled()


def test_a_loaded_model_goes_on_with_its_run_and_another_is_numbered(tmp_path: Path) -> None:
    output, saved = tmp_path / "run", tmp_path / "model.keras"
    model = network("adam")
    fit(model, profiler(output=output))
    model.save(saved)
    resumed = keras.models.load_model(saved)
    fit(resumed, profiler(output=output), epochs=1)
    assert ProfilerReport.read(output).steps == list(range(9))
    fit(network("adam"), profiler(output=output), epochs=1)
    assert ProfilerReport.read(tmp_path / "run-2").steps == [0, 1, 2]
    fit(network("adam"), profiler(output=output, overwrite=True), epochs=1)
    assert ProfilerReport.read(output).steps == [0, 1, 2]
    assert (output / PAGE).is_file()


def test_a_fit_shorter_than_the_warmup_says_so() -> None:
    with pytest.warns(UserWarning, match=r"is empty: 3 steps were trained.*warmup_steps=10"):
        fit(network("adam"), profiler(warmup_steps=10), epochs=1)


# -------------------------------------------------------------------- curves and the page


class Batches(keras.callbacks.Callback):
    """The loss of each batch before its step, computed anew."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        at = slice(8 * batch, min(8 * batch + 8, 20))
        with torch.no_grad():
            logits = self.model(X[at].astype("float32"))
        target = torch.tensor(Y[at])
        self.losses.append(float(torch.nn.functional.cross_entropy(logits, target)))


def test_curves_are_the_losses_of_batches_and_the_metrics_of_epochs(tmp_path: Path) -> None:
    model, watcher, batches = network(keras_racs()), profiler(output=tmp_path / "run"), Batches()
    # The last batch of an epoch is a small one.
    history = model.fit(
        *(X[:20], Y[:20]),
        validation_data=(X[20:], Y[20:]),
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[batches, watcher],
    ).history
    logged = ProfilerReport.read(tmp_path / "run").run.logged
    assert logged.keys() == {"train loss", "val_loss"}
    assert [step for step, _ in logged["train loss"]] == list(range(6))
    assert [v for _, v in logged["train loss"]] == pytest.approx(batches.losses, rel=1e-5)
    assert [step for step, _ in logged["val_loss"]] == [3, 6]
    assert [v for _, v in logged["val_loss"]] == pytest.approx(history["val_loss"], rel=1e-6)


def test_progress_bars_get_two_values_and_history_the_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handed: list[dict[str, float]] = []
    model, watcher = network("adam"), profiler(output=tmp_path / "run", log=handed.append)
    history = model.fit(X, Y, batch_size=8, epochs=2, verbose=2, callbacks=[watcher]).history
    assert len(history["neurms/first/rho"]) == len(history["neurms/rho"]) == 2
    shown = capsys.readouterr().out
    assert "neurms/rho" in shown
    assert "neurms/first" not in shown
    assert [x for x in shown.splitlines() if x.startswith("report:")] == [
        f"report: {tmp_path / 'run' / PAGE} (neurms report {tmp_path / 'run'} shows it in a "
        "terminal)"
    ]
    assert len(handed) == 6
    assert handed[0]["neurms/first/rho"] == watcher.report().history("first", "rho")[0][1]


def test_a_train_step_that_keeps_no_loss_has_the_curves_of_its_epochs() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(4)

        def call(self, inputs: Any) -> Any:
            return self.first(inputs)

        def train_step(self, data: Any) -> dict[str, Any]:
            loss = self.compute_loss(y=data[1], y_pred=self(data[0], training=True))
            self.zero_grad()
            loss.backward()
            variables = self.trainable_variables
            self.optimizer.apply([v.value.grad for v in variables], variables)
            return {"loss": loss.detach()}

    model, watcher = Own(), profiler()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model(X[:1].astype("float32"))
    history = fit(model, watcher).history
    found = watcher.report().run.logged["train loss"]
    assert [step for step, _ in found] == [3, 6]
    assert [value for _, value in found] == pytest.approx(history["loss"])


def test_only_the_first_rank_writes_and_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurms.callbacks.profiler.keras._is_first_rank", lambda: False)
    watcher = profiler(output=tmp_path / "run", print_table=True)
    fit(network("adam"), watcher)
    assert watcher.report().steps == list(range(6))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""
