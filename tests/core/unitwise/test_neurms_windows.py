"""Micro-batches, reductions, loss scales: what must not make a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms import NeuRMS
from tests.core.unitwise.neurms_models import (
    CASES,
    assert_close_models,
    assert_same,
    batches,
    cross_entropy,
    mlp,
    pair,
    snapshot,
    train,
    vectors,
)


def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="sum")


def accumulate(model: nn.Module, optimizer: NeuRMS, x: Tensor, y: Tensor, parts: int) -> None:
    for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (cross_entropy(model, part_x, part_y) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


class TestMicroBatches:
    @pytest.mark.parametrize("variant", ["U", "F"])
    @pytest.mark.parametrize("case", ["mlp", "sequence", "cnn"])
    def test_k_of_them_are_one_big_batch(self, case: str, variant: str) -> None:
        make, batch = CASES[case]
        x, y = batch()
        x, y = x[:4].double(), y[:4]
        whole, parts = make().double(), make().double()
        one = NeuRMS(whole, lr=0.1, variant=variant, momentum=0.9)
        many = NeuRMS(parts, lr=0.1, variant=variant, momentum=0.9)
        for scale in (1.0, 0.5, 2.0):
            train(whole, one, [(scale * x, y)])
            accumulate(parts, many, scale * x, y, 4)
            assert_close_models(whole, parts, 1e-12)
        for layer, other in zip(one.layers, many.layers, strict=True):
            torch.testing.assert_close(layer.state["v"], other.state["v"])

    def test_micro_batches_of_b_are_scaled_by_what_has_been_seen(self) -> None:
        # The documented exception: B cannot know in its first micro-batch what the last will show.
        (whole, one), (parts, many) = pair(variant="B"), pair(variant="B")
        x, y = vectors(8)
        train(whole, one, [(x, y)])
        accumulate(parts, many, x, y, 2)
        with pytest.raises(AssertionError, match="apart"):
            assert_close_models(whole, parts, 1e-3)
        # The last layer's errors come scaled by nothing, so its statistics are the big batch's.
        *_, last = one.layers
        *_, other = many.layers
        torch.testing.assert_close(last.state["v"], other.state["v"])

    def test_unequal_parts_weighted_by_their_rows(self) -> None:
        (whole, one), (parts, many) = pair(variant="F"), pair(variant="F")
        x, y = vectors(8)
        train(whole, one, [(x, y)])
        for part in (slice(0, 5), slice(5, 8)):
            share = (part.stop - part.start) / 8
            (cross_entropy(parts, x[part], y[part]) * share).backward()
        many.step()
        assert_close_models(whole, parts, 1e-5)

    def test_a_retained_graph_counts_twice_as_its_gradient_does(self) -> None:
        (twice, one), (doubled, other) = pair(), pair()
        x, y = vectors()
        loss = cross_entropy(twice, x, y)
        loss.backward(retain_graph=True)
        loss.backward()
        one.step()
        (cross_entropy(doubled, torch.cat([x, x]), torch.cat([y, y])) * 2).backward()
        other.step()
        assert_close_models(twice, doubled, 1e-5)


class TestReduction:
    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    @pytest.mark.parametrize("update", ["step", "backward"])
    def test_sum_says_the_same_as_mean(self, variant: str, update: str) -> None:
        # Errors of the sum are the per-row errors themselves, and G a sum of N of them: with lr / N
        # it is one trajectory, at every batch size.
        settings: dict[str, Any] = {"variant": variant, "update": update, "momentum": 0.5}
        mean, one = pair(lr=0.08, **settings)
        total, other = pair(lr=0.01, loss_reduction="sum", **settings)
        for batch in batches(5, rows=8):
            train(mean, one, [batch])
            train(total, other, [batch], summed)
        assert_close_models(mean, total, 1e-5)

    def test_the_wrong_setting_shows(self) -> None:
        mean, one = pair(lr=0.08)
        total, other = pair(lr=0.01)
        for batch in batches(3):
            train(mean, one, [batch])
            train(total, other, [batch], summed)
        with pytest.raises(AssertionError, match="apart"):
            assert_close_models(mean, total, 1e-3)


class TestLossScale:
    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    @pytest.mark.parametrize("as_tensor", [False, True])
    def test_scaled_is_unscaled(self, variant: str, as_tensor: bool) -> None:
        scale = 2.0**14
        plain, one = pair(variant=variant)
        give: Callable[[], Any] = lambda: torch.tensor(scale) if as_tensor else scale  # noqa: E731
        scaled, other = pair(variant=variant, loss_scale=give)
        for x, y in batches(4):
            train(plain, one, [(x, y)])
            (cross_entropy(scaled, x, y) * scale).backward()
            for parameter in scaled.parameters():
                parameter.grad.div_(scale)
            other.step()
            other.zero_grad()
        assert_close_models(plain, scaled, 1e-6)

    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    def test_a_gradscaler_changes_nothing(self, variant: str) -> None:
        plain, one = pair(variant=variant, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        scaled, other = pair(variant=variant, momentum=0.9, loss_scale=scaler.get_scale)
        for x, y in batches(6):
            train(plain, one, [(x, y)])
            scaler.scale(cross_entropy(scaled, x, y)).backward()
            scaler.step(other)
            scaler.update()
            other.zero_grad()
        assert scaler.get_scale() > 2.0**12
        assert_close_models(plain, scaled, 1e-5)

    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    @pytest.mark.parametrize("drop", ["optimizer", "model", "model to zero"])
    def test_an_overflow_commits_nothing(self, variant: str, drop: str) -> None:
        plain, one = pair(variant=variant)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        scaled, other = pair(variant=variant, loss_scale=scaler.get_scale)

        def zero_grad() -> None:
            if drop == "optimizer":
                other.zero_grad()
            else:
                scaled.zero_grad(set_to_none=drop == "model")

        data = batches(4)
        for number, (x, y) in enumerate(data):
            if number in (0, 2):
                before = snapshot(scaled, other)
                bad = (cross_entropy(scaled, x, y) * torch.tensor(float("inf"))).nan_to_num(0)
                scaler.scale(cross_entropy(scaled, x * 1e30, y) * 1e30 + bad).backward()
                scaler.step(other)
                scaler.update()
                after = snapshot(scaled, other)
                assert_same({**before, "pending": 0}, {**after, "pending": 0})
                zero_grad()
            train(plain, one, [(x, y)])
            scaler.scale(cross_entropy(scaled, x, y)).backward()
            scaler.step(other)
            scaler.update()
            zero_grad()
        assert scaler.get_scale() < 2.0**12
        assert_close_models(plain, scaled, 1e-5)

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_senseless_scale_is_refused(self, value: float) -> None:
        model, optimizer = pair(loss_scale=lambda: value)
        x, y = vectors()
        with pytest.raises(ValueError, match=r"loss_scale\(\) returned .*positive"):
            cross_entropy(model, x, y).backward()
        del optimizer


class TestDroppedGradients:
    """Statistics go with the gradients that they belong to, however those are dropped."""

    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    @pytest.mark.parametrize("to_none", [True, False])
    @pytest.mark.parametrize("by", ["optimizer", "model"])
    def test_a_window_that_is_thrown_away(self, by: str, to_none: bool, variant: str) -> None:
        plain, one = pair(variant=variant)
        model, other = pair(variant=variant)
        for x, y in batches(3):
            train(plain, one, [(x, y)])
            for _ in range(2):
                cross_entropy(model, 7 * x, y).backward()
            (other if by == "optimizer" else model).zero_grad(set_to_none=to_none)
            cross_entropy(model, x, y).backward()
            other.step()
            model.zero_grad(set_to_none=to_none)
        assert_close_models(plain, model, 1e-6)

    @pytest.mark.parametrize("clip", [False, True])
    def test_an_accumulated_window_is_kept_although_gradients_were_touched(
        self, clip: bool
    ) -> None:
        whole, one = pair()
        parts, many = pair()
        x, y = vectors(8)
        train(whole, one, [(x, y)])
        for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
            (cross_entropy(parts, part_x, part_y) / 4).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(parts.parameters(), 1e9)
        many.step()
        assert_close_models(whole, parts, 1e-6)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity"},
        {"weight_decay": 0.1},
        {"momentum": 0.5, "weight_decay": 0.1, "clip": "relative"},
        {"bias_correction": False, "loss_reduction": "sum"},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
@pytest.mark.parametrize("case", ["mlp", "sequence", "cnn"])
def test_step_and_backward_updates_are_one_trajectory(
    case: str, settings: dict[str, Any], variant: str
) -> None:
    make, batch = CASES[case]
    x, y = batch()
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        models = [make().to(dtype), make().to(dtype)]
        for model, update in zip(models, ["step", "backward"], strict=True):
            # A sum over rows is a longer way; far enough, rounding errors of float32 grow.
            lr = 0.002 if "loss_reduction" in settings else 0.02
            optimizer = NeuRMS(model, lr=lr, variant=variant, update=update, **settings)
            for number in range(8):
                train(model, optimizer, [(x.to(dtype) * (1 + 0.1 * number), y)])
        assert_close_models(*models, rtol)
        moved = zip(models[0].parameters(), make().to(dtype).parameters(), strict=True)
        assert all((p - q).abs().max() > 1e-3 for p, q in moved)


def test_backward_update_forms_no_weight_gradient() -> None:
    model, optimizer = pair(mlp, update="backward")
    x, y = vectors()
    before = model[0].weight.detach().clone()
    cross_entropy(model, x, y).backward()
    assert all(layer.weight.grad is None for layer in (model[0], model[2], model[4]))
    assert not torch.equal(model[0].weight, before)
    bias = model[0].bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].bias, bias)
