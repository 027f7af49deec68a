"""NaN and infinity in D, H or G: nothing of the step happens, and what had happened is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms import NeuRMS
from neurms.core.ground.errors import NonFiniteError
from tests.core.unitwise.neurms_models import (
    assert_same,
    batches,
    cnn,
    cross_entropy,
    images,
    mlp,
    pair,
    snapshot,
    train,
    vectors,
    wide,
)

BAD = [float("nan"), float("inf"), -float("inf")]


def poison(where: str, value: float, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Run a backward pass with a bad value in D or H of layer 2, or in a gradient."""
    handles: list[Any] = []
    if where == "H":
        # The row does not reach the loss: D is finite, and only D^T H is not.
        hidden = model[:2](x)
        dirty = hidden.clone()
        dirty[0, 0] = value
        nn.functional.cross_entropy(model[3:](model[2](dirty)[1:]), y[1:]).backward()
        return
    if where == "D":
        handles.append(
            model[2].register_forward_hook(
                lambda m, a, out: (
                    out.register_hook(lambda d: d.index_fill(0, torch.tensor(0), value)) and None
                )
            )
        )
    cross_entropy(model, x, y).backward()
    for handle in handles:
        handle.remove()
    if where == "G":
        model[2].weight.grad[1, 2] = value
    if where == "bias":
        model[2].bias.grad[1] = value


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("where", ["D", "H", "G", "bias"])
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("make", [mlp, wide])
class TestStep:
    def test_raise_leaves_everything(
        self, make: Any, where: str, value: float, variant: str
    ) -> None:
        (model, optimizer), (twin, other) = (
            pair(make, variant=variant, momentum=0.9),
            pair(make, variant=variant, momentum=0.9),
        )
        data = batches(3)
        train(model, optimizer, data[:1])
        train(twin, other, data[:1])
        poison(where, value, model, *data[1])
        before = snapshot(model, optimizer)
        for _ in range(2):  # still bad, still nothing changes
            with pytest.raises(NonFiniteError, match=r"'[02]\.\w+'.* NaN or infinite.*nothing"):
                optimizer.step()
            assert_same(before, snapshot(model, optimizer))
        optimizer.zero_grad()
        train(model, optimizer, data[2:])
        train(twin, other, data[2:])
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    @pytest.mark.parametrize("to_none", [True, False])
    def test_skip_leaves_everything(
        self, to_none: bool, make: Any, where: str, value: float, variant: str
    ) -> None:
        (model, optimizer), (twin, other) = (
            pair(make, variant=variant, nonfinite="skip"),
            pair(make, variant=variant),
        )
        data = batches(3)
        poison(where, value, model, *data[1])
        before = snapshot(model, optimizer)
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert_same(before, snapshot(model, optimizer))
        model.zero_grad(set_to_none=to_none)
        train(model, optimizer, data[2:])
        train(twin, other, data[2:])
        assert_same(snapshot(model, optimizer), snapshot(twin, other))


def test_a_repaired_gradient_can_be_stepped_with_its_statistics() -> None:
    (model, optimizer), (twin, other) = pair(), pair()
    x, y = vectors()
    cross_entropy(model, x, y).backward()
    kept = model[0].weight.grad.clone()
    model[0].weight.grad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        optimizer.step()
    model[0].weight.grad.copy_(kept)
    optimizer.step()
    train(twin, other, [(x, y)])
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


def test_statistics_that_overflow_although_the_gradient_does_not() -> None:
    # (1e25)^2 is no float32, 1e25 * 1e-20 is one.
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-25)
        model[1].weight.mul_(1e-5)
    optimizer = NeuRMS(model, variant="F")
    x = torch.full((4, 3), 1e25)
    cross_entropy(model, x, torch.tensor([0, 1, 0, 1])).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    before = snapshot(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"'0\.weight'"):
        optimizer.step()
    assert_same(before, snapshot(model, optimizer))


class TestBackward:
    """With update="backward" what was written before cannot be taken back, so it is named."""

    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    @pytest.mark.parametrize("where", ["D", "H"])
    @pytest.mark.parametrize("value", BAD, ids=str)
    @pytest.mark.parametrize(
        ("make", "gemm"), [(mlp, "float32"), (wide, "float32"), (wide, "bfloat16")]
    )
    def test_raise_names_what_was_updated(
        self, make: Any, gemm: str, where: str, value: float, variant: str
    ) -> None:
        model, optimizer = pair(make, variant=variant, update="backward", momentum=0.9, gemm=gemm)
        train(model, optimizer, batches(1))
        before = snapshot(model, optimizer)
        with pytest.raises(
            NonFiniteError,
            match=r"'2\.weight' is NaN or infinite; it was left.*: 4\.weight\. Lower",
        ):
            poison(where, value, model, *vectors())
        after = snapshot(model, optimizer)
        for name, weight in after["weights"].items():
            assert torch.equal(weight, before["weights"][name]) == (name != "4.weight")
        assert_same(before["state"][:4], after["state"][:4])
        assert_same(before["pending"], after["pending"])

    @pytest.mark.parametrize("drop", ["optimizer", "model"])
    def test_training_goes_on_after_the_error(self, drop: str) -> None:
        model, optimizer = pair(update="backward")
        x, y = vectors()
        loss = cross_entropy(model, x * float("inf"), y)  # stays alive, as in a training loop
        with pytest.raises(NonFiniteError, match="no layer"):
            loss.backward()
        (optimizer if drop == "optimizer" else model).zero_grad()
        twin, other = pair(update="backward")
        losses = train(model, optimizer, batches(4))
        assert losses == train(twin, other, batches(4))
        assert_same(snapshot(model, optimizer), snapshot(twin, other))
        del loss

    @pytest.mark.parametrize("where", ["D", "H"])
    def test_skip_leaves_the_bad_layer(self, where: str) -> None:
        model, optimizer = pair(update="backward", nonfinite="skip", momentum=0.9)
        train(model, optimizer, batches(1))
        before = snapshot(model, optimizer)
        poison(where, float("nan"), model, *vectors())
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.skipped_steps == 1
        after = snapshot(model, optimizer)
        assert torch.equal(after["weights"]["2.weight"], before["weights"]["2.weight"])
        assert_same(before["state"][2], after["state"][2])
        assert all(w.isfinite().all() for w in after["weights"].values())
        train(model, optimizer, batches(2))
        assert not torch.equal(model[2].weight, before["weights"]["2.weight"])

    def test_a_bad_gradient_at_the_step_names_what_had_moved(self) -> None:
        model = cnn()
        optimizer = NeuRMS(model, update="backward", variant="U")
        x, y = images()
        cross_entropy(model, x, y).backward()
        model[0].weight.grad[0, 0, 0, 0] = float("nan")
        before = snapshot(model, optimizer)["weights"]
        # The value was written in place, which is what the guard is for; let it look away.
        optimizer.layers._guard.detach()
        optimizer.layers._guard._seen.clear()
        with pytest.raises(NonFiniteError, match=r"'0\.weight'.*not applied.*: 6\.weight\. Lower"):
            optimizer.step()
        assert_same(before, snapshot(model, optimizer)["weights"])
        model.zero_grad()
        cross_entropy(model, x, y).backward()
        optimizer.step()


def test_the_fallback_is_checked_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = NeuRMS(model, variant="U")
    cross_entropy(model, torch.randn(4, 3), torch.tensor([0, 1, 0, 1])).backward()
    model[1].weight.grad[0] = float("nan")
    before = snapshot(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"'1\.weight'"):
        optimizer.step()
    assert_same(before, snapshot(model, optimizer))
