"""What a training loop expects: schedules, closures, bad gradients, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

import neurms
from neurms import RMNP, Muon
from neurms.core.ground.errors import NonFiniteError
from tests.core.optimizers.training import (
    GRADIENT_RULES,
    RULES,
    assert_same_state,
    make,
    matrix,
    random_gradients,
    small_model,
    train,
)

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: min(1.0, step / 3)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=6),
    "one_cycle": lambda o: OneCycleLR(o, max_lr=0.5, total_steps=8),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5),
}


class TestSchedules:
    @pytest.mark.parametrize("kind", SCHEDULES)
    def test_fallback_follows_in_proportion(self, kind: str) -> None:
        """AdamW alone, its rate set by hand to what lr has become, moves a vector alike."""
        weight, vector, twin = matrix(), matrix(5), matrix(5)
        twin.data.copy_(vector.data)
        optimizer = RMNP([weight, vector], lr=0.2, fallback_lr=0.01)
        truth = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
        scheduler = SCHEDULES[kind](optimizer)
        rates = set()
        for step in range(6):
            group = optimizer.param_groups[0]
            truth.param_groups[0]["lr"] = 0.01 * group["lr"] / 0.2
            rates.add(group["lr"])
            random_gradients([weight, vector], step)
            twin.grad = vector.grad.clone()
            before = weight.detach().clone()
            optimizer.step()
            truth.step()
            moved = (weight.detach() - before).norm(dim=1)
            factor = (4 / 3) ** 0.5
            torch.testing.assert_close(
                moved, torch.full((4,), group["lr"] * factor), rtol=1e-3, atol=1e-6
            )
            torch.testing.assert_close(vector, twin)
            scheduler.step(*([1.0] if kind == "plateau" else []))
        assert len(rates) > 2

    def test_lr_in_a_tensor(self) -> None:
        first, second = matrix(), matrix()
        second.data.copy_(first.data)
        plain, wrapped = RMNP([first], lr=0.25), RMNP([second], lr=torch.tensor(0.25))  # type: ignore[arg-type]
        scheduler: LRScheduler = CosineAnnealingLR(wrapped, T_max=4)
        for optimizer, parameter in ((plain, first), (wrapped, second)):
            random_gradients([parameter], 0)
            optimizer.step()
        assert torch.equal(first, second)
        scheduler.step()
        wrapped.step()

    def test_lr_zero_moves_nothing(self) -> None:
        parameters = [matrix(), matrix(5)]
        before = [p.detach().clone() for p in parameters]
        optimizer = RMNP(parameters)
        optimizer.param_groups[0]["lr"] = 0.0
        random_gradients(parameters, 0)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


class TestBadGradients:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", RULES)
    def test_nothing_changes(self, name: str, bad: float) -> None:
        for mode in ("raise", "skip"):
            model = small_model()
            optimizer = make(name, model, nonfinite=mode)
            train(model, optimizer, 2)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            model[5].weight.grad[1, 2] = bad
            weights = copy.deepcopy(model.state_dict())
            state = copy.deepcopy(optimizer.state_dict())
            if mode == "raise":
                with pytest.raises(NonFiniteError, match=r"'5\.weight' is NaN or infinite"):
                    optimizer.step()
            else:
                optimizer.step()
                assert optimizer.skipped_steps == 1
            assert_same_state(dict(model.state_dict()), dict(weights))
            assert_same_state(optimizer.state_dict(), state)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("name", ["3.weight", "5.bias", "8.weight"])
    def test_of_parameters_that_the_fallback_takes(
        self, name: str, dtype: torch.dtype, bad: float
    ) -> None:
        model = small_model(dtype=dtype)
        optimizer = make("rmnp", model)
        train(model, optimizer, 2)
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient.flatten()[-1] = bad
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with pytest.raises(NonFiniteError, match=f"'{name}' is NaN or infinite"):
            optimizer.step()
        assert_same_state(dict(model.state_dict()), dict(weights))
        assert_same_state(optimizer.state_dict(), state)

    def test_a_first_step_that_is_skipped_leaves_no_state(self) -> None:
        parameter = matrix()
        optimizer = RMNP([parameter], nonfinite="skip")
        parameter.grad = torch.full((4, 3), float("nan"))
        optimizer.step()
        assert not optimizer.state_dict()["state"]

    def test_huge_finite_gradients_are_no_error(self) -> None:
        parameter = matrix()
        optimizer = Muon([parameter])
        parameter.grad = torch.full((4, 3), 3e37)  # their sum overflows
        optimizer.step()
        assert parameter.isfinite().all()

    def test_sparse_gradients_are_refused(self) -> None:
        embedding = nn.Embedding(5, 3, sparse=True)
        other = matrix()
        before = other.detach().clone()
        optimizer = RMNP([("other", other), ("embedding.weight", embedding.weight)])
        other.grad = torch.randn(4, 3)
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(TypeError, match=r"'embedding\.weight' is sparse.*sparse=False"):
            optimizer.step()
        assert torch.equal(other, before)

    def test_unknown_mode(self) -> None:
        with pytest.raises(ValueError, match="nonfinite='ignore'"):
            RMNP([matrix()], nonfinite="ignore")  # type: ignore[arg-type]


class TestClosures:
    def test_closure_is_called_once_with_gradients_on(self) -> None:
        weight = matrix(2, 3)
        optimizer = RMNP([weight])
        calls = []

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            calls.append(torch.is_grad_enabled())
            return loss

        before = weight.detach().clone()
        loss = optimizer.step(closure)
        assert calls == [True]
        torch.testing.assert_close(loss.detach(), before.square().sum())
        assert not torch.equal(before, weight)
        assert optimizer.step() is None

    def test_the_gradient_stays_as_it_was(self) -> None:
        for name in GRADIENT_RULES:
            model = small_model()
            optimizer = make(name, model, weight_decay=0.1)
            parameters = list(model.parameters())
            random_gradients(parameters, 1)
            kept = [p.grad.clone() for p in parameters if p.grad is not None]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, kept, strict=True))


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("name", ["rmnp", "racs", "muon", "alice"])
    def test_a_copy_goes_on_like_the_original(self, name: str, how: str) -> None:
        model = small_model()
        optimizer = make(name, model, nonfinite="skip", exclude=["5"])
        train(model, optimizer, 2)
        pair = (model, optimizer)
        twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        for m, o in (pair, twin):
            train(m, o, range(2, 4))
        assert_same_state(dict(model.state_dict()), dict(twin[0].state_dict()))
        assert_same_state(optimizer.state_dict(), twin[1].state_dict())
        assert str(optimizer.plan()) == str(twin[1].plan())
        assert twin[1].nonfinite == "skip"

    def test_the_copy_moves_its_own_parameters(self) -> None:
        parameter = matrix()
        optimizer = RMNP([parameter])
        before = parameter.detach().clone()
        twin = copy.deepcopy(optimizer)
        own = twin.param_groups[0]["params"][0]
        own.grad = torch.randn(4, 3)
        twin.step()
        assert torch.equal(parameter, before)
        assert not torch.equal(own, before)


@pytest.mark.parametrize("rule", ["swan", "nora"])
@pytest.mark.parametrize("bare", [False, True])
def test_weights_of_one_feature_move_by_the_fallback_where_the_rule_cannot(
    rule: str, bare: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 1))
    optimizer = neurms.create(rule, model.parameters() if bare else model, lr=1e-2)
    first = optimizer.plan()[0]
    assert (first.rule, first.reason) == (
        "fallback",
        f"1 feature, and {rule} moves matrices of at least 2",
    )
    before = model[0].weight.detach().clone()
    model(torch.linspace(-1, 1, 8)[:, None]).square().mean().backward()
    optimizer.step()
    assert (model[0].weight - before).abs().min() > 0


def test_a_rule_that_applies_to_nothing_says_so_once() -> None:
    with pytest.warns(UserWarning, match="rmnp applies to 0 of 2 parameters") as caught:
        neurms.RMNP(nn.Bilinear(3, 4, 2))
    assert len(caught) == 1
