"""Every way in which Keras trains: accumulation, mixed precision, custom steps, two models."""

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers

import neurms
from neurms.core.ground.errors import NonFiniteError
from neurms.integrations.keras import keras_neurms, keras_optimizer, keras_racs
from neurms.integrations.keras.classes import CLASSES
from tests.integrations.keras.twins import (
    batches,
    compiled,
    distance,
    keras_model,
    torch_model,
    train_keras,
    train_torch,
)

X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")


def dense_model(units: int = 5) -> Any:
    return keras.Sequential(
        [layers.Input((6,)), layers.Dense(units, activation="tanh"), layers.Dense(3)]
    )


def weights_after(model: Any, optimizer: Any, steps: int = 3, **settings: Any) -> list[Any]:
    keras.utils.set_random_seed(7)
    model.compile(optimizer=optimizer, loss="mse", **settings)
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return list(model.get_weights())


def same_start(*models: Any) -> None:
    for model in models[1:]:
        model.set_weights(models[0].get_weights())


# -------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("variant", ["U", "F"])
def test_a_window_of_batches_is_one_big_batch(variant: str) -> None:
    whole, split = dense_model(), dense_model()
    same_start(whole, split)
    whole.compile(optimizer=keras_neurms(variant=variant), loss="mse")
    window = keras_neurms(variant=variant, gradient_accumulation_steps=4)
    split.compile(optimizer=window, loss="mse")
    for _ in range(3):
        whole.train_on_batch(X, Y)
        for start in range(0, 16, 4):
            split.train_on_batch(X[start : start + 4], Y[start : start + 4])
    for a, b in zip(whole.get_weights(), split.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for a, b in zip(whole.optimizer.layers, split.optimizer.layers, strict=True):
        assert torch.allclose(a.state["v"], b.state["v"])


def test_b_accumulates_as_torch_does() -> None:
    model = keras_model("float32")
    twin = torch_model(model)
    data = batches(6, dtype=torch.float32)
    train_keras(compiled(model, keras_neurms(variant="B", gradient_accumulation_steps=3)), data)
    train_torch(twin, neurms.NeuRMS(twin, variant="B"), data, accumulate=3)
    assert distance(model, twin) < 1e-5


@pytest.mark.parametrize("rule", [rule for rule in CLASSES if rule != "neurms"])
def test_accumulated_gradients_with_weight_decay_are_their_mean(rule: str) -> None:
    settings = {"leading": 1, "rank": 2} if rule in ("alice", "low_rank_soap") else {}
    one = keras_optimizer(rule, weight_decay=0.05, **settings)
    three = keras_optimizer(rule, weight_decay=0.05, gradient_accumulation_steps=3, **settings)
    start = np.arange(1.0, 7.0).reshape(3, 2).astype("float32")
    first, second = (keras.Variable(start, name="w") for _ in range(2))
    generator = np.random.default_rng(0)
    for _ in range(4):
        gradients = generator.normal(size=(3, 3, 2)).astype("float32")
        one.apply_gradients([(torch.from_numpy(gradients.mean(0)), first)])
        for gradient in gradients:
            three.apply_gradients([(torch.from_numpy(gradient), second)])
    np.testing.assert_allclose(first.numpy(), second.numpy(), atol=2e-5)
    assert not np.allclose(first.numpy(), start)


# -------------------------------------------------------------------- precision and loss scales


@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_a_constant_loss_scale_changes_nothing(variant: str) -> None:
    plain, scaled = dense_model(), dense_model()
    same_start(plain, scaled)
    expected = weights_after(plain, keras_neurms(variant=variant))
    got = weights_after(scaled, keras_neurms(variant=variant, loss_scale_factor=1024.0))
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_a_dynamic_loss_scale_changes_nothing(variant: str) -> None:
    plain, scaled = dense_model(), dense_model()
    same_start(plain, scaled)
    expected = weights_after(plain, keras_neurms(variant=variant))
    wrapper = keras.optimizers.LossScaleOptimizer(keras_neurms(variant=variant))
    for a, b in zip(expected, weights_after(scaled, wrapper), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_an_overflow_commits_nothing() -> None:
    model = dense_model()
    optimizer = keras_neurms(variant="U")
    model.compile(optimizer=keras.optimizers.LossScaleOptimizer(optimizer), loss="mse")
    model.train_on_batch(X, Y)
    state = [v.numpy().copy() for v in optimizer.variables]
    model.train_on_batch(np.full_like(X, np.inf), Y)
    assert all(np.array_equal(a, b) for a, b in zip(state, optimizer.variables, strict=True))
    assert not any(layer.pending.rows for layer in optimizer.layers)
    model.train_on_batch(X, Y)
    assert int(optimizer.iterations) == 2
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_an_overflow_inside_a_window_drops_its_own_batch_only() -> None:
    good, hit = dense_model(), dense_model()
    same_start(good, hit)
    for model in (good, hit):
        inner = keras_neurms(gradient_accumulation_steps=2, variant="U")
        model.compile(
            optimizer=keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0), loss="mse"
        )
    for model in (good, hit):
        model.train_on_batch(X[:8], Y[:8])
        if model is hit:
            model.train_on_batch(np.full_like(X, np.inf), Y)
        model.train_on_batch(X[8:], Y[8:])
    for a, b in zip(good.get_weights(), hit.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["neurms", "racs"])
def test_low_precision_trains(policy: str, rule: str) -> None:
    keras.config.set_dtype_policy(policy)
    model = dense_model()
    settings = {"variant": "F"} if rule == "neurms" else {}
    model.compile(optimizer=keras_optimizer(rule, learning_rate=0.05, **settings), loss="mse")
    history = model.fit(X, Y, epochs=15, verbose=0, batch_size=8).history["loss"]
    assert history[-1] < 0.9 * history[0]
    optimizer = model.optimizer
    wrapped = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapped == (policy == "mixed_float16")


# -------------------------------------------------------------------- ways to train


class OwnStep(keras.Model):  # type: ignore[misc]
    """A custom train_step as Keras's torch guide writes it."""

    def train_step(self, data: Any) -> Any:
        x, y = data[:2]
        errors = self(x, training=True) - keras.ops.convert_to_tensor(y)
        loss = keras.ops.mean(keras.ops.square(errors))
        self.zero_grad()
        self.optimizer.scale_loss(loss).backward()
        variables = list(self.trainable_weights)
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in variables], variables)
        return {"loss": loss.detach()}


