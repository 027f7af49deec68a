"""Copies of a tapped model for averages of weights: EMA and SWA, torch's and Lightning's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import neurms
from neurms.core.taps.hooks import HookTap
from tests.core.unitwise.neurms_models import assert_same, batches, cross_entropy, mlp

UPDATES = pytest.mark.parametrize("update", ["step", "backward"])


def taps(model: nn.Module) -> int:
    hooks = sum(isinstance(h, HookTap) for m in model.modules() for h in m._forward_hooks.values())
    return hooks + sum(type(m).__name__ == "_TappedLinear" for m in model.modules())


@UPDATES
def test_an_averaged_model_follows_and_disturbs_nothing(update: str) -> None:
    model, twin = mlp(), mlp()
    optimizer = neurms.NeuRMS(model, update=update, variant="U")  # type: ignore[arg-type]
    other = neurms.NeuRMS(twin, update=update, variant="U")  # type: ignore[arg-type]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = [p.detach().clone() for p in model.parameters()]
    for number, (x, y) in enumerate(batches(4)):
        for m, o in ((model, optimizer), (twin, other)):
            cross_entropy(m, x, y).backward()
            o.step()
            o.zero_grad()
        average.update_parameters(model)
        weights = [p.detach() for p in model.parameters()]
        expected = [
            w.clone() if number == 0 else 0.5 * e + 0.5 * w
            for e, w in zip(expected, weights, strict=True)
        ]
        average(x).sum().backward()  # of the copy, which no tap may see
    assert taps(average) == 0
    for found, wanted in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


@UPDATES
def test_a_deep_copy_trains_with_an_optimizer_of_its_own(update: str) -> None:
    model = mlp()
    optimizer = neurms.NeuRMS(model, update=update, variant="U")  # type: ignore[arg-type]
    copied = copy.deepcopy(model)
    assert taps(copied) == 0
    own = neurms.NeuRMS(copied, update=update, variant="U")  # type: ignore[arg-type]
    for x, y in batches(3):
        for m, o in ((model, optimizer), (copied, own)):
            cross_entropy(m, x, y).backward()
            o.step()
            o.zero_grad()
    assert_same(dict(model.state_dict()), dict(copied.state_dict()))


lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import (  # noqa: E402
    Callback,
    StochasticWeightAveraging,
    WeightAveraging,
)

from neurms.callbacks import NeuRMSCallback  # noqa: E402
from tests.callbacks.lightning_runs import Classifier, WithNeuRMS, data, trainer  # noqa: E402


class Ema(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(0.5))


class Weights(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append([p.detach().clone() for p in pl_module.parameters()])


@pytest.mark.parametrize("own", [False, True], ids=["callback", "optimizer"])
@pytest.mark.parametrize("average", [Ema, lambda: StochasticWeightAveraging(swa_lrs=0.05)])
def test_lightnings_averages(average: Any, own: bool) -> None:
    paths = []
    for callbacks in ([], [average()]):
        kept = Weights()
        extra = [] if own else [NeuRMSCallback(variant="U")]
        module = WithNeuRMS() if own else Classifier()
        trainer(kept, *extra, *callbacks, max_epochs=1).fit(module, data())
        paths.append(kept.seen)
        if not own:
            assert taps(module) == 0
    assert_same(paths[0][:1], paths[1][:1])
    assert all(p.isfinite().all() for p in paths[1][-1])
    if average is Ema:
        assert_same(paths[0], paths[1])
