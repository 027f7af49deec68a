"""NeuRMS's parameter groups beside its model, in both modes of update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms.core.ground.errors import UnsupportedTrainingError
from tests.core.optimizers.test_beside import train

MODES = [(v, u) for v in "UBFP" for u in ("step", "backward")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def after_one_step(groups: Any = None, **settings: Any) -> dict[str, Tensor]:
    model = network()
    with neurms.NeuRMS(
        model, groups=groups and groups(model), **{"variant": "U", **settings}
    ) as optimizer:
        train(model, optimizer, 1)
    return weights(model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("variant", "update"), MODES)
def test_equal_settings_are_no_groups(variant: Any, update: Any, momentum: float) -> None:
    made = []
    for parts in (False, True):
        model = network()
        groups = [{"params": model[2]}, {"params": model[0].bias}] if parts else None
        with neurms.NeuRMS(
            model, variant=variant, update=update, momentum=momentum, groups=groups
        ) as optimizer:
            train(model, optimizer)
        made.append(weights(model))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize(("variant", "update"), MODES)
def test_rates_and_decay_are_each_group_s_own(variant: Any, update: Any) -> None:
    """One step from the same weights: each tensor moves as under an optimizer with its settings."""
    settings = {"variant": variant, "update": update}
    mixed = after_one_step(
        lambda m: [
            {"params": m[0].weight, "lr": 0.3, "weight_decay": 0.5},
            {"params": [m[0].bias, m[2].bias], "lr": 0.2},
        ],
        lr=0.1,
        **settings,
    )
    alone = {
        "0.weight": after_one_step(lr=0.3, weight_decay=0.5, **settings),
        "0.bias": after_one_step(lr=0.2, **settings),
        "2.bias": after_one_step(lr=0.2, **settings),
        "2.weight": after_one_step(lr=0.1, **settings),
    }
    start = weights(network())
    for name, own in alone.items():
        torch.testing.assert_close(mixed[name], own[name], rtol=1e-12, atol=1e-14, msg=name)
        assert not torch.equal(mixed[name], start[name])


def test_layers_may_have_variants_of_their_own() -> None:
    mixed = after_one_step(lambda m: [{"params": m[2], "variant": "F", "beta": 0.9}], lr=0.1)
    upper, lower = after_one_step(variant="F", beta=0.9, lr=0.1), after_one_step(lr=0.1)
    assert torch.equal(mixed["2.weight"], upper["2.weight"])
    assert torch.equal(mixed["0.weight"], lower["0.weight"])
    assert not torch.equal(upper["2.weight"], lower["2.weight"])


@pytest.mark.parametrize("update", ["step", "backward"])
def test_momentum_may_be_one_group_s(update: Any) -> None:
    for variant in ("U", "P"):
        model = network()
        groups = [{"params": model[2], "momentum": 0.9}]
        with neurms.NeuRMS(model, variant=variant, update=update, groups=groups) as optimizer:
            train(model, optimizer)
            assert "momentum" in optimizer.state[model[2].weight]
            assert "momentum" not in optimizer.state[model[0].weight]


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_schedule_moves_each_group(update: Any) -> None:
    model = network()
    groups = [{"params": model[2], "lr": 0.0}]
    with neurms.NeuRMS(model, lr=0.1, update=update, groups=groups, variant="U") as optimizer:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 1.0, lambda n: 0.0**n])
        before = weights(network())
        train(model, optimizer, 1)
        schedule.step()
        once = {name: value.clone() for name, value in weights(model).items()}
        train(model, optimizer, 1)
    assert torch.equal(weights(model)["2.weight"], before["2.weight"])
    assert not torch.equal(once["0.weight"], before["0.weight"])
    assert torch.equal(weights(model)["0.weight"], once["0.weight"])


def test_a_bias_shares_its_weight_s_statistics() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"variant='U' in the group of '2\.bias' and variant='B'"):
        neurms.NeuRMS(model, groups=[{"params": model[2].weight, "variant": "B"}], variant="U")
    with pytest.raises(ValueError, match=r"s_max=3.0 in the group of '2\.bias'"):
        neurms.NeuRMS(model, groups=[{"params": model[2].bias, "s_max": 3.0}], variant="U")
    with pytest.raises(ValueError, match=r"momentum=0.5 in the group of '0\.bias'"):
        neurms.NeuRMS(model, variant="P", groups=[{"params": model[0].bias, "momentum": 0.5}])
    assert not any(layer._forward_hooks for layer in model)


def test_p_and_the_others_do_not_mix() -> None:
    model = network()
    with pytest.raises(ValueError, match="use two optimizers"):
        neurms.NeuRMS(model, variant="U", groups=[{"params": model[2], "variant": "P"}])


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"maximize": True}, UnsupportedTrainingError, "negate the loss"),
        ({"agc": 0.1}, ValueError, "agc=0.1 cannot go"),
    ],
)
def test_a_group_asks_for_nothing_that_backward_cannot_do(setting, error, message) -> None:
    model = network()
    with pytest.raises(error, match=message):
        neurms.NeuRMS(
            model, update="backward", groups=[{"params": model[2], **setting}], variant="U"
        )


@pytest.mark.parametrize("name", ["heads", "loss_scale", "gemm", "loss_reduction", "head"])
def test_what_holds_for_the_whole_is_no_group_s(name: str) -> None:
    model = network()
    with pytest.raises(TypeError, match=f"sets '{name}', which holds for the whole optimizer"):
        neurms.NeuRMS(model, groups=[{"params": model[2], name: None}], variant="U")
