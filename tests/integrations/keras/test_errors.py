"""Bad input: clear errors, before anything has changed."""

import builtins
import importlib
import sys
from typing import Any

import keras
import numpy as np
import pytest
import torch

import neurms
from neurms.integrations.keras import keras_neurms, keras_optimizer, keras_racs


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
@pytest.mark.parametrize("make", [keras_racs, keras_neurms, lambda: keras_optimizer("adamw")])
def test_other_backends_are_named_with_the_cure(
    make: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    with pytest.raises(
        ValueError, match=f"'{backend}'; set the environment variable KERAS_BACKEND=torch"
    ):
        make()


def test_without_keras_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_keras(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "keras" or name.startswith("keras."):
            raise ModuleNotFoundError("No module named 'keras'", name="keras")
        return real(name, *args, **kwargs)

    for name in list(sys.modules):
        if name.startswith(("neurms.integrations.keras", "neurms.callbacks.keras")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.setattr(builtins, "__import__", no_keras)
    for module in ("neurms.integrations.keras", "neurms.callbacks.keras"):
        with pytest.raises(ImportError, match=r'pip install "neurms\[keras\]"'):
            importlib.import_module(module)


@pytest.mark.parametrize("rate", [1, "fast", None])
def test_learning_rates_of_another_type(rate: Any) -> None:
    if rate is None:
        assert float(keras_racs(rate).learning_rate.value) == pytest.approx(0.02)
        return
    with pytest.raises(ValueError, match=r"`learning_rate` should be float"):
        keras_racs(learning_rate=rate)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"beta": 2.0}, ValueError, r"beta=2.0 must lie in \[0, 1\)"),
        (
            {"betta": 0.9},
            TypeError,
            r"no setting 'betta' .*'beta'\?\); its own settings are \['beta'",
        ),
        ({"lr": 0.1}, TypeError, "lr=0.1 is called learning_rate in Keras; pass learning_rate=0.1"),
        ({"learning_rte": 0.1}, TypeError, r"'learning_rte' \(did you mean 'learning_rate'\?\)"),
        ({"clip_norm": 1.0}, TypeError, r"'clip_norm' \(did you mean 'clipnorm'\?\)"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0"),
        ({"exclude": "head"}, TypeError, r"write \('head',\)"),
        ({"backend": "cuda"}, ValueError, "cuda"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore'"),
        ({"exclude_from_weight_decay": "bias"}, TypeError, "must be a sequence"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "Only one of"),
    ],
)
def test_settings_are_checked_at_construction(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        keras_racs(**settings)


@pytest.mark.parametrize("name", ["update", "loss_scale", "groups"])
def test_neurms_says_what_keras_decides(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}='backward' .*leave it out"):
        keras_neurms(**{"variant": "U", **{name: "backward"}})


@pytest.mark.parametrize("name", ["rmnp", "muon", "nora", "lars"])
def test_momentum_takes_no_gradient_in_backward(name: str) -> None:
    with pytest.raises(TypeError, match=r"update='backward' is always \"step\" in Keras"):
        keras_optimizer(name, nesterov=False, update="backward")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name='rax' is not known; choose one of"):
        keras_optimizer("rax")


def test_keras_s_own_optimizers_say_how_a_rate_is_called() -> None:
    with pytest.raises(TypeError, match=r"pass learning_rate=0\.1"):
        keras_optimizer("adamw", lr=0.1)


def _small_model() -> keras.Model:
    return keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])


@pytest.mark.parametrize("rule", [neurms.RACS, neurms.NeuRMS])
def test_a_torch_optimizer_of_a_keras_model_names_keras_s(rule: Any) -> None:
    model = _small_model()
    with pytest.raises(TypeError, match=rf"keras_optimizer\('{rule.rule}'\)"):
        model.compile(optimizer=rule(model))
    with pytest.raises(TypeError, match="compile the Keras model with neurms"):
        neurms.RACS(model.trainable_variables)


def test_compile_with_a_torch_optimizer_ends_in_the_cure() -> None:
    model = _small_model()
    cure = r"keras_optimizer\('racs', learning_rate=0\.1\) instead"
    optimizer = neurms.RACS(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=cure):
        model.compile(optimizer=optimizer)
    assert "keras" not in str(optimizer)


def test_an_optimizer_built_for_another_model() -> None:
    first, second = (keras.Variable(np.eye(2, dtype="float32"), name="w") for _ in range(2))
    optimizer = keras_racs()
    optimizer.build([first])
    with pytest.raises(ValueError, match=r"Unknown variable"):
        optimizer.apply([torch.eye(2)], [second])
    assert np.array_equal(first.numpy(), np.eye(2))
    assert np.array_equal(second.numpy(), np.eye(2))


def test_neurms_needs_a_layer_to_tap() -> None:
    model = keras.Sequential([keras.layers.Input((5,)), keras.layers.Embedding(3, 2)])
    with pytest.raises(ValueError, match=r"belong to no layer that neurms can tap"):
        keras_neurms(variant="U").build(model.trainable_variables)


def test_plan_before_building() -> None:
    with pytest.raises(ValueError, match=r"is not built; call optimizer.build"):
        keras_racs().plan()


def test_functional_updates_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"call optimizer\.apply"):
        keras_racs().stateless_apply([], [], [])
