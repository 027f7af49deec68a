"""Other libraries' optimizers beside ours: torch in all its forms, pytorch_optimizer, heavyball.

Each takes one matrix. What a peer cannot do on this machine is recorded with its reason, so that a
missing number is no silent choice.
"""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.interleaved import Turn, interleaved

__all__ = ["GROUPS", "against_peers"]

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

PATIENCE = 240
"""Seconds after which a peer's first step, mostly compilation, is broken off."""

BASELINE = "torch AdamW fused"

_FORMS: dict[str, tuple[str, ...]] = {
    "SGD": ("default", "foreach", "fused"),
    "AdamW": ("default", "foreach", "fused"),
    "RMSprop": ("default", "foreach"),
    "Adafactor": ("default", "foreach"),
    "Muon": ("default",),
}
_PYTORCH_OPTIMIZER = ("racs", "alice", "muon", "adafactor", "soap", "shampoo", "kron")
_HEAVYBALL = ("AdamW", "Muon", "SOAP", "PSGDKron")


def _torch_forms() -> dict[str, Make]:
    made: dict[str, Make] = {}
    for name, forms in _FORMS.items():
        for form in forms:
            settings = {} if form == "default" else {form: True}
            made[f"torch {name} {form}"] = _torch(name, settings)
    return made


def _group(group: str) -> dict[str, Make]:
    if group == "torch":
        return _torch_forms()
    if group == "pytorch_optimizer":
        return {f"{group} {name}": _pytorch_optimizer(name) for name in _PYTORCH_OPTIMIZER}
    compiled = group.endswith("compiled")
    return {f"heavyball {name}": _heavyball(name, compiled) for name in _HEAVYBALL}


GROUPS = ("torch", "pytorch_optimizer", "heavyball", "heavyball compiled")


def against_peers(
    shape: tuple[int, int], ours: Mapping[str, Make], group: str, *, rounds: int
) -> dict[str, Any]:
    """Time one group of peers and ours in turns on matrices of one shape.

    Args:
        shape: (m, n).
        ours: This library's optimizers by name.
        group: One of :data:`GROUPS`; torch's fused AdamW, the baseline, is in each.
        rounds: Counted rounds.

    Returns:
        What :func:`~benchmarks.interleaved.interleaved` gives, with ``first_s``, the seconds of
        the first step, compilation included; ``{"failed": reason}`` for those that did not run.
    """
    turns: dict[str, Turn] = {}
    found: dict[str, Any] = {}
    makers = {BASELINE: _torch_forms()[BASELINE], **_group(group), **ours}
    for name, make in makers.items():
        parameter = torch.nn.Parameter(0.02 * torch.randn(shape))
        begun = time.perf_counter()
        try:
            with _patience():
                turn = _turn(make([parameter]), parameter)
                turn(0)()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}".partition("\n")[0][:160]}
            continue
        turns[name] = turn
        found[name] = {"first_s": time.perf_counter() - begun}
    timed = interleaved(turns, BASELINE, rounds=rounds, warmup=2)
    return {name: row | timed.get(name, {}) for name, row in found.items()}


@contextmanager
def _patience() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError(f"its first step took more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _turn(optimizer: Any, parameter: torch.nn.Parameter) -> Turn:
    def prepare(number: int) -> Callable[[], Any]:
        parameter.grad = torch.randn_like(parameter)

        def step() -> None:
            with warnings.catch_warnings():
                # Theirs to answer for.
                warnings.simplefilter("ignore")
                optimizer.step()

        return step

    return prepare


def _torch(name: str, settings: dict[str, bool]) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, lr=1e-3, **settings)


def _pytorch_optimizer(name: str) -> Make:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import pytorch_optimizer

        kind = pytorch_optimizer.load_optimizer(name)
        if name in ("muon", "alice"):
            parameters = [{"params": parameters, "use_muon": True}]  # type: ignore[list-item]
        optimizer: torch.optim.Optimizer = kind(parameters, lr=1e-3)
        return optimizer

    return make


def _heavyball(name: str, compiled: bool) -> Make:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import heavyball

        # One setting for the process, read at every call; a group has one.
        heavyball.utils.compile_mode = "default" if compiled else None
        optimizer: torch.optim.Optimizer = getattr(heavyball, name)(parameters, lr=1e-3)
        return optimizer

    return make
