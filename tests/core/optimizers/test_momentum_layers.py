"""Signals that are not finite, and gradients that are dropped, where M has taken some already."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurms.core.ground.errors import NonFiniteError
from tests.core.optimizers.momentum_models import (
    AVERAGES,
    RULES,
    assert_close,
    assert_same,
    backward,
    batch,
    made,
    network,
    snapshot,
    train,
)


class Spoils(torch.autograd.Function):
    """Passes on what it is given; upstream, with a value in place of the first entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone()
        gradient[0, 0] = ctx.value
        return gradient, None


def spoiled(model: nn.Sequential, layer: int, value: float, step: int = 0) -> Tensor:
    """Return a loss whose error signal turns bad on its way into ``model[layer]``."""
    x, y = batch(step)
    hidden = Spoils.apply(model[: layer + 1](x), value)  # type: ignore[no-untyped-call]
    return F.cross_entropy(model[layer + 1 :](hidden), y)


BAD = [float("nan"), float("inf"), -float("inf"), 1e308]
"""The last is finite, and so large that what is made of it is not."""


class TestBadSignals:
    @pytest.mark.parametrize("value", BAD)
    @pytest.mark.parametrize("name", RULES)
    def test_in_the_first_layer_that_backward_reaches(self, name: str, value: float) -> None:
        model = network()
        optimizer = made(name, model, update="backward")
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        before = snapshot(model, optimizer)
        with pytest.raises(NonFiniteError, match=r"'7\.weight'.*already updated.*: no layer"):
            spoiled(model, 7, value).backward()
        assert_same(before, snapshot(model, optimizer))
        optimizer.zero_grad()
        twin = network()
        train(twin, other := made(name, twin), range(2))
        train(model, optimizer, range(2, 4))
        train(twin, other, range(2, 4))
        assert_close(model, twin, 1e-12)

    @pytest.mark.parametrize("name", RULES)
    def test_the_error_names_what_was_updated_before(self, name: str) -> None:
        model = network()
        optimizer = made(name, model, update="backward")
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        before = snapshot(model, optimizer)
        with pytest.raises(NonFiniteError, match=r"'4\.weight' is NaN.*updated.*: 7\.weight\."):
            spoiled(model, 4, float("nan")).backward()
        after = snapshot(model, optimizer)
        # Weights stay; of the state, the momentum that is named has the gradient, all else stays.
        assert_same(before[0], after[0])
        velocity = after[1]["7.weight"].pop("momentum")
        assert bool(velocity.isfinite().all())
        assert not torch.equal(velocity, before[1]["7.weight"].pop("momentum"))
        assert_same(before[1], after[1])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", AVERAGES)
    def test_a_step_that_is_left_out_leaves_all_as_it_was(self, name: str, value: float) -> None:
        model = network()
        optimizer = made(name, model, update="backward", nonfinite="skip")
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        before = snapshot(model, optimizer)
        spoiled(model, 7, value).backward()
        backward(model, 3)  # A good part, which comes too late.
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert_same(before, snapshot(model, optimizer))
        optimizer.zero_grad()
        twin = network()
        train(twin, other := made(name, twin), range(2))
        train(model, optimizer, range(2, 4))
        train(twin, other, range(2, 4))
        assert_close(model, twin, 1e-12)

    def test_a_step_left_out_late_is_a_step_without_a_rate_for_what_came_before(self) -> None:
        model, twin = network(), network()
        optimizer = made("rmnp", model, update="backward", nonfinite="skip")
        other = made("rmnp", twin)
        train(model, optimizer, range(2))
        train(twin, other, range(2))
        optimizer.zero_grad()
        spoiled(model, 4, float("nan"), step=2).backward()
        optimizer.step()
        assert optimizer.skipped_steps == 1
        # What is documented: the layer above keeps its gradient in the average, and stands still.
        other.zero_grad()
        backward(twin, 2)
        last = twin[7].weight
        assert last.grad is not None
        other.state[last]["momentum"].lerp_(last.grad, 0.2)
        train(model, optimizer, range(3, 6))
        train(twin, other, range(3, 6))
        assert_close(model, twin, 1e-12)

    @pytest.mark.parametrize("nonfinite", ["raise", "skip"])
    def test_a_gradient_of_another_parameter(self, nonfinite: Any) -> None:
        model = network()
        optimizer = made("rmnp", model, update="backward", nonfinite=nonfinite)
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        backward(model, 2)
        bias, before = model[7].bias, copy.deepcopy(model)
        (bias * float("inf")).sum().backward()
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match=r"7\.bias.*already updated.*7\.weight"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert_close(model, before, 0.0)

    def test_large_where_the_other_is_small(self) -> None:
        """No bound on D or H alone refuses what gradients would allow."""
        results = []
        for update in ("backward", "step"):
            torch.manual_seed(0)
            layer = nn.Linear(6, 5, bias=False)
            optimizer = made("rmnp", nn.Sequential(layer), update=update)
            for _ in range(3):
                (layer(torch.randn(4, 6) * 1e-25) * 1e30).square().sum().mul(1e-8).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(layer)
        assert_close(*results, 1e-5)

    @pytest.mark.parametrize("scale", [1e19, 1e30])
    def test_products_that_would_overflow(self, scale: float) -> None:
        layer = nn.Linear(6, 5, bias=False)
        optimizer = made("rmnp", nn.Sequential(layer), update="backward")
        with pytest.raises(NonFiniteError):
            (layer(torch.full((4, 6), scale)) * scale).sum().backward()
        assert not optimizer.state


class TestDroppedGradients:
    @pytest.mark.parametrize("by", ["optimizer", "model"])
    def test_they_are_in_the_average_which_a_warning_tells(self, by: str) -> None:
        model, twin = network(), network()
        optimizer, other = made("rmnp", model, update="backward"), made("rmnp", twin)
        train(model, optimizer, range(2))
        train(twin, other, range(2))
        optimizer.zero_grad()
        backward(model, 2)
        if by == "optimizer":
            with pytest.warns(
                UserWarning, match=r"before step\(\), and the average of '2\.weight'"
            ):
                optimizer.zero_grad()
            backward(model, 3)
        else:
            model.zero_grad()
            with pytest.warns(UserWarning, match="before step"):
                backward(model, 3)
        optimizer.step()
        # As a step without a rate would have left it.
        other.zero_grad()
        backward(twin, 2)
        for index in (2, 4, 7):
            weight = twin[index].weight
            other.state[weight]["momentum"].lerp_(weight.grad, 0.2)
        train(twin, other, [3])
        assert_close(model, twin, 1e-12)

    def test_none_are_where_steps_are_taken(self) -> None:
        model = network()
        optimizer = made("rmnp", model, update="backward")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(3):
                model.zero_grad()
                backward(model, step, parts=3)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

    def test_a_retained_graph_adds_up(self) -> None:
        results = []
        for update in ("backward", "step"):
            model = network()
            optimizer = made("rmnp", model, update=update)
            for step in range(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch(step)[0]), batch(step)[1])
                loss.backward(retain_graph=True)
                loss.backward()
                optimizer.step()
            results.append(model)
        assert_close(*results, 1e-12)
