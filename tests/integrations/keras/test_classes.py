"""Every rule has one Keras class, those that users register too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import neurms
from neurms.core.structures.one_sided_diagonal import RowNormalized
from neurms.integrations.keras.classes import CLASSES, keras_class
from neurms.integrations.keras.factories import keras_neurms, keras_optimizer


class RACS(neurms.PreconditionedOptimizer):
    """A rule of a user's, called like one of the library."""

    rule = "row_sgd"

    def __init__(self, params: Any, lr: float = 0.5, **common: Any) -> None:
        super().__init__(params, {"lr": lr}, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> neurms.Recipe:
        """Return the normalisation of rows."""
        return neurms.Recipe((RowNormalized(),))


def small_model() -> Any:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(4)])
    model.compile(optimizer=keras_optimizer("row_sgd", learning_rate=0.25), loss="mse")
    model.fit(np.ones((4, 3)), np.ones((4, 4)), verbose=0)
    return model


def test_a_registered_rule_is_a_keras_optimizer() -> None:
    with pytest.raises(ValueError, match="name='row_sgd' is not known"):
        keras_optimizer("row_sgd")
    neurms.register(RACS)
    rules = {row.name.rpartition("/")[2]: row.rule for row in small_model().optimizer.plan()}
    assert rules["kernel"] in ("row_sgd", "fallback")
    assert keras_class("row_sgd") is not CLASSES["racs"]
    assert keras_optimizer("row_sgd").get_config()["learning_rate"] == pytest.approx(0.5)


def test_a_registered_rule_is_saved_and_loaded(tmp_path: Path) -> None:
    neurms.register(RACS)
    small_model().save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras_class("row_sgd"))
    assert float(loaded.optimizer.learning_rate) == 0.25
    # A user's class of the same name took nothing from the library's own.
    ours = keras.optimizers.deserialize(
        keras.optimizers.serialize(keras_optimizer("racs", learning_rate=0.1))
    )
    assert type(ours) is CLASSES["racs"]


@pytest.mark.parametrize("name", neurms.available())
def test_compile_finds_a_rule_by_its_short_name(name: str) -> None:
    made = keras.optimizers.get(name)
    if name in ("sgd", "rmsprop", "adam", "adamw", "adafactor", "muon"):
        # Keras's own names keep their meaning.
        assert type(made).__module__.startswith("keras.")
        return
    assert type(made) is CLASSES[name]
    assert made.get_config() == {**keras_optimizer(name).get_config(), "name": made.name}


def test_a_model_compiled_by_name_trains_and_is_loaded(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(4)])
    model.compile(optimizer="neurms", loss="mse")
    model.fit(np.ones((4, 3)), np.ones((4, 4)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is CLASSES["neurms"]
    assert [row.rule for row in model.optimizer.plan()] == ["neurms", "neurms"]


def test_all_front_doors_have_one_default() -> None:
    pytest.importorskip("lightning")
    from neurms.callbacks import NeuRMSCallback

    assert neurms.NeuRMS.default_settings()["variant"] == "P"
    assert NeuRMSCallback().settings["variant"] == "P"
    assert neurms.GradientPreconditioner(torch.nn.Linear(3, 2)).settings["variant"] == "P"
    assert keras_optimizer("neurms").get_config()["variant"] == "P"
    assert keras_neurms().get_config()["variant"] == "P"
