"""Keras's own optimizer tests, shipped in its wheel, run against this library's classes.

Each case subclasses one of Keras's and puts our classes where Keras's stood. A method that cannot
pass is left out by name, with its reason; the rest run as Keras wrote them. ``Plain`` is the rule
W <- W - lr G, which has to reproduce SGD's golden numbers for matrices.
"""

import unittest
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras.src.optimizers
from keras.src.optimizers import (
    loss_scale_optimizer_test,
    optimizer_test,
    sgd_test,
)

from neurms.integrations.keras.classes import CLASSES
from tests.integrations.keras.plain_rule import keras_plain, known

GOLDEN = "golden numbers of another rule"
VECTOR = "golden numbers of SGD for a vector, which goes to AdamW here"
SETTING = "a setting of Keras's optimizer that the rule does not have"
SLOTS = "counts the variables of Keras's optimizer"
NAMES = "names that Keras gives to its own classes"
BUILT_IN = "runs Keras's own classes by name, ours nowhere"
STATELESS = "functional updates, which Keras has for JAX; ours act in place and say so"

Plain = keras_plain()
RACS, RMNP = CLASSES["racs"], CLASSES["rmnp"]


def case(
    name: str, base: type, module: Any, classes: dict[str, type], left_out: dict[str, str]
) -> type:
    """Return a subclass of one of Keras's cases that tests ``classes`` instead of its own."""
    own: Any = {"__module__": __name__}
    for method, reason in left_out.items():
        assert hasattr(base, method), method
        own[method] = unittest.skip(reason)(lambda self: None)

    def set_up(self: Any) -> None:
        self.enterContext(known())
        for attribute, ours in classes.items():
            self.enterContext(mock.patch.object(module, attribute, ours))
        base.setUp(self)  # type: ignore[attr-defined]

    return type(name, (base,), {**own, "setUp": set_up})


def namespace(**classes: type) -> Any:
    """Return Keras's module of optimizers with some of its classes replaced."""
    return SimpleNamespace(**{**vars(keras.src.optimizers), **classes})


_VECTORS = {"test_single_step": SLOTS, "test_correctness_with_golden": VECTOR}
_MOMENTUM = {
    "test_invalid_momentum": "the message is Keras's; ours names the bound in its own words"
}
_PARAMETERIZED = {
    name: BUILT_IN
    for name in dir(optimizer_test.OptimizerTest)
    if name.startswith(("test_gradient_accumulation_with_weigth", "test_pickleable"))
}
_BASE = {
    "test_get_method": BUILT_IN,
    "test_optimizer_auto_naming": NAMES,
    **_PARAMETERIZED,
}
_STATELESS = {
    name: STATELESS
    for name in dir(loss_scale_optimizer_test.LossScaleOptimizerTest)
    if name.endswith("_stateless")
}
_GOLDEN_MATRICES = dict.fromkeys(
    (
        "test_empty_gradients",
        "test_ema",
        "test_ema_with_model_fit",
        "test_static_loss_scaling",
        "test_gradient_accumulation",
        "test_callable_learning_rate",
        "test_overwrite_with_gradient",
        "test_overwrite_with_gradient_with_gradient_accumulation",
    ),
    GOLDEN,
)

TestSGDAsPlain = case(
    "TestSGDAsPlain", sgd_test.SGDTest, sgd_test, {"SGD": Plain}, {**_VECTORS, **_MOMENTUM}
)
TestSGDAsRMNP = case(
    "TestSGDAsRMNP",
    sgd_test.SGDTest,
    sgd_test,
    {"SGD": RMNP},
    {**_VECTORS, **_MOMENTUM, "test_correctness_with_golden": GOLDEN},
)
TestSGDAsRACS = case(
    "TestSGDAsRACS",
    sgd_test.SGDTest,
    sgd_test,
    {"SGD": RACS},
    {
        **_VECTORS,
        **dict.fromkeys(
            ("test_config", "test_invalid_momentum", "test_correctness_with_golden"), SETTING
        ),
    },
)
TestOptimizerAsPlain = case(
    "TestOptimizerAsPlain",
    optimizer_test.OptimizerTest,
    optimizer_test,
    {"optimizers": namespace(SGD=Plain, Adam=RMNP)},
    {**_BASE, "test_ema_with_model_fit": "trains the head, which goes to AdamW here"},
)
TestOptimizerAsRACS = case(
    "TestOptimizerAsRACS",
    optimizer_test.OptimizerTest,
    optimizer_test,
    {"optimizers": namespace(SGD=RACS, Adam=RACS)},
    {**_BASE, **_GOLDEN_MATRICES},
)
TestLossScaleAsPlain = case(
    "TestLossScaleAsPlain",
    loss_scale_optimizer_test.LossScaleOptimizerTest,
    loss_scale_optimizer_test,
    {"SGD": Plain},
    {
        "test_apply_with_no_vars": VECTOR,
        "test_finite_step_stateful": VECTOR,
        "test_finite_step_with_inner_loss_scale_stateful": VECTOR,
        "test_finite_step_with_overwrite_stateful": VECTOR,
        **_STATELESS,
    },
)
