"""Keras's own optimizer tests, which its wheel holds, on this library's Keras optimizers.

Each of their test cases is subclassed, and where it says ``SGD`` or ``optimizers.Adam`` it gets one
of our classes, in the test's own module only: Keras's modules stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import unittest
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import keras.src.optimizers as theirs

from neurms.integrations.keras.classes import CLASSES
from tools.peers.outcome import Outcome, Refusal

__all__ = ["REFUSALS", "RULES", "outcomes"]

_KEPT = ("LossScaleOptimizer", "MultiOptimizer", "Optimizer", "BaseOptimizer")
"""Their classes that stay themselves: they hold ours."""

_NUMBERS = "expects the numbers of Keras's own rule, or of SGD for vectors, which go to AdamW here"
RULES = tuple(CLASSES)
REFUSALS = (
    Refusal(
        "sets what Keras's optimizer has and the rule has not",
        tests=".*",
        error=r"TypeError: \w+ has no setting '",
    ),
    Refusal(
        "moves bare variables, and the rule taps layers",
        tests=".*",
        error="the variables belong to no layer that neurms can tap",
        rules="neurms",
    ),
    Refusal(
        "is for JAX and TensorFlow: Keras has no sparse tensors on torch",
        tests=r"optimizer_sparse_test\..*",
        error="Sparse is unsupported with backend torch",
    ),
    Refusal("needs TensorFlow", tests=".*", error="No module named 'tensorflow'"),
    Refusal(
        "asks for functional updates; ours act in place and say so",
        tests=r".*_stateless|.*\.test_stateless_apply",
        error="has no functional form",
    ),
    Refusal(
        "calls the inside of Keras's Muon or Nadam",
        tests=r"(muon|nadam)_test\..*",
        error="has no attribute '(zeropower_via_newtonschulz5|_u_product)'",
    ),
    Refusal(
        "expects Keras's words; ours name the bound in their own",
        tests=r"sgd_test\.test_invalid_momentum",
        error=r"does not match .momentum=-1.0 must lie in \[0, 1\)",
    ),
    Refusal(
        "expects the class or the name that belongs to a built-in's string",
        tests=r"optimizer_test\.test_(get_method|optimizer_auto_naming)",
        error=r"is not an instance of|\n\+ (adam|sgd)",
    ),
    Refusal(
        _NUMBERS,
        tests=r"\w+_test\.test_(\w*single_step\w*|correctness_with_golden|multiple_steps)",
        error="AssertionError",
    ),
    Refusal(
        _NUMBERS,
        tests=r"optimizer_test\.test_(callable_learning_rate|ema|ema_with_model_fit|"
        r"empty_gradients|gradient_accumulation|static_loss_scaling|overwrite_with_gradient\w*)",
        error="AssertionError",
    ),
    Refusal(
        _NUMBERS,
        tests=r"(loss_scale_optimizer|multi_optimizer)_test\.test_(apply_with_no_vars|finite_step_\w+|"
        r"custom_callable_function|gradient_unscaling|multi_optimizer_w\w+|stateful_apply)",
        error="Not equal to tolerance",
    ),
    Refusal(
        "asks for Nesterov's step of no average, which torch's SGD refuses, too",
        tests=r"sgd_test\.test_correctness_with_golden",
        error="nesterov=True needs an average of gradients",
        rules="neurms",
    ),
    Refusal(
        "demands a weight decay, as Keras's AdamW does",
        tests=r"adamw_test\.test_weight_decay_is_none",
        error="ValueError not raised",
    ),
    Refusal(
        "calls the inside of Keras's Muon or Nadam",
        tests=r"muon_test\.test_muon_weight_decay",
        error="Not equal to tolerance",
    ),
    Refusal(
        "expects the class or the name that belongs to a built-in's string",
        tests=r"multi_optimizer_test\.test_serialization",
        error=r"\+ Adam",
    ),
)


def outcomes(rules: Sequence[str] = RULES) -> Iterator[Outcome]:
    """Run every test of every module on each of the rules."""
    modules = list(_modules())
    for rule in rules:
        for module in modules:
            yield from _of_module(rule, CLASSES[rule], module)


def _modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(theirs.__path__):
        if found.name.endswith("_test"):
            yield importlib.import_module(f"{theirs.__name__}.{found.name}")


def _of_module(rule: str, ours: type, module: ModuleType) -> Iterator[Outcome]:
    name = module.__name__.rpartition(".")[2]
    for case in list(vars(module).values()):
        if isinstance(case, type) and issubclass(case, unittest.TestCase):
            for test in unittest.defaultTestLoader.getTestCaseNames(case):
                yield _outcome(rule, f"{name}.{test}", _standing_in(case, module, ours)(test))


def _standing_in(case: type[unittest.TestCase], module: ModuleType, ours: type) -> Any:
    replaced = dict(_replacements(module, ours))

    def set_up(self: Any) -> None:
        for name, value in replaced.items():
            self.enterContext(mock.patch.object(module, name, value))
        case.setUp(self)

    return type(case.__name__, (case,), {"setUp": set_up, "__module__": case.__module__})


def _replacements(module: ModuleType, ours: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if value is theirs or value is keras.optimizers:
            classes = {n: ours for n, v in vars(value).items() if _is_replaced(v)}
            yield name, SimpleNamespace(**{**vars(value), **classes})
        elif _is_replaced(value):
            yield name, ours


def _is_replaced(value: Any) -> bool:
    if not (isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)):
        return False
    return value.__name__ not in _KEPT


def _outcome(rule: str, name: str, test: unittest.TestCase) -> Outcome:
    result = unittest.TestResult()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        test.run(result)
    errors = [text for _, text in (*result.failures, *result.errors)]
    if errors:
        return Outcome(rule, name, "failed", errors[0][-2000:])
    return Outcome(rule, name, "skipped" if result.skipped else "passed")