def own_step_model() -> Any:
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    return OwnStep(inputs, layers.Dense(3)(hidden))


def test_fit_train_on_batch_custom_steps_and_own_loops_agree() -> None:
    fitted, batched, own, looped = dense_model(), dense_model(), own_step_model(), dense_model()
    same_start(fitted, batched, own, looped)
    fitted.compile(optimizer=keras_neurms(variant="F"), loss="mse")
    fitted.fit(X, Y, epochs=3, batch_size=16, shuffle=False, verbose=0)
    weights_after(batched, keras_neurms(variant="F"))
    weights_after(own, keras_neurms(variant="F"))
    optimizer = keras_neurms(variant="F")
    with optimizer.attach(looped):
        for _ in range(3):
            looped.zero_grad()
            (looped(torch.from_numpy(X)) - torch.from_numpy(Y)).square().mean().backward()
            variables = looped.trainable_variables
            optimizer.apply([v.value.grad for v in variables], variables)
    for model in (batched, own, looped):
        for a, b in zip(fitted.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_two_models_at_once_do_not_mix() -> None:
    alone, first, second = dense_model(), dense_model(), dense_model(units=4)
    same_start(alone, first)
    expected = weights_after(alone, keras_neurms(variant="U"))
    first.compile(optimizer=keras_neurms(variant="U"), loss="mse")
    second.compile(optimizer=keras_neurms(variant="B"), loss="mse")
    for _ in range(3):
        first.train_on_batch(X, Y)
        second.train_on_batch(X, Y)
    assert all(np.array_equal(a, b) for a, b in zip(expected, first.get_weights(), strict=True))


def test_a_model_within_a_model() -> None:
    inner = dense_model()
    inputs = keras.Input((6,))
    outer = keras.Model(inputs, layers.Dense(3)(inner(inputs)))
    outer.compile(optimizer=keras_neurms(variant="F"), loss="mse")
    outer.fit(X, Y, verbose=0)
    assert len(list(outer.optimizer.layers)) == 3
    inner.compile(optimizer="sgd", loss="mse")
    inner.fit(X, Y, verbose=0)


def test_recompiling_keeps_or_replaces_the_optimizer() -> None:
    model = dense_model()
    optimizer = keras_neurms(variant="U")
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(X, Y, verbose=0, batch_size=8)
    model.compile(optimizer=optimizer, loss="mae")
    model.fit(X, Y, verbose=0, batch_size=8)
    assert int(optimizer.iterations) == 4
    model.compile(optimizer=keras_racs(), loss="mse")
    model.fit(X, Y, verbose=0)
    model.compile(optimizer="adam", loss="mse")
    model.fit(X, Y, verbose=0)
    assert not any(layer.pending.rows for layer in optimizer.layers)


def test_cloned_models_train_on_their_own() -> None:
    model = dense_model()
    model.compile(optimizer=keras_neurms(variant="U"), loss="mse")
    model.train_on_batch(X, Y)
    clone = keras.models.clone_model(model)
    clone.compile(
        optimizer=type(model.optimizer).from_config(model.optimizer.get_config()), loss="mse"
    )
    before = model.get_weights()
    clone.train_on_batch(X, Y)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


# -------------------------------------------------------------------- rates, decay, bad numbers


def test_fallback_follows_the_learning_rate_in_proportion() -> None:
    bias = keras.Variable(np.zeros(3, "float32"), name="bias")
    optimizer = keras_racs(learning_rate=0.02, fallback_lr=1e-3)
    optimizer.build([bias])
    optimizer.learning_rate = 0.01
    optimizer.apply([torch.ones(3)])
    np.testing.assert_allclose(bias.numpy(), -5e-4, rtol=1e-4)


def test_schedules_are_followed_and_their_peak_is_the_base() -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.0, 4, warmup_target=0.02, warmup_steps=2)
    bias = keras.Variable(np.zeros(1, "float32"), name="bias")
    optimizer = keras_racs(learning_rate=schedule, fallback_lr=1e-3)
    optimizer.build([bias])
    moves = []
    for _ in range(3):
        before = float(bias.numpy()[0])
        optimizer.apply([torch.ones(1)])
        moves.append(before - float(bias.numpy()[0]))
    np.testing.assert_allclose(moves, [0.0, 5e-4, 1e-3], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("rule", ["racs", "galore", "lars", "neurms"])
def test_weight_decay_shrinks_what_is_not_excluded(rule: str) -> None:
    model = dense_model()
    model.layers[0].bias.assign(np.ones(5))
    optimizer = keras_optimizer(
        rule,
        learning_rate=0.1,
        weight_decay=0.5,
        exclude_from_weight_decay=["dense.*/kernel", "nothing"],
    )
    if rule == "neurms":
        weights_after(model, optimizer, steps=1)
        return
    optimizer.build(model.trainable_variables)
    kernels = [model.layers[0].kernel.numpy(), model.layers[1].kernel.numpy()]
    optimizer.apply([torch.zeros(tuple(v.shape)) for v in model.trainable_variables])
    np.testing.assert_allclose(model.layers[0].bias.numpy(), 0.95, rtol=1e-6)
    for before, layer in zip(kernels, model.layers, strict=True):
        np.testing.assert_array_equal(before, layer.kernel.numpy())


@pytest.mark.parametrize("rule", ["racs", "neurms"])
def test_nonfinite_gradients_raise_or_are_skipped_whole(rule: str) -> None:
    bad = np.full_like(X, np.nan)
    for nonfinite in ("raise", "skip"):
        model = dense_model()
        optimizer = keras_optimizer(rule, nonfinite=nonfinite, weight_decay=0.1)
        model.compile(optimizer=optimizer, loss="mse")
        model.train_on_batch(X, Y)
        before = model.get_weights()
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match="nothing was"):
                model.train_on_batch(bad, Y)
            assert int(optimizer.iterations) == 1
        else:
            model.train_on_batch(bad, Y)
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
        model.train_on_batch(X, Y)
        state = optimizer._engine.state[optimizer._entries[0].route.parameter]
        assert state["step"] == 2


def test_a_variable_without_a_gradient_counts_its_own_steps() -> None:
    first, second = (keras.Variable(np.eye(2, dtype="float32"), name="w") for _ in range(2))
    optimizer = keras_racs()
    optimizer.build([first, second])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([torch.eye(2), None])
    optimizer.apply([torch.eye(2), torch.eye(2)])
    steps = [optimizer._engine.state[e.route.parameter]["step"] for e in optimizer._entries]
    assert steps == [2, 1]
    assert optimizer._missed.numpy().tolist() == [0, 1]
