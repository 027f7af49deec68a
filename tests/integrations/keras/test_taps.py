"""What taps see in Keras layers, and that they leave no trace."""

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.integrations.keras import keras_neurms

X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")


def dense_model(activation: Any = "relu") -> Any:
    return keras.Sequential(
        [layers.Input((6,)), layers.Dense(5, activation=activation), layers.Dense(3)]
    )


def clean(model: Any) -> bool:
    own = [vars(layer) for layer in model._flatten_layers()]
    hooks = [layer._forward_hooks or layer._forward_pre_hooks for layer in model._flatten_layers()]
    lent = any("call" in attributes for attributes in own)
    swapped = any(getattr(attributes.get("activation"), "__closure__", None) for attributes in own)
    return not (lent or swapped or any(hooks))


@pytest.mark.parametrize("activation", ["relu", "tanh", None, layers.LeakyReLU(0.2)])
def test_fused_activations_show_the_error_of_z(activation: Any) -> None:
    model = dense_model(activation)
    first, second = model.layers
    optimizer = keras_neurms(variant="F")
    with optimizer.attach(model):
        model(torch.from_numpy(X)).square().mean().backward()
        pending = {layer.route.module: layer.pending for layer in optimizer.layers}
    kernels = [layer.kernel.value.detach() for layer in (first, second)]
    biases = [layer.bias.value.detach() for layer in (first, second)]
    h1 = torch.from_numpy(X)
    z1 = (h1 @ kernels[0] + biases[0]).requires_grad_()
    h2 = first.activation(z1)
    z2 = (h2 @ kernels[1] + biases[1]).requires_grad_()
    d1, d2 = torch.autograd.grad(z2.square().mean(), [z1, z2])
    for layer, h, d in ((first, h1, d1), (second, h2.detach(), d2)):
        assert torch.allclose(pending[layer].units, d.square().sum(0), rtol=1e-5)
        assert torch.allclose(pending[layer].features, h.square().sum(0), rtol=1e-5)
        assert pending[layer].rows == pending[layer].feature_rows == 8


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_convolutions_show_channels(data_format: str) -> None:
    shape = (5, 5, 2) if data_format == "channels_last" else (2, 5, 5)
    convolution = layers.Conv2D(4, 3, activation="relu", data_format=data_format)
    model = keras.Sequential([layers.Input(shape), convolution, layers.Flatten(), layers.Dense(3)])
    optimizer = keras_neurms(variant="F")
    inputs = torch.randn(2, *shape)
    with optimizer.attach(model):
        outputs = convolution(inputs)
        weights = torch.randn_like(outputs)
        (outputs * weights).sum().backward()
        (pending,) = [x.pending for x in optimizer.layers if x.route.module is convolution]
    axis = 3 if data_format == "channels_last" else 1
    rest = [a for a in range(4) if a != axis]
    d = weights * (outputs > 0)
    assert torch.allclose(pending.units, d.square().sum(rest), rtol=1e-5)
    assert torch.allclose(pending.features, inputs.square().sum(rest), rtol=1e-5)
    assert (pending.rows, pending.feature_rows) == (2 * 3 * 3, 2 * 5 * 5)


def test_a_shared_layer_counts_every_use() -> None:
    shared = layers.Dense(6, activation="tanh")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3)(shared(shared(inputs))))
    optimizer = keras_neurms(variant="U")
    with optimizer.attach(model):
        model(torch.from_numpy(X)).sum().backward()
        rows = {layer.route.module: layer.pending.rows for layer in optimizer.layers}
    assert rows[shared] == 16


def test_layers_are_as_before_while_attached_and_after() -> None:
    model = dense_model()
    config = model.get_config()
    optimizer = keras_neurms(variant="F")
    with optimizer.attach(model):
        assert not clean(model)
        assert model.get_config() == config
        assert model.layers[0].get_config()["activation"] == "relu"
    assert clean(model)
    assert "activation" in vars(model.layers[0])


class Fails(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise KeyboardInterrupt


class FailsInside(keras.losses.Loss):  # type: ignore[misc]
    calls = 0

    def call(self, y_true: Any, y_pred: Any) -> Any:
        self.calls += 1
        if isinstance(y_pred, torch.Tensor) and y_pred.device.type != "meta" and self.calls > 3:
            raise ArithmeticError("in the loss")
        return keras.ops.square(y_true - y_pred)


def test_nothing_is_left_after_training_or_a_failure() -> None:
    model = dense_model()
    model.compile(optimizer=keras_neurms(variant="F"), loss="mse")
    model.fit(X, Y, verbose=0, batch_size=4, validation_data=(X, Y))
    assert clean(model)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, verbose=0, callbacks=[Fails()])
    assert clean(model)
    model.compile(optimizer=model.optimizer, loss=FailsInside())
    with pytest.raises(ArithmeticError):
        model.fit(X, Y, verbose=0, batch_size=2)
    assert clean(model)
    assert not any(layer.pending.rows for layer in model.optimizer.layers)
    model.compile(optimizer=model.optimizer, loss="mse")
    model.fit(X, Y, verbose=0)


def test_evaluation_adds_nothing() -> None:
    model = dense_model()
    model.compile(optimizer=keras_neurms(variant="U"), loss="mse")
    model.train_on_batch(X, Y)
    state = [v.numpy().copy() for v in model.optimizer.variables]
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model.test_on_batch(X, Y)
    assert all(np.array_equal(a, b) for a, b in zip(state, model.optimizer.variables, strict=True))
    assert not any(layer.pending.rows for layer in model.optimizer.layers)


def test_a_loop_without_taps_is_refused_before_anything_changes() -> None:
    model = dense_model()
    optimizer = keras_neurms(variant="U")
    optimizer.build(model.trainable_variables)
    model(torch.from_numpy(X)).sum().backward()
    before = [w.copy() for w in model.get_weights()]
    gradients = [v.value.grad for v in model.trainable_variables]
    with pytest.raises(UnsupportedTrainingError, match=r"with optimizer.attach"):
        optimizer.apply(gradients, model.trainable_variables)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert int(optimizer.iterations) == 0


class Bypass(layers.Layer):  # type: ignore[misc]
    """Multiplies with another layer's kernel without calling that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layers.Dense(3, use_bias=False, name="inner")

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, inputs: Any) -> Any:
        return (
            inputs @ self.inner.kernel.value
            if isinstance(inputs, torch.Tensor)
            else self.inner(inputs)
        )

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], 3)


def test_a_kernel_whose_layer_is_never_called_is_an_error_that_names_it() -> None:
    model = keras.Sequential([layers.Input((6,)), layers.Dense(5), Bypass()])
    model.compile(optimizer=keras_neurms(variant="U"), loss="mse")
    before = [w.copy() for w in model.get_weights()]
    with pytest.raises(UnsupportedTrainingError, match=r"inner/kernel.*exclude="):
        model.fit(X, Y, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    model.compile(optimizer=keras_neurms(exclude=["inner"], variant="U"), loss="mse")
    model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("variant", ["U", "F"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_training_is_the_same(variant: str) -> None:
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        keras.utils.set_random_seed(3)
        model = dense_model("tanh")
        model.compile(optimizer=keras_neurms(variant=variant), loss="mse", jit_compile=compiled)
        for _ in range(3):
            model.train_on_batch(X, Y)
        weights.append(model.get_weights())
        assert clean(model)
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
