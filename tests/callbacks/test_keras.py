"""What the Keras callback logs, and where it shows."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import csv
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from neurms.callbacks.keras import NeuRMSCallback
from neurms.core.unitwise.scale_summary import scale_summary
from neurms.integrations.keras import keras_neurms

X, Y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")


def model_with(optimizer: Any) -> Any:
    model = keras.Sequential([layers.Input((4,)), layers.Dense(3), layers.Dense(2)])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def test_scalars_reach_history_and_files(tmp_path: Path) -> None:
    model = model_with(keras_neurms(variant="F", s_max=10.0))
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = model.fit(X, Y, epochs=2, verbose=0, callbacks=[NeuRMSCallback(), log]).history
    names = {"neurms/clipped_fraction", "neurms/scale_median", "neurms/feature_scale_median"}
    assert names <= set(history)
    assert history["neurms/feature_scale_median"][0] == pytest.approx(1.0, abs=0.5)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["neurms/scale_median"]) for row in rows] == history["neurms/scale_median"]


def test_the_clipped_fraction_is_the_share_at_a_bound() -> None:
    model = model_with(keras_neurms(s_max=1e-6))
    history = model.fit(X, Y, verbose=0, callbacks=[NeuRMSCallback()]).history
    assert history["neurms/clipped_fraction"] == [1.0]
    assert history["neurms/scale_median"] == [pytest.approx(1e-6)]


def test_batch_logs_every_n_steps() -> None:
    seen: list[bool] = []

    class Look(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append("neurms/scale_median" in logs)

    model = model_with(keras_neurms())
    callbacks = [NeuRMSCallback(every_n_steps=2), Look()]
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=callbacks)
    assert seen == [False, True, False, True]


def test_under_a_loss_scale() -> None:
    model = model_with(keras.optimizers.LossScaleOptimizer(keras_neurms()))
    history = model.fit(X, Y, verbose=0, callbacks=[NeuRMSCallback()]).history
    assert "neurms/scale_median" in history


def test_another_optimizer_is_refused() -> None:
    model = model_with("sgd")
    with pytest.raises(TypeError, match=r"compiled with SGD; compile it with .*keras_neurms"):
        model.fit(X, Y, verbose=0, callbacks=[NeuRMSCallback()])


def test_steps_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        NeuRMSCallback(every_n_steps=0)


def test_variant_p_has_factors_of_units_and_features() -> None:
    model = model_with(keras_neurms(variant="P"))
    history = model.fit(X, Y, epochs=2, verbose=0, callbacks=[NeuRMSCallback()]).history
    found = scale_summary(model.optimizer.engine.optimizer.moment_layers())
    for name, value in found.items():
        assert history[f"neurms/{name}"][-1] == pytest.approx(float(value))
    assert "feature_scale_median" in found
