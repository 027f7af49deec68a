"""``neurms advise``: a short AdamW run is watched, and the optimizer that follows is printed."""

from __future__ import annotations

import copy
import inspect
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from neurms.callbacks.profiler import profile
from neurms.cli.errors import UsageError
from neurms.cli.functions import called
from neurms.report.advice import Rule
from neurms.report.applied import AdviceList, Choice

__all__ = ["matched_rates", "run"]

Loss = Callable[[nn.Module], Tensor]

_LEAST = 10
"""Steps below which too few are profiled for any advice."""
_JOURNEY = 10
"""Steps in which rules are compared by the distance that they travel."""
_FORMS = (
    "it must return (model, loss) with loss(model) the loss of a batch, (model, batches), or "
    "(model, batches, criterion)"
)


def run(reference: str, lr: float, steps: int, *, as_json: bool = False) -> None:
    """Print the advice on a training, and the code that follows from it.

    Args:
        reference: ``module:function``.
        lr: AdamW's rate.
        steps: Steps that are watched.
        as_json: Print JSON and nothing else.

    Raises:
        UsageError: There is no such function, it returns something else, or a number is out of its
            range.
    """
    if not lr > 0:
        raise UsageError(f"--lr {lr} must be positive; 1e-3 is the default")
    if steps < _LEAST:
        raise UsageError(f"--steps {steps} must be at least {_LEAST}; 60 is the default")
    model, loss = _training(called(reference, "training"), reference, steps)
    advice = _watched(copy.deepcopy(model), loss, lr, steps)
    rates = matched_rates(model, loss, advice, lr)
    code = advice.choice(model, rates).code()
    if as_json:
        entries = [asdict(one) for one in advice]
        print(json.dumps({"advice": entries, "rates": rates, "code": code}, indent=1))
        return
    print("\n".join(map(str, advice)))
    print(f"\nAt rates that travel as far as AdamW does at {lr:g}; try a third and three times:\n")
    print(code)


def matched_rates(model: nn.Module, loss: Loss, advice: AdviceList, lr: float) -> dict[Rule, float]:
    """Return the rate at which each rule that is advised travels as far as AdamW does.

    From the same weights, with the same draws, both take a few steps at a rate too small to matter,
    so that distances are in proportion to it. A rule's distance is the median over its layers of
    the RMS by which their weights move.

    Args:
        model: At the weights to start from; it is left as it is.
        loss: Returns a model's loss on another batch each time.
        advice: On its layers.
        lr: AdamW's rate.

    Returns:
        Rule -> rate, AdamW's own among them; without rules that do not move.
    """
    small = lr / 10
    rates: dict[Rule, float] = {"AdamW": lr}
    theirs = _distances(model, loss, lambda own: Choice("adamw").optimizer(own), small)
    choice = advice.choice(model)
    if choice.name == "adamw":
        return rates
    ours = _distances(model, loss, choice.optimizer, small)
    for rule in dict.fromkeys(one.rule for one in advice):
        layers = [one.layer for one in advice if one.rule == rule and one.layer in ours]
        if rule in ("AdamW", "undecided") or not layers:
            continue
        own, adamw = (statistics.median(d[name] for name in layers) for d in (ours, theirs))
        if own > 0:
            rates[rule] = float(f"{lr * adamw / own:.2g}")
    return rates


def _distances(
    model: nn.Module, loss: Loss, make: Callable[[nn.Module], torch.optim.Optimizer], rate: float
) -> dict[str, float]:
    """Return how far each layer's weights move in a few steps, by the layer's name."""
    moved = copy.deepcopy(model)
    optimizer = make(moved)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _train(moved, optimizer, loss, _JOURNEY)
    before = dict(model.named_parameters())
    return {
        name.rpartition(".")[0]: (p - before[name]).detach().square().mean().sqrt().item()
        for name, p in moved.named_parameters()
        if p.ndim > 1
    }


def _watched(model: nn.Module, loss: Loss, lr: float, steps: int) -> AdviceList:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    every, warmup = max(1, steps // 20), min(5, steps // 4)
    try:
        profiler = profile(model, optimizer, every_n_steps=every, warmup_steps=warmup)
    except ValueError as error:
        raise UsageError(f"there is nothing to advise on; {error}") from None
    with profiler:
        _train(model, optimizer, loss, steps)
    return profiler.report().advice()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def _training(made: Any, reference: str, steps: int) -> tuple[nn.Module, Loss]:
    """Return the model and the loss that a user's function has made."""
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise UsageError(f"{reference} returned {_described(made)}; {_FORMS}")
    model, given, *criterion = made
    if not criterion and callable(given) and not isinstance(given, Iterable):
        _check_loss(given, reference)
        return model, _checked(given, reference)
    if not isinstance(given, Iterable) or not all(map(callable, criterion)):
        raise UsageError(f"{reference} returned {_described(made)}; {_FORMS}")
    batches = list(islice(given, steps))
    if not batches or (not criterion and not all(isinstance(b, Mapping) for b in batches)):
        kinds = "batches that are no dictionaries, and no criterion"
        problem = kinds if batches else "no batch"
        raise UsageError(f"{reference} returned {problem}; {_FORMS}")
    return model, _checked(_over(batches, criterion[0] if criterion else None), reference)


def _over(batches: Sequence[Any], criterion: Callable[[Any, Any], Tensor] | None) -> Loss:
    """Return a loss that takes the next of some batches at each call, round and round."""
    calls = -1

    def loss(model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        batch = batches[calls % len(batches)]
        if criterion is None:
            found: Tensor = model(**batch).loss
            return found
        inputs, targets = batch
        return criterion(model(inputs), targets)

    return loss


def _check_loss(loss: Any, reference: str) -> None:
    parameters = inspect.signature(loss).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(needed) != 1 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise UsageError(
            f"{reference} returned a loss that takes {needed or 'nothing'}; it must take the model "
            "alone, as loss(model), since copies of it are trained too"
        )


def _checked(loss: Loss, reference: str) -> Loss:
    """Return a loss that is refused unless it can be differentiated."""

    def checked(model: nn.Module) -> Tensor:
        value = loss(model)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise UsageError(
                f"the loss of {reference} is {_described(value)}; it must be a tensor of one "
                "number that depends on the model's parameters"
            )
        return value

    return checked


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + ("" if value.requires_grad else " alone")
    return type(value).__name__
