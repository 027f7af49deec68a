"""Bad input: a typed error that names the argument, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms import NeuRMS
from tests.core.unitwise.neurms_models import assert_same, mlp, pair, snapshot, train, vectors


def assert_untouched(model: nn.Module) -> None:
    """No hook, no changed class, and gradients come as ever."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not type(module).__module__.startswith("neurms.")
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"variant": "X"}, ValueError, r"variant='X'.*'U', 'B', 'F'"),
        ({"variant": "u"}, ValueError, r"variant='u'"),
        ({"update": "later"}, ValueError, r"update='later'.*step.*backward"),
        ({"loss_reduction": "none"}, ValueError, r"loss_reduction='none'.*mean.*sum"),
        ({"clip": "none"}, ValueError, r"clip='none'"),
        ({"momentum_coupling": "velocity"}, ValueError, r"momentum_coupling='velocity'"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda'.*inductor"),
        ({"nonfinite": "ignore"}, ValueError, r"nonfinite='ignore'.*raise.*skip"),
        ({"low_precision": "up"}, ValueError, r"low_precision='up'"),
        ({"head": "none"}, ValueError, r"head='none'"),
        ({"beta": 1.0}, ValueError, r"beta=1.0 .*\[0, 1\)"),
        ({"beta": -0.1}, ValueError, r"beta=-0.1"),
        ({"beta": "0.9"}, TypeError, r"beta='0.9'.*real number"),
        ({"momentum": 1.0}, ValueError, r"momentum=1.0"),
        ({"momentum": float("nan")}, ValueError, r"momentum=nan"),
        ({"lr": -0.1}, ValueError, r"lr=-0.1"),
        ({"lr": float("nan")}, ValueError, r"lr=nan"),
        ({"lr": float("inf")}, ValueError, r"lr=inf"),
        ({"lr": None}, TypeError, r"lr=None"),
        ({"eps": -1e-8}, ValueError, r"eps=-1e-08"),
        ({"eps": 0.0, "v_min": 0.0}, ValueError, r"eps=0 and v_min=0"),
        ({"v_min": float("inf")}, ValueError, r"v_min=inf"),
        ({"s_min": 2.0, "s_max": 1.0}, ValueError, r"s_min=2.0.*s_max=1.0"),
        ({"c_min": 2.0, "c_max": 1.0}, ValueError, r"c_min=2.0.*c_max=1.0"),
        ({"s_max": 0.0}, ValueError, r"s_max=0.0"),
        ({"s_min": -1.0}, ValueError, r"s_min=-1.0"),
        ({"kappa": 0.5}, ValueError, r"kappa=0.5"),
        ({"agc": 0.0}, ValueError, r"agc=0.0"),
        ({"agc": True}, TypeError, r"agc=True"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0.1"),
        ({"fallback_lr": -1.0}, ValueError, r"fallback_lr=-1.0"),
        ({"fallback_betas": (0.9,)}, ValueError, r"fallback_betas=\(0.9,\)"),
        ({"exclude": ("nothing.*",)}, ValueError, r"exclude='nothing\.\*' matches no"),
        ({"exclude": "0.weight"}, TypeError, r"exclude='0.weight' must be a sequence"),
        ({"exclude": ("*",)}, ValueError, r"no layer that neurms can tap"),
        ({"loss_scale": 2.0}, TypeError, r"loss_scale=2.0 must be callable"),
        ({"heads": {"9.weight": 2}}, ValueError, r"heads='9.weight' matches no weight"),
        ({"heads": {"0.weight": 3}}, ValueError, r"heads\['0.weight'\]=3 must divide the 7"),
        ({"heads": {"0.weight": 0}}, ValueError, r"heads\['0.weight'\]=0"),
        ({"heads": {"0.weight": 1.0}}, ValueError, r"heads\['0.weight'\]=1.0"),
        ({"heads": 4}, TypeError, r"heads=4 must map"),
        ({"learning_rate": 0.1}, TypeError, r"neurms has no setting 'learning_rate'"),
        (
            {"update": "backward", "agc": 0.1},
            ValueError,
            r"agc=0.1 cannot go with update=\"backward",
        ),
        (
            {"update": "backward", "loss_scale": lambda: 2.0},
            ValueError,
            r"loss_scale cannot go with update=\"backward\".*GradScaler",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model, settings = mlp(), {"variant": "U", **settings}
    with pytest.raises(error, match=message):
        NeuRMS(model, **settings)
    assert_untouched(model)
    with pytest.raises(error, match=message):
        neurms.memory_report(model, "neurms", **settings)


class TestModel:
    def test_parameters_instead_of_a_model(self) -> None:
        model = mlp()
        for wrong in (model.parameters(), list(model.parameters()), [{"params": []}], None, 3):
            with pytest.raises(TypeError, match=r"model=.* must be an nn.Module.*pass the model"):
                NeuRMS(wrong, variant="U")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"must be an nn.Module"):
                neurms.create("neurms", wrong, variant="U")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(),
            nn.LayerNorm(3),
            nn.Embedding(3, 2),
            nn.LSTM(3, 2),
            nn.MultiheadAttention(4, 2),
            nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        ],
        ids=lambda model: type(model).__name__,
    )
    def test_nothing_to_tap(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"model=\w+ has no layer that neurms can tap"):
            NeuRMS(model, variant="U")
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_lazy_layer_has_no_shape_yet(self) -> None:
        model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
        with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet.*one batch"):
            NeuRMS(model, variant="U")

    def test_complex_weights(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64), nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"'0.weight' has dtype torch.complex64"):
            NeuRMS(model, variant="U")
        assert_untouched(model)

    def test_a_failure_in_the_middle_of_attaching_leaves_no_tap(self) -> None:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        held = NeuRMS(second, variant="U")
        second_twin = nn.Linear(3, 3)
        second_twin.weight = second.weight
        model = nn.Sequential(first, second_twin)
        with pytest.raises(ValueError, match="tied"):
            NeuRMS(model, variant="U")
        assert_untouched(model)
        held.detach()

    def test_several_ranks_and_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        model = mlp()
        with pytest.raises(
            neurms.core.ground.errors.UnsupportedTrainingError, match="trains on 2 ranks"
        ):
            NeuRMS(model, update="backward", variant="U")
        assert_untouched(model)


