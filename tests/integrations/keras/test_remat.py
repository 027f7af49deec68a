"""Layers whose activations, or whole calls, are computed again in backward count once."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from neurms.integrations.keras import keras_neurms

X = np.random.default_rng(7).normal(size=(6, 9, 9, 2)).astype("float32")
Y = np.random.default_rng(8).normal(size=(6, 3)).astype("float32")


def trained(variant: str, scope: dict[str, Any] | None, accumulate: int | None = None) -> Any:
    """Return a model after two steps: a convolution, a layer used twice, a head."""
    keras.utils.set_random_seed(4)
    with keras.RematScope(**(scope or {"mode": None})):
        images = keras.Input((9, 9, 2))
        hidden = layers.Conv2D(5, 3, activation="relu", name="conv")(images)
        hidden = layers.GlobalAveragePooling2D()(hidden)
        twice = layers.Dense(5, activation="tanh", name="twice")
        model = keras.Model(images, layers.Dense(3, name="head")(twice(twice(hidden))))
    optimizer = keras_neurms(1e-2, variant, gradient_accumulation_steps=accumulate)
    model.compile(optimizer=optimizer, loss="mse")
    for _ in range(2):
        model.train_on_batch(X, Y)
    return model


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize(
    "scope",
    [
        {"mode": "full"},
        {"mode": "activations"},
        {"mode": "list_of_layers", "layer_names": ["conv", "twice"]},
    ],
)
def test_rematerialised_layers_train_as_plain_ones(variant: str, scope: dict[str, Any]) -> None:
    plain, again = trained(variant, None), trained(variant, scope)
    for a, b in zip(plain.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-7)


def test_rows_count_once() -> None:
    model = trained("F", {"mode": "activations"}, accumulate=3)
    rows = {x.route.module.name: x.pending.rows for x in model.optimizer.layers}
    assert rows == {"conv": 2 * 6 * 7 * 7, "twice": 2 * 2 * 6, "head": 2 * 6}
