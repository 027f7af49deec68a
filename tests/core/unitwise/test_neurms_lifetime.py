"""Taps come with the optimizer and go with it; copies of the model are free of it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neurms import NeuRMS
from tests.core.unitwise.neurms_models import (
    assert_close_models,
    assert_same,
    batches,
    cnn,
    cross_entropy,
    mlp,
    pair,
    snapshot,
    train,
    vectors,
)
from tests.core.unitwise.test_neurms_errors import assert_untouched

UPDATES = pytest.mark.parametrize("update", ["step", "backward"])


class TestEnd:
    @UPDATES
    @pytest.mark.parametrize("make", [mlp, cnn])
    def test_detach_leaves_nothing_on_the_model(self, make: object, update: str) -> None:
        model, optimizer = pair(make, update=update)  # type: ignore[arg-type]
        optimizer.detach()
        optimizer.detach()
        assert_untouched(model)

    @UPDATES
    def test_context_manager(self, update: str) -> None:
        model = mlp()
        with NeuRMS(model, update=update, variant="U") as optimizer:
            train(model, optimizer, batches(2))
        assert_untouched(model)
        with pytest.raises(ZeroDivisionError), NeuRMS(model, update=update, variant="U"):
            raise ZeroDivisionError
        assert_untouched(model)

    def test_detached_layers_go_on_with_what_they_have(self) -> None:
        model, optimizer = pair(variant="F")
        train(model, optimizer, batches(2))
        kept = [copy.deepcopy(layer.state) for layer in optimizer.layers]
        optimizer.detach()
        before = model[0].weight.detach().clone()
        x, y = vectors()
        cross_entropy(model, x, y).backward()
        layer = next(iter(optimizer.layers))
        s, c = layer.factors()
        gradient = model[0].weight.grad.clone()
        optimizer.step()
        torch.testing.assert_close(
            model[0].weight.detach(), before - 0.05 * s[:, None] * gradient * c
        )
        assert_same(kept, [layer.state for layer in optimizer.layers])

    @UPDATES
    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    def test_the_last_reference_takes_the_optimizer_with_it(
        self, variant: str, update: str
    ) -> None:
        gc.disable()  # by counting alone: until a collector runs, B would go on rescaling
        try:
            model, optimizer = pair(variant=variant, update=update)
            train(model, optimizer, batches(2))
            gone = weakref.ref(optimizer)
            del optimizer
            assert gone() is None
        finally:
            gc.enable()
        plain = copy.deepcopy(model)
        x, y = vectors()
        for m in (model, plain):
            cross_entropy(m, x, y).backward()
        assert_same([p.grad for p in plain.parameters()], [p.grad for p in model.parameters()])
        assert_untouched(model)

    def test_a_scheduler_does_not_keep_it_from_going(self) -> None:
        _model, optimizer = pair()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        gone = weakref.ref(optimizer)
        del optimizer, scheduler
        gc.collect()
        assert gone() is None

    def test_the_model_can_go_first(self) -> None:
        model, optimizer = pair()
        train(model, optimizer, batches(1))
        gone = weakref.ref(model)
        del model, optimizer
        assert gone() is None


class TestCopies:
    @UPDATES
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_of_the_model_are_free(self, how: str, update: str) -> None:
        model, optimizer = pair(update=update, variant="F")
        train(model, optimizer, batches(1))
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        before = snapshot(model, optimizer)
        x, y = vectors()
        cross_entropy(twin, x, y).backward()
        assert_same(before, snapshot(model, optimizer))
        assert all(p.grad is not None for p in twin.parameters())
        # The copy takes an optimizer of its own and continues as the original does.
        other = NeuRMS(twin, lr=0.05, update=update, variant="F")
        twin.zero_grad()
        other.load_state_dict(optimizer.state_dict())
        train(model, optimizer, batches(2))
        train(twin, other, batches(2))
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    @pytest.mark.parametrize(
        "copying",
        [
            copy.deepcopy,
            copy.copy,
            pickle.dumps,
            lambda o: torch.save(o, io.BytesIO()),
            lambda o: copy.deepcopy({"model": nn.Linear(1, 1), "optimizer": o}),
        ],
        ids=["deepcopy", "copy", "pickle", "torch.save", "nested"],
    )
    def test_of_the_optimizer_are_refused_with_the_way_to_go(self, copying: object) -> None:
        _, optimizer = pair()
        with pytest.raises(TypeError, match=r"NeuRMS cannot be copied or pickled.*state_dict\(\)"):
            copying(optimizer)  # type: ignore[operator]


class TestTwoOptimizers:
    @UPDATES
    def test_on_disjoint_parts(self, update: str) -> None:
        model, twin = mlp(), mlp()
        lower = NeuRMS(model[:2], lr=0.05, update=update, variant="U")
        upper = NeuRMS(model[2:], lr=0.05, update=update, variant="F")
        alone = NeuRMS(twin[:2], lr=0.05, variant="U"), NeuRMS(twin[2:], lr=0.05, variant="F")
        for x, y in batches(3):
            for m, optimizers in ((model, (lower, upper)), (twin, alone)):
                cross_entropy(m, x, y).backward()
                for optimizer in optimizers:
                    optimizer.step()
                m.zero_grad()
        assert_close_models(twin, model, 1e-5)
        assert len(list(lower.layers)) == 1
        assert len(list(upper.layers)) == 2

    def test_one_after_the_other_on_one_model(self) -> None:
        model, optimizer = pair(variant="B")
        train(model, optimizer, batches(2))
        twin = copy.deepcopy(model)
        optimizer = NeuRMS(model, variant="B", lr=0.05)  # rebinding lets the old one go
        other = NeuRMS(twin, variant="B", lr=0.05)
        train(model, optimizer, batches(3))
        train(twin, other, batches(3))
        assert_same(snapshot(model, optimizer), snapshot(twin, other))


@UPDATES
@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_closures(variant: str, update: str) -> None:
    (model, optimizer), (twin, other) = (pair(variant=variant, update=update) for _ in range(2))
    for x, y in batches(3):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model, x, y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.item() == train(twin, other, [(x, y)])[0]
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


@UPDATES
@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_change_nothing(reentrant: bool, variant: str, update: str) -> None:
    def recomputed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = checkpoint(model[:2], x.clone().requires_grad_(), use_reentrant=reentrant)
        scores = checkpoint(model[2:], hidden, use_reentrant=reentrant)
        return nn.functional.cross_entropy(scores, y)

    (model, optimizer), (twin, other) = (pair(variant=variant, update=update) for _ in range(2))
    train(model, optimizer, batches(3))
    train(twin, other, batches(3), recomputed)
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


def test_a_layer_without_inputs_learns_its_bias() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    optimizer = NeuRMS(model, lr=0.1, variant="U")
    before = model[0].bias.detach().clone()
    model(torch.ones(4, 0)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].bias, before)


@UPDATES
def test_gradients_dropped_after_the_forward(update: str) -> None:
    # Lightning's order: forward, zero_grad, backward, step.
    (model, optimizer), (twin, other) = (pair(variant="F", update=update) for _ in range(2))
    for x, y in batches(3):
        loss = cross_entropy(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        train(twin, other, [(x, y)])
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


@UPDATES
def test_evaluation_and_adversarial_gradients_leave_no_trace(update: str) -> None:
    (model, optimizer), (twin, other) = (pair(variant="F", update=update) for _ in range(2))
    for x, y in batches(3):
        with torch.no_grad():
            model(100 * x)
        leaf = (100 * x).requires_grad_()
        torch.autograd.grad(cross_entropy(model, leaf, y), leaf)
        train(model, optimizer, [(x, y)])
        train(twin, other, [(x, y)])
    assert_same(snapshot(model, optimizer), snapshot(twin, other))