class TestGroups:
    def assert_unchanged_by(self, group: Any, error: type[Exception], message: str) -> None:
        model, optimizer = pair()
        x, y = vectors()
        train(model, optimizer, [(x, y)])
        before = snapshot(model, optimizer), len(optimizer.param_groups)
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert_same(before, (snapshot(model, optimizer), len(optimizer.param_groups)))
        train(model, optimizer, [(x, y)])

    def test_foreign_tensors(self) -> None:
        stranger = nn.Parameter(torch.randn(3, 2))
        message = r"comes without its module.*\"rule\": \"fallback\""
        self.assert_unchanged_by({"params": [("odd", stranger)]}, TypeError, f"'odd' {message}")
        self.assert_unchanged_by(
            {"params": [("odd", nn.Linear(2, 2).weight)], "rule": "neurms"}, TypeError, message
        )

    def test_bad_groups(self) -> None:
        good = [("odd", nn.Parameter(torch.randn(3)))]
        self.assert_unchanged_by({"params": good, "lr": -1.0}, ValueError, "lr=-1.0")
        self.assert_unchanged_by({"params": good, "rule": "magic"}, ValueError, "rule='magic'")
        self.assert_unchanged_by({"params": good, "beta": 2.0}, ValueError, "beta=2.0")

    def test_a_model_cannot_join_a_group_of_another_rule(self) -> None:
        with pytest.raises(ValueError, match=r"rule='neurms' reads what modules compute"):
            neurms.RACS([{"params": [nn.Parameter(torch.ones(2, 2))], "rule": "neurms"}])

    @pytest.mark.parametrize("rule", ["fallback", "racs"])
    def test_groups_of_other_rules_go_along(self, rule: str) -> None:
        model, optimizer = pair(momentum=0.9)
        twin, other = pair(momentum=0.9)
        extra = nn.Parameter(torch.ones(3, 2))
        alone = nn.Parameter(torch.ones(3, 2))
        optimizer.add_param_group({"params": [("extra", extra)], "rule": rule, "fallback_lr": 0.01})
        reference: torch.optim.Optimizer = (
            torch.optim.AdamW([alone], lr=0.01, weight_decay=0.0)
            if rule == "fallback"
            else neurms.RACS([alone])
        )
        x, y = vectors()
        for number in range(4):
            for p in (extra, alone):
                p.grad = torch.arange(6.0).reshape(3, 2) - number
            reference.step()
            train(model, optimizer, [(x, y)])
            train(twin, other, [(x, y)])
        torch.testing.assert_close(extra, alone, rtol=1e-6, atol=1e-7)
        assert_same(dict(model.state_dict()), dict(twin.state_dict()))
        assert optimizer.plan()[-1].rule == rule
