"""Which parameters an optimizer takes, with which rules and settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neurms import RACS, RMNP, Muon
from neurms.core.ground.errors import CheckpointError
from tests.core.optimizers.training import GRADIENT_RULES, matrix, random_gradients, small_model


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

    def test_frozen_parameters_of_any_dtype_are_left_alone(self) -> None:
        frozen = [torch.zeros(2, 2, dtype=kind) for kind in (torch.uint8, torch.complex64)]
        weight = matrix(2, 2)
        optimizer = RMNP([*frozen, weight])
        random_gradients([weight], 0)
        optimizer.step()
        assert [row.reason.endswith("(frozen)") for row in optimizer.plan()] == [True, True, False]

    @pytest.mark.parametrize(
        ("params", "error", "message"),
        [
            ([], ValueError, "empty parameter list"),
            (
                [torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)],
                TypeError,
                "param_0.*complex64",
            ),
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


def test_stochastic_rounding_refuses_float16() -> None:
    with pytest.raises(ValueError, match="choose 'master' or 'nearest'"):
        RMNP([matrix(dtype=torch.float16)], low_precision="stochastic")


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_base_rate_that_nothing_can_be_divided_by_is_refused(rate: float) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"base_lr=.* must be finite and greater than 0"):
        RMNP([{"params": [weight], "base_lr": rate}])
    optimizer = RMNP([weight])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["base_lr"] = rate
    with pytest.raises(CheckpointError, match=r"base_lr=.* must be finite and greater than 0"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_names_as_parameters(count: int) -> None:
    pair = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    group = {"params": pair, "param_names": [f"w{i}" for i in range(count)]}
    with pytest.raises(ValueError, match=rf"{count} names for 2 parameters; give a name"):
        RMNP([group])
