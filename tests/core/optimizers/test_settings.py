"""Settings that every optimizer takes, refused where they enter."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from neurms.core.optimizers.settings import COMMON_DEFAULTS, CommonSettings, check_common
from tests.core.optimizers.training import RULES, make, small_model


def test_defaults_are_complete_and_pass() -> None:
    assert COMMON_DEFAULTS.keys() == CommonSettings.__annotations__.keys()
    assert check_common("racs", {}) == COMMON_DEFAULTS
    assert CommonSettings.__doc__ is not None
    assert all(f"{name}: " in CommonSettings.__doc__ for name in COMMON_DEFAULTS)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1"),
    ({"weight_decay": "0"}, TypeError, "weight_decay='0'"),
    ({"fallback_lr": -1.0}, ValueError, r"fallback_lr=-1\.0"),
    ({"fallback_betas": (0.9,)}, ValueError, "fallback_betas"),
    ({"fallback_betas": (0.9, 1.0)}, ValueError, r"fallback_betas\[1\]=1\.0"),
    ({"fallback_weight_decay": float("nan")}, ValueError, "fallback_weight_decay=nan"),
    ({"head": "none"}, ValueError, "head='none'"),
    ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ({"nonfinite": "warn"}, ValueError, "nonfinite='warn'"),
    ({"low_precision": "fp8"}, ValueError, "low_precision='fp8'"),
    ({"exclude": "0"}, TypeError, "exclude='0'"),
    ({"exclude": ["nothing"]}, ValueError, "exclude='nothing' matches no parameter"),
    ({"lr": -1.0}, ValueError, r"lr=-1\.0"),
    ({"lr": "fast"}, TypeError, "lr='fast'"),
    ({"wait_decay": 0.1}, TypeError, "has no setting 'wait_decay'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=lambda x: str(x)[:30])
@pytest.mark.parametrize("name", RULES)
def test_bad_settings(
    name: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(name, small_model(), **settings)


def test_a_refused_optimizer_leaves_the_model_untouched() -> None:
    model = small_model()
    for settings, error, _ in BAD:
        with pytest.raises(error):
            make("neurms", model, **settings)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(type(module).__module__.startswith("torch.nn") for module in model.modules())
    assert isinstance(model[0], nn.Conv2d)
