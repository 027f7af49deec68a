"""What a training loop expects: groups, schedules, closures, bad gradients, copies, layouts."""

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

from neurms import RACS, RMNP, Muon
from neurms.core.errors import NonFiniteError
from tests.core.optimizers.training import (
    GRADIENT_RULES,
    RULES,
    assert_same_state,
    make,
    random_gradients,
    small_model,
    train,
)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (4, 3)).to(dtype))


class TestParameters:
    def test_a_model_is_routed_by_kinds_of_modules(self) -> None:
        rules = {row.name: (row.rule, row.reason) for row in RMNP(small_model()).plan()}
        assert rules == {
            "0.weight": ("rmnp", "convolution"),
            "0.bias": ("fallback", "bias"),
            "2.weight": ("rmnp", "hidden linear layer"),
            "2.bias": ("fallback", "bias"),
            "3.weight": ("fallback", "1-D tensor: no matrix"),
            "3.bias": ("fallback", "bias"),
            "5.weight": ("rmnp", "hidden linear layer"),
            "5.bias": ("fallback", "bias"),
            "7.weight": ("rmnp", "hidden linear layer"),
            "7.bias": ("fallback", "bias"),
            "8.weight": ("fallback", "output head"),
            "8.bias": ("fallback", "bias"),
        }

    def test_head_and_exclude_override(self) -> None:
        optimizer = RMNP(small_model(), head="rule", exclude=["2", "5.w*"])
        rules = {row.name: (row.rule, row.reason) for row in optimizer.plan()}
        assert rules["8.weight"] == ("rmnp", "output head")
        assert rules["2.weight"] == ("fallback", "excluded by '2'")
        assert rules["5.weight"] == ("fallback", "excluded by '5.w*'")
        assert rules["7.weight"][0] == "rmnp"

    @pytest.mark.parametrize("named", [False, True])
    def test_tensors_of_two_axes_or_more_get_the_rule(self, named: bool) -> None:
        model = small_model()
        params = model.named_parameters() if named else model.parameters()
        optimizer = RMNP(params)
        for row, (name, parameter) in zip(optimizer.plan(), model.named_parameters(), strict=True):
            assert row.rule == ("rmnp" if parameter.ndim >= 2 else "fallback")
            assert not named or row.name == name

    def test_exclude_needs_names(self) -> None:
        with pytest.raises(ValueError, match="needs names"):
            RMNP(small_model().parameters(), exclude=["0"])
        optimizer = RMNP(small_model().named_parameters(), exclude=["0"])
        assert optimizer.plan()[0].rule == "fallback"

    def test_an_exclude_pattern_may_be_meant_for_one_of_several_groups(self) -> None:
        model = small_model()
        groups = [
            {"params": [(f"{i}.weight", model[i].weight)], "lr": 0.1 * (i + 1)} for i in (2, 5)
        ]
        assert [row.rule for row in RMNP(groups, exclude=["5"]).plan()] == ["rmnp", "fallback"]
        with pytest.raises(ValueError, match="exclude='9' matches no parameter"):
            RMNP(groups, exclude=["9"])

    def test_scalars_vectors_and_empty_tensors(self) -> None:
        parameters = [matrix(), nn.Parameter(torch.tensor(1.0)), matrix(5), matrix(0, 3), matrix(0)]
        before = [p.detach().clone() for p in parameters]
        optimizer = RMNP(parameters)
        random_gradients(parameters, 0)
        optimizer.step()
        for old, new in zip(before, parameters, strict=True):
            assert new.isfinite().all()
            assert new.numel() == 0 or not torch.equal(old, new)
        assert optimizer.plan().state_bytes == optimizer.state_bytes()

    def test_parameters_without_a_gradient_stay(self) -> None:
        moving, still = matrix(), matrix()
        before = still.detach().clone()
        optimizer = RMNP([moving, still])
        moving.grad = torch.randn(4, 3)
        optimizer.step()
        assert torch.equal(still, before)
        assert still not in optimizer.state

    @pytest.mark.parametrize(
        ("params", "error", "message"),
        [
            ([], ValueError, "empty parameter list"),
            ([torch.zeros(2, 2, dtype=torch.complex64)], TypeError, "param_0.*complex64"),
            ([torch.zeros(2, 2, dtype=torch.int32)], TypeError, "param_0.*int32"),
            (["weight"], TypeError, "params holds 'weight'"),
            ({torch.zeros(2, 2)}, TypeError, "pass a list"),
            ([torch.zeros(2, 2)] * 2, ValueError, "twice"),
        ],
    )
    def test_bad_parameters(self, params: Any, error: type[Exception], message: str) -> None:
        if isinstance(params, set):
            params = [{"params": params}]
        with pytest.raises(error, match=message):
            RMNP(params)


