"""Several optimizers for one model: a MultiOptimizer, attributes, lists and dicts, parts' own."""

import gc
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.integrations.keras import keras_neurms, keras_optimizer, keras_racs
from neurms.integrations.keras.owners import Surroundings

X = np.random.default_rng(2).normal(size=(20, 7)).astype("float32")
Y = np.random.default_rng(3).normal(size=(20, 2)).astype("float32")
optimizers = keras.optimizers
needs_multi = pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer"
)


def nested() -> Any:
    """Return a model around an encoder that is a model itself."""
    keras.utils.set_random_seed(6)
    first, second = keras.Input((7,)), keras.Input((7,))
    inner = layers.Dense(6, activation="tanh")(first)
    encoder = keras.Model(first, layers.Dense(5, name="last")(inner), name="encoder")
    return keras.Model(second, layers.Dense(2, name="top")(encoder(second)))


def split(body: Any, top: Any) -> Any:
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(body, {r"(.*/)?top/.*": top}))


def fit(model: Any, epochs: int = 1) -> Any:
    model.fit(X, Y, epochs=epochs, batch_size=10, shuffle=False, verbose=0)
    return model


def routes(optimizer: Any) -> list[tuple[str, str]]:
    return [(row.name, row.rule) for row in optimizer.plan()]


@needs_multi
@pytest.mark.parametrize("rule", ["neurms", "racs", "soap", "muon"])
def test_a_loaded_model_routes_and_trains_as_before(rule: str, tmp_path: Path) -> None:
    model = nested()
    model.compile(split(keras_optimizer(rule, 0.01), keras_racs(0.02)), "mse")
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    pairs = list(zip(model.optimizer.optimizers, loaded.optimizer.optimizers, strict=True))
    assert all(routes(a) == routes(b) for a, b in pairs)
    # The encoder's last layer is not the network's head, though its variables are all there is.
    assert (("encoder/last/kernel", rule)) in routes(model.optimizer.optimizers[1])
    for a, b in zip(fit(model).get_weights(), fit(loaded).get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@needs_multi
def test_parts_train_as_one_optimizer_does() -> None:
    whole, parts, scaled = nested(), nested(), nested()
    whole.compile(keras_neurms(0.01, variant="U"), "mse")
    parts.compile(split(keras_neurms(0.01, variant="U"), keras_neurms(0.01, variant="U")), "mse")
    inner = split(keras_neurms(0.01, variant="U"), keras_neurms(0.01, variant="U"))
    scaled.compile(optimizers.LossScaleOptimizer(inner), "mse")
    expected = fit(whole, 3).get_weights()
    for model in (parts, scaled):
        for a, b in zip(expected, fit(model, 3).get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@needs_multi
def test_the_plan_of_a_part_leaves_others_variables_out() -> None:
    model = nested()
    model.layers[1].layers[1].trainable = False
    model.compile(split(keras_racs(), keras_racs()), "mse")
    fit(model)
    top, body = model.optimizer.optimizers
    assert {row.reason for row in top.plan() if "encoder/last" in row.name} == set()
    assert [row.reason for row in body.plan()][-2:] == ["frozen", "frozen"]


@needs_multi
@pytest.mark.parametrize("wrap", [optimizers.OptimizerMap, None])
def test_functional_updates_are_refused_and_change_nothing(wrap: Any) -> None:
    model, optimizer = nested(), keras_racs()
    if wrap:
        optimizer = optimizers.MultiOptimizer(wrap(optimizer))
    optimizer.build(model.trainable_variables)
    before = [v.numpy().copy() for v in (*model.weights, *optimizer.variables)]
    values = [v.value for v in model.trainable_variables]
    with pytest.raises(NotImplementedError, match="no functional form"):
        optimizer.stateless_apply(
            [v.value for v in optimizer.variables], [torch.ones_like(v) for v in values], values
        )
    after = [v.numpy() for v in (*model.weights, *optimizer.variables)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


class Pair(keras.Model):  # type: ignore[misc]
    """Two parts with an optimizer each, which are held in one way or another."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.parts = [
            keras.Sequential([keras.Input((7,)), layers.Dense(3, "relu"), layers.Dense(2)])
            for _ in range(2)
        ]
        pair = [keras_neurms(0.01, variant="U") for _ in self.parts]
        for part, optimizer in zip(self.parts, pair, strict=True):
            optimizer.build(part.trainable_variables)
            if held == "parts":
                part.compile(optimizer)
        if held == "tuple":
            self.pair = (pair[0], optimizers.LossScaleOptimizer(pair[1]))
        elif held == "nested":
            self.pair = {"all": [{"first": pair[0]}, [pair[1]]]}
        self.used = lambda: pair

    def call(self, inputs: Any) -> Any:
        return self.parts[0](inputs) + self.parts[1](inputs)

    def train_step(self, data: Any) -> Any:
        inputs, targets = data
        loss = sum((part(inputs) - targets).square().mean() for part in self.parts)
        self.zero_grad()
        loss.backward()
        for part, optimizer in zip(self.parts, self.used(), strict=True):
            variables = part.trainable_variables
            optimizer.apply([v.value.grad for v in variables], variables)
        return {"error": loss}


@pytest.mark.parametrize("held", ["nested", "parts", "tuple"])
def test_a_train_step_of_ones_own_finds_its_taps(held: str) -> None:
    model = Pair(held)
    model.compile()
    losses = model.fit(X, Y, epochs=3, verbose=0).history["error"]
    assert losses[-1] < losses[0]
    assert all(layer.tap.fired for optimizer in model.used() for layer in optimizer.layers)


def test_an_optimizer_that_no_model_holds_is_told_the_ways() -> None:
    model = Pair("nowhere")
    model.compile()
    with pytest.raises(UnsupportedTrainingError, match=r"attribute, in a list or in a dict"):
        model.fit(X, Y, verbose=0)


def test_names_do_not_depend_on_the_order_of_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, listed = nested(), gc.get_objects
    encoder = model.layers[1]
    seen = []
    for order in (list, lambda objects: objects[::-1]):
        monkeypatch.setattr(gc, "get_objects", lambda order=order: order(listed()))
        around = Surroundings.of(encoder.trainable_variables, None)
        seen.append([around.name_of(v) for v in encoder.trainable_variables])
    assert seen[0] == seen[1] == ["dense/kernel", "dense/bias", "last/kernel", "last/bias"]


def test_hidden_layers_are_an_error() -> None:
    model = nested()
    gc.freeze()
    try:
        with pytest.raises(RuntimeError, match=r"build the optimizer .* before gc\.freeze"):
            keras_racs().build(model.trainable_variables)
    finally:
        gc.unfreeze()


def test_an_optimizer_of_nothing_is_built() -> None:
    optimizer = keras_neurms(variant="U")
    optimizer.build([])
    assert optimizer.built
    assert not list(optimizer.plan())
