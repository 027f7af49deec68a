"""Every message names the argument, its value and the cure; every error is one users catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import neurms
from neurms.core.ground import errors
from neurms.core.ground.errors import (
    CheckpointError,
    NeurmsError,
    NonFiniteError,
    UnsupportedTrainingError,
    check_betas,
    check_choice,
    check_fraction,
    check_interval,
    check_positive_int,
    check_real,
    meant,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (NonFiniteError, ArithmeticError),
        (UnsupportedTrainingError, RuntimeError),
        (CheckpointError, ValueError),
    ],
)
def test_families(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, NeurmsError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize("value", [0.0, 1, 2.5, torch.tensor(3.0)])
def test_reals(value: Any) -> None:
    assert check_real("x", value) == float(value)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_real("lr", -1.0), ValueError, r"lr=-1\.0 must be finite and at least 0"),
        (lambda: check_real("lr", 0.0, strict=True), ValueError, "greater than 0"),
        (lambda: check_real("lr", float("inf")), ValueError, "lr=inf must be finite"),
        (lambda: check_real("lr", float("nan")), ValueError, "lr=nan is not a number"),
        (lambda: check_real("lr", "1"), TypeError, "lr='1' must be a real number, not str"),
        (lambda: check_real("lr", True), TypeError, "not bool"),
        (lambda: check_real("lr", None), TypeError, "not NoneType"),
        (lambda: check_real("lr", [1.0]), TypeError, "not list"),
        (lambda: check_real("lr", torch.ones(2)), ValueError, "lr holds 2 numbers"),
        (
            lambda: check_real("a", 0.5, low=1.0, cure="raise it"),
            ValueError,
            "at least 1; raise it",
        ),
        (lambda: check_fraction("b", 1.0), ValueError, r"b=1\.0 must lie in \[0, 1\)"),
        (lambda: check_fraction("b", 1.1, closed=True), ValueError, r"in \[0, 1\]"),
        (lambda: check_positive_int("k", 0), ValueError, "k=0 must be at least 1"),
        (lambda: check_positive_int("k", 1.0), TypeError, r"k=1\.0 must be an integer, not float"),
        (lambda: check_positive_int("k", True), TypeError, "not bool"),
        (lambda: check_choice("v", "Z", ("U", "F")), ValueError, r"v='Z' .* one of \['U', 'F'\]"),
        (lambda: check_interval("lo", 2.0, "hi", 1.0), ValueError, r"lo=2\.0 is .* lower lo or"),
        (lambda: check_interval("lo", 0.0, "hi", 0.0), ValueError, r"hi=0\.0"),
        (lambda: check_betas("betas", (0.9,), 2), ValueError, "must hold 2 numbers"),
        (lambda: check_betas("betas", 0.9, 2), ValueError, "must hold 2 numbers"),
        (lambda: check_betas("betas", (0.9, 1.0), 2), ValueError, r"betas\[1\]=1\.0"),
    ],
)
def test_refusals(check: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check()


def test_what_passes() -> None:
    assert check_fraction("b", 1.0, closed=True) == 1.0
    assert check_positive_int("k", 3) == 3
    assert check_choice("v", None, (None, "U")) is None
    check_interval("lo", 1.0, "hi", 1.0)
    check_betas("betas", [0.0, 0.999], 2)


def test_index_is_complete() -> None:
    public = {n for n, v in vars(errors).items() if getattr(v, "__module__", "") == errors.__name__}
    assert {name for name in public if not name.startswith("_")} == set(errors.__all__)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("rcas", " (did you mean 'racs'?)"), ("RMNP", " (did you mean 'rmnp'?)"), ("x", ""), (3, "")],
)
def test_what_was_meant(value: object, wanted: str) -> None:
    assert meant(value, ["racs", "rmnp", None, True]) == wanted


def test_a_mistyped_name_is_answered_with_the_right_one() -> None:
    model = torch.nn.Linear(3, 2)
    for call, answer in (
        (lambda: neurms.create("Muno", model), "did you mean 'muon'"),
        (lambda: neurms.NeuRMS(model, variant="u"), "did you mean 'U'"),  # type: ignore[arg-type]
        (lambda: neurms.RACS(model, weigth_decay=0.1), "did you mean 'weight_decay'"),  # type: ignore[call-arg]
        (lambda: neurms.RACS(model, learning_rate=0.1), "write lr"),  # type: ignore[call-arg]
    ):
        with pytest.raises((TypeError, ValueError), match=answer):
            call()