class TestGroups:
    def test_groups_may_have_rules_and_settings_of_their_own(self) -> None:
        parameters = [matrix() for _ in range(4)]
        apart = [nn.Parameter(p.detach().clone()) for p in parameters]
        together = RMNP(
            [
                {"params": [parameters[0]], "lr": 0.3},
                {"params": [parameters[1]], "rule": "muon", "lr": 0.2, "momentum": 0.5},
                {"params": [parameters[2]], "rule": "fallback", "fallback_lr": 0.1},
                {"params": [parameters[3]], "weight_decay": 0.5},
            ],
            lr=0.1,
        )
        single = [
            RMNP([apart[0]], lr=0.3),
            Muon([apart[1]], lr=0.2, momentum=0.5),
            torch.optim.AdamW([apart[2]], lr=0.1, weight_decay=0.0),
            RMNP([apart[3]], lr=0.1, weight_decay=0.5),
        ]
        for seed in range(3):
            random_gradients(parameters, seed)
            random_gradients(apart, seed)
            together.step()
            for optimizer in single:
                optimizer.step()
        for a, b in zip(parameters, apart, strict=True):
            torch.testing.assert_close(a, b)
        assert [row.rule for row in together.plan()] == ["rmnp", "muon", "fallback", "rmnp"]
        assert together.plan()[2].reason == "asked for by its group"

    @pytest.mark.parametrize("rule", [name for name in GRADIENT_RULES if name != "racs"])
    def test_any_rule_may_ride_along(self, rule: str) -> None:
        first, second = matrix(), matrix()
        optimizer = RACS([{"params": [first]}, {"params": [second], "rule": rule}])
        for seed in range(2):
            random_gradients([first, second], seed)
            optimizer.step()
        assert optimizer.plan().state_bytes == optimizer.state_bytes()

    def test_rules_that_read_modules_may_not(self) -> None:
        with pytest.raises(ValueError, match=r"use neurms\.NeuRMS\(model\)"):
            RACS([{"params": [matrix()], "rule": "neurms"}])

    def test_a_group_added_in_mid_training_starts_at_its_first_step(self) -> None:
        first, late, alone = matrix(), matrix(), matrix()
        alone.data.copy_(late.data)
        optimizer, truth = RMNP([first]), RMNP([alone])
        random_gradients([first], 0)
        optimizer.step()
        optimizer.add_param_group({"params": late})
        random_gradients([first, late], 1)
        alone.grad = late.grad
        optimizer.step()
        truth.step()
        assert torch.equal(late, alone)
        assert optimizer.state[first]["step"] == 2
        assert optimizer.state[late]["step"] == 1

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            ({"lr": -1.0}, "lr=-1.0"),
            ({"momentum": 1.0}, "momentum=1.0"),
            ({"weight_decay": -1.0}, "weight_decay=-1.0"),
            ({"fallback_betas": (1.0, 0.9)}, "fallback_betas"),
            ({"rule": "adamw"}, "rule='adamw' is not known"),
        ],
    )
    def test_a_bad_group_changes_nothing(self, group: dict[str, Any], message: str) -> None:
        optimizer = RMNP([matrix()])
        new = matrix()
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [new], **group})
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.plan()) == 1

    def test_the_given_dictionary_is_left_as_it_was(self) -> None:
        group = {"params": [matrix()]}
        RMNP([group])
        assert group.keys() == {"params"}

    def test_changed_settings_take_effect(self) -> None:
        changed, fresh = matrix(), matrix()
        fresh.data.copy_(changed.data)
        optimizer = RMNP([changed], nesterov=True, momentum=0.5)
        optimizer.param_groups[0].update(nesterov=False, lr=0.5)
        truth = RMNP([fresh], nesterov=False, momentum=0.5, lr=0.5)
        for p, o in ((changed, optimizer), (fresh, truth)):
            random_gradients([p], 3)
            o.step()
        assert torch.equal(changed, fresh)


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


