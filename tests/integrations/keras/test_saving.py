"""Files: what is saved, loaded and gone on with, bit for bit; and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers

from neurms.core.ground.errors import CheckpointError
from neurms.integrations.keras import keras_neurms, keras_optimizer, keras_racs
from neurms.integrations.keras.classes import CLASSES

X = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(24, 3)).astype("float32")
SMALL = {"rank": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "alice": {"rank": 3, "leading": 1, "interval": 2},
    "low_rank_soap": {"rank": 3, "leading": 1, "interval": 2},
    **dict.fromkeys(("galore", "fira", "apollo", "adapprox", "sketchy", "shared_basis"), SMALL),
}


def model_with(optimizer: Any, units: int = 5) -> Any:
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            layers.Input((6,)),
            layers.Dense(units, activation="tanh"),
            layers.Dense(4),
            layers.Dense(3),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse")
    return model


def fit(model: Any, epochs: int = 1, **settings: Any) -> None:
    model.fit(X, Y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, **settings)


def equal(first: Any, second: Any) -> bool:
    pairs = zip(
        [*first.get_weights(), *(v.numpy() for v in first.optimizer.variables)],
        [*second.get_weights(), *(v.numpy() for v in second.optimizer.variables)],
        strict=True,
    )
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("rule", CLASSES)
def test_going_on_from_a_file_is_going_on(rule: str, tmp_path: Path) -> None:
    """With an average, an unfinished window of gradients (3 batches by 2) and a schedule."""
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 20)
    optimizer = keras_optimizer(
        rule,
        learning_rate=schedule,
        use_ema=True,
        ema_overwrite_frequency=2,
        gradient_accumulation_steps=2,
        weight_decay=0.01,
        exclude_from_weight_decay=["bias"],
        **SETTINGS.get(rule, {}),
    )
    model = model_with(optimizer)
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert equal(model, loaded)
    for one in (model, loaded):
        fit(one, epochs=2)
    assert equal(model, loaded)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_neurms_keeps_what_an_unfinished_window_saw(variant: str, tmp_path: Path) -> None:
    model = model_with(keras_neurms(variant=variant, momentum=0.9, gradient_accumulation_steps=2))
    fit(model)
    pending = [layer.pending.copy() for layer in model.optimizer.layers]
    assert all(p.rows for p in pending)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for before, layer in zip(pending, loaded.optimizer.layers, strict=True):
        assert before.rows == layer.pending.rows
        assert before.units is not None
        assert torch.equal(before.units, layer.pending.units)
    for one in (model, loaded):
        fit(one, epochs=2)
    assert equal(model, loaded)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lengths_of_updates_are_variables(momentum: float, tmp_path: Path) -> None:
    model = model_with(keras_neurms(normalize="rms", momentum=momentum, variant="U"))
    fit(model)
    lengths = [v for v in model.optimizer.variables if v.name.endswith("_length")]
    assert len(lengths) == 6
    assert all(v.shape == () and float(v.numpy()) > 0 for v in lengths)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config()["normalize"] == "rms"
    assert equal(model, loaded)
    for one in (model, loaded):
        fit(one, epochs=2)
    assert equal(model, loaded)


def test_a_wrapped_optimizer_goes_on_too(tmp_path: Path) -> None:
    inner = keras_neurms(gradient_accumulation_steps=2, variant="U")
    model = model_with(keras.optimizers.LossScaleOptimizer(inner))
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        fit(one)
    assert equal(model, loaded)


def test_missed_steps_survive(tmp_path: Path) -> None:
    variables = [keras.Variable(np.eye(2, dtype="float32"), name="w") for _ in range(2)]
    optimizer, other = keras_optimizer("eigen_adam"), keras_optimizer("eigen_adam")
    optimizer.build(variables)
    with pytest.warns(UserWarning, match=r"Gradients do not exist"):
        optimizer.apply([torch.eye(2), None])
    copies = [keras.Variable(v.numpy(), name="w") for v in variables]
    other.build(copies)
    other.set_weights([v.numpy() for v in optimizer.variables])
    for one in (optimizer, other):
        one.apply([torch.eye(2), torch.ones(2, 2)])
    for a, b in zip([*optimizer.variables, *variables], [*other.variables, *copies], strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("rule", CLASSES)
def test_configs_and_pickles_give_the_same_optimizer(rule: str) -> None:
    optimizer = keras_optimizer(rule, learning_rate=0.5, clipnorm=1.0, exclude=["a"], name="mine")
    config = optimizer.get_config()
    assert type(optimizer).from_config(config).get_config() == config
    through_json = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(through_json) is type(optimizer)
    assert through_json.get_config() == config
    assert pickle.loads(pickle.dumps(optimizer)).get_config() == config


def test_exclusions_from_weight_decay_survive_a_file(tmp_path: Path) -> None:
    optimizer = keras_racs(learning_rate=0.1, weight_decay=0.5)
    model = model_with(optimizer)
    optimizer.exclude_from_weight_decay(var_names=["bias"], var_list=[model.layers[0].kernel])
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    decayed = [loaded.optimizer._use_weight_decay(v) for v in loaded.trainable_variables]
    assert decayed == [False, False, True, False, True, False]


def test_patterns_by_path_survive_a_file(tmp_path: Path) -> None:
    model = model_with("sgd")
    path = model.layers[1].kernel.path
    model.compile(optimizer=keras_racs(exclude=[path]), loss="mse")
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].kernel.path != path
    assert "excluded" in loaded.optimizer.plan()[2].reason
    fit(loaded)


def test_fallback_rate_survives_a_changed_learning_rate(tmp_path: Path) -> None:
    model = model_with(keras_racs(learning_rate=0.02))
    fit(model)
    model.optimizer.learning_rate = 0.013
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        fit(one)
    assert equal(model, loaded)


def test_model_checkpoint_and_backup_and_restore(tmp_path: Path) -> None:
    model = model_with(keras_neurms(variant="F"))
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(model, epochs=2, callbacks=[checkpoint])
    loaded = keras.saving.load_model(tmp_path / "1.keras")
    fit(loaded)
    assert equal(model, loaded)

    class Interrupt(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    broken = model_with(keras_neurms(variant="F"))
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fit(broken, epochs=2, callbacks=[backup, Interrupt()])
    resumed = model_with(keras_neurms(variant="F"))
    fit(resumed, epochs=2, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert equal(model, resumed)


DRAWING = {
    "alice": {"rank": 3, "leading": 1, "interval": 2, "switching": "gaussian"},
    "apollo": {"rank": 2, "interval": 2},
    "low_rank_soap": {"rank": 3, "leading": 1, "interval": 2},
    "adapprox": {},
}


def named_model(rule: str, names: list[str], seed: int) -> Any:
    keras.utils.set_random_seed(3)
    sizes = (5, 4, 3)
    stack = [layers.Dense(n, name=name) for n, name in zip(sizes, names, strict=True)]
    model = keras.Sequential([layers.Input((6,)), *stack])
    optimizer = keras_optimizer(rule, learning_rate=0.01, seed=seed, **DRAWING[rule])
    model.compile(optimizer=optimizer, loss="mse")
    return model


@pytest.mark.parametrize("seed", [0, 3, 2**40 + 1])
@pytest.mark.parametrize("rule", DRAWING)
def test_draws_go_on_alike_under_other_names_and_seeds(
    rule: str, seed: int, tmp_path: Path
) -> None:
    model = named_model(rule, ["a", "b", "c"], seed)
    fit(model)
    model.save_weights(tmp_path / "w.weights.h5")
    other = named_model(rule, ["x", "y", "z"], seed + 1)
    other.optimizer.build(other.trainable_variables)
    before = other.get_weights()
    other.load_weights(tmp_path / "w.weights.h5")
    assert not np.array_equal(before[0], other.get_weights()[0])
    other.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])
    for one in (model, other):
        fit(one, epochs=3)
    assert equal(model, other)


@pytest.mark.parametrize("rule", DRAWING)
def test_other_names_draw_otherwise(rule: str) -> None:
    """So that the test above can fail."""
    models = [named_model(rule, names, 0) for names in (["a", "b", "c"], ["x", "y", "z"])]
    for one in models:
        fit(one, epochs=3)
    assert not equal(*models)


def test_rules_that_draw_nothing_save_no_seeds() -> None:
    model = model_with(keras_optimizer("soap"))
    fit(model)
    assert not any(v.name.endswith("seeds") for v in model.optimizer.variables)


# -------------------------------------------------------------------- what is refused


def stored(optimizer: Any) -> dict[str, Any]:
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    return store


def test_the_state_of_another_model_is_refused_whole() -> None:
    small, large = model_with(keras_racs()), model_with(keras_racs(), units=7)
    for model in (small, large):
        fit(model)
    before = stored(large.optimizer)
    with pytest.raises(CheckpointError, match=r"has shape .* nothing was loaded"):
        large.optimizer.load_own_variables(stored(small.optimizer))
    with pytest.raises(CheckpointError, match=r"holds .* variables of an optimizer"):
        large.optimizer.load_own_variables(stored(small.optimizer) | {"99": np.zeros(1)})
    after = stored(large.optimizer)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_state_from_before_training_is_left_out_with_keras_warning() -> None:
    model = model_with(keras_racs())
    fit(model)
    with pytest.warns(UserWarning, match=r"Skipping variable loading"):
        model.optimizer.load_own_variables(stored(keras_racs()))


def test_a_corrupted_file_is_an_error(tmp_path: Path) -> None:
    model = model_with(keras_racs())
    fit(model)
    path = tmp_path / "model.keras"
    model.save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"model\.keras|zip"):
        keras.saving.load_model(path)
