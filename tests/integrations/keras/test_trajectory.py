"""The same weights, data and settings move a Keras model as the torch optimizer moves its twin."""

from typing import Any

import keras
import pytest
import torch
from torch import Tensor

import neurms
from neurms.core.optimizers.view import View
from neurms.integrations.keras import keras_optimizer
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

STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "alice": {"rank": 3, "leading": 1, "interval": 2},
    "galore": {"rank": 2},
    "fira": {"rank": 2},
    "apollo": {"rank": 2},
    "shared_basis": {"rank": 2},
    # Where a factor is larger than the gradient's rank, its null space has no basis of its own.
    "low_rank_soap": {"rank": 2, "leading": 1, "max_preconditioned_dim": 2},
    "soap": {"max_preconditioned_dim": 8},
    "sketchy": {"rank": 2},
    "adapprox": {"rank": 2},
}


@pytest.fixture(autouse=True)
def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras 3.15 multiplies float64 matrices in float32 on torch, which rules may amplify."""

    def matmul(left: Tensor, right: keras.Variable) -> Tensor:
        return left @ right.value

    monkeypatch.setattr(keras.src.ops, "matmul", matmul)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    # Random draws derive from parameter names, which the two frameworks give differently.
    monkeypatch.setattr(View, "seed", property(lambda view: 7))


def moved(rule: str, settings: dict[str, Any], dtype: str, **keras_settings: Any) -> float:
    """Return how far apart both frameworks are after a few steps."""
    model = keras_model(dtype)
    twin = torch_model(model)
    start = twin.state_dict()["conv.weight"].clone()
    data = batches(STEPS, dtype=getattr(torch, dtype))
    train_keras(compiled(model, keras_optimizer(rule, **settings, **keras_settings)), data)
    optimizer = neurms.create(rule, twin, **settings)
    train_torch(twin, optimizer, data)
    assert not torch.allclose(start, twin.state_dict()["conv.weight"])
    return distance(model, twin)


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("rule", CLASSES)
def test_every_rule_follows_its_torch_optimizer(rule: str) -> None:
    assert moved(rule, SETTINGS.get(rule, {}), "float64") < 1e-7


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_neurms_follows_its_torch_optimizer(variant: str, momentum: float) -> None:
    settings = {"variant": variant, "momentum": momentum, "agc": 0.1, "weight_decay": 0.1}
    keras_settings = {"exclude_from_weight_decay": ["bias"]}
    assert moved("neurms", settings, "float64", **keras_settings) < 1e-10
    settings = {"variant": variant, "momentum": momentum, "normalize": "rms"}
    assert moved("neurms", settings, "float64") < 1e-10


@pytest.mark.parametrize(
    "how",
    [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True, "moments": "average"}],
)
def test_neurms_of_the_gradients_own_moments_follows_its_torch_optimizer(
    how: dict[str, Any],
) -> None:
    settings = {"variant": "P", "weight_decay": 0.1, **how}
    keras_settings = {"exclude_from_weight_decay": ["bias"]}
    assert moved("neurms", settings, "float64", **keras_settings) < 1e-10


@pytest.mark.parametrize("rule", ["neurms", "racs", "rmnp"])
def test_single_precision_follows_within_1e_5(rule: str) -> None:
    assert moved(rule, {}, "float32") < 1e-5