class TestLayouts:
    @pytest.mark.parametrize("name", GRADIENT_RULES)
    def test_memory_layout_does_not_matter(self, name: str) -> None:
        """Transposed, strided, expanded and channels-last tensors move like contiguous ones."""
        # Square and of full rank: SOAP's bases are arbitrary where a gradient has no energy at all.
        plain = [matrix(6, 6), matrix(8, 2, 2, 2), matrix(6), matrix(6, 6)]
        settings = {"rank": 8, "leading": 8} if name == "low_rank_soap" else {}
        strange = [
            nn.Parameter(plain[0].detach().t().contiguous().t()),
            nn.Parameter(plain[1].detach().to(memory_format=torch.channels_last)),
            nn.Parameter(torch.zeros(12)[::2].copy_(plain[2].detach())),
            nn.Parameter(torch.zeros(6, 12)[:, ::2].copy_(plain[3].detach())),
        ]
        optimizers = [make_for(name, parameters, **settings) for parameters in (plain, strange)]
        for seed in range(3):
            for parameters, optimizer in zip((plain, strange), optimizers, strict=True):
                random_gradients(parameters, seed)
                if parameters is strange:
                    parameters[1].grad = parameters[1].grad.to(memory_format=torch.channels_last)
                    parameters[3].grad = parameters[3].grad.t().contiguous().t()
                optimizer.step()
        for a, b in zip(plain, strange, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("gradient", ["contiguous", "transposed", "expanded"])
    def test_fallback_reads_gradients_by_their_strides(self, gradient: str) -> None:
        first, second = matrix(4, 6), matrix(4, 6)
        second.data.copy_(first.data)
        value = torch.randn(4, 6)
        if gradient == "expanded":
            value = value[:, :1].expand(4, 6)
        elif gradient == "transposed":
            value = value.t().contiguous().t()
        ours = RMNP([{"params": [first], "rule": "fallback"}])
        theirs = torch.optim.AdamW([second], weight_decay=0.0, foreach=False, fused=False)
        first.grad, second.grad = value, value
        for optimizer in (ours, theirs):
            optimizer.step()
        torch.testing.assert_close(first, second)


def make_for(name: str, parameters: list[nn.Parameter], **settings: Any) -> Any:
    return make(name, parameters, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GRADIENT_RULES)
def test_float64_stays_float64(name: str) -> None:
    parameter = matrix(dtype=torch.float64)
    optimizer = make_for(name, [parameter])
    for seed in range(3):
        random_gradients([parameter], seed)
        optimizer.step()
    for value in optimizer.state[parameter].values():
        assert not isinstance(value, torch.Tensor) or value.dtype != torch.float32
    assert parameter.isfinite().all()


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("name", GRADIENT_RULES)
def test_bfloat16_follows_float32(name: str, low_precision: str) -> None:
    """Weights that bfloat16 holds exactly, steps far above its resolution: the same to 1 %."""
    wide = matrix(6, 4)
    wide.data.copy_(wide.detach().bfloat16())
    narrow = nn.Parameter(wide.detach().bfloat16())
    start = wide.detach().clone()
    settings = {"weight_decay": 0.1}
    optimizers = (
        make(name, [wide], **settings),
        make(  # type: ignore[arg-type]
            name,
            [narrow],  # type: ignore[arg-type]
            low_precision=low_precision,
            **settings,
        ),
    )
    for seed in range(2):
        random_gradients([narrow], seed)
        assert narrow.grad is not None
        wide.grad = narrow.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    bound = 0.02 * float(start.abs().max()) + 0.05 * float((wide.detach() - start).abs().max())
    assert float((narrow.detach().float() - wide.detach()).abs().max()) < bound
    master = optimizers[1].state[narrow].get("master")
    if low_precision == "master":
        assert torch.equal(master.bfloat16(), narrow)
        torch.testing.assert_close(master, wide.detach(), rtol=0.05, atol=bound)
    else:
        assert master is None


def test_master_keeps_what_bfloat16_loses() -> None:
    kept, lost = (nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16)) for _ in range(2))
    optimizers = (RMNP([kept], lr=1e-4, low_precision="master"), RMNP([lost], lr=1e-4))
    for parameter, optimizer in zip((kept, lost), optimizers, strict=True):
        for _ in range(100):
            parameter.grad = torch.ones(4, 3, dtype=torch.bfloat16)
            optimizer.step()
    assert torch.equal(lost, torch.ones_like(lost))
    assert (kept < 1).all()


def test_stochastic_rounding_refuses_float16() -> None:
    with pytest.raises(ValueError, match="choose 'master' or 'nearest'"):
        RMNP([matrix(dtype=torch.float16)], low_precision="stochastic")
