"""torch's generic optimizer cases, on every rule of this library.

torch installs what its own tests are made of (``torch.testing._internal.common_optimizers``: an
``OptimizerInfo`` for each optimizer, with its inputs, faulty inputs and schedules), but not the
tests. The cases in :mod:`tools.peers.torch_cases` have the names of theirs and ask what theirs ask.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

from neurms.core.catalog import HOMES
from neurms.core.optimizers.rules import rule_class
from tools.peers.outcome import Outcome, Refusal
from tools.peers.torch_cases import CASES, Subject

__all__ = ["REFUSALS", "RULES", "info_of", "outcomes"]

RULES = tuple(HOMES)

_SMALL: dict[str, dict[str, Any]] = {
    "alice": {"rank": 3, "leading": 1, "interval": 2},
    "low_rank_soap": {"rank": 3, "leading": 1, "interval": 2},
    "fira": {"rank": 3, "interval": 2},
    "galore": {"rank": 3, "interval": 2},
    "apollo": {"rank": 3, "interval": 2},
}

REFUSALS = (
    Refusal(
        "has one form, chosen by what it works on: torch's flags that choose another are refused",
        tests=r"test_global_cliquey_flags\.default",
        error=r"(foreach|fused|capturable|differentiable)=True cannot be served",
    ),
    Refusal(
        "takes real parameters only, and says so when it is built",
        tests=r"test_complex_2d\.default",
        error="only real floating dtypes can be preconditioned",
    ),
)


def info_of(rule: str) -> OptimizerInfo:
    """Return a rule as torch's machinery describes an optimizer."""
    cls = rule_class(rule)
    sgd = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
    return OptimizerInfo(
        cls,
        optim_inputs_func=lambda device, dtype=None: _inputs(rule),
        scheduler_inputs=sgd.scheduler_inputs,
        supported_impls=("foreach", "fused", "differentiable"),
        supports_fused_on=("cpu",),
        has_capturable_arg=True,
        supports_complex=False,
    )


def _inputs(rule: str) -> list[OptimizerInput]:
    """Return settings to run a case with: torch's global ones, and the rule's own."""
    own = _SMALL.get(rule, {})
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.001)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
        "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1},
    }
    if "momentum" in rule_class(rule).default_settings():
        settings["momentum"] = {"momentum": 0.5}
    if "variant" in rule_class(rule).default_settings():
        settings["variant P"] = {"variant": "P"}
    return [OptimizerInput(None, {**own, **kwargs}, desc) for desc, kwargs in settings.items()]


def outcomes(rules: Sequence[str] = RULES) -> Iterator[Outcome]:
    """Run every case on each of the rules, with every input that torch would give it."""
    for rule in rules:
        for subject in _subjects(rule):
            for name, case in CASES.items():
                if case.applies(subject):
                    yield _outcome(rule, f"{name}.{subject.description}", case, subject)


def _subjects(rule: str) -> Iterator[Subject]:
    info = info_of(rule)
    for given in info.optim_inputs_func("cpu"):
        yield Subject(rule, info, given.kwargs, given.desc)


def _outcome(rule: str, name: str, case: Any, subject: Subject) -> Outcome:
    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            case.run(subject)
        except Exception as error:  # what a case raises is its outcome
            return Outcome(rule, name, "failed", f"{type(error).__name__}: {error}"[-2000:])
    return Outcome(rule, name, "passed")
