"""Bad steps, updates inside backward, and what a preconditioner keeps."""

import copy
import io

import pytest
import torch
from torch import nn

import neurms
from neurms.core.ground.errors import CheckpointError, NonFiniteError, UnsupportedTrainingError
from neurms.core.taps.hooks import HookTap
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from tests.core.unitwise.preconditioning import (
    assert_same,
    assert_same_state,
    batches,
    cnn,
    loss_of,
    mlp,
    sgd,
    trained,
    trained_beside,
)

# ---------------------------------------------------------------- bad steps


def poisoned(model: nn.Module, preconditioner, optimizer, value: float) -> None:
    loss_of(model, next(batches(model))).backward()
    model[0].bias.grad[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_raises_by_name_and_changes_nothing(value):
    model = mlp()
    optimizer, preconditioner = sgd(model), GradientPreconditioner(model, momentum=0.9, variant="U")
    trained_beside(model, optimizer, preconditioner, steps=2)
    poisoned(model, preconditioner, optimizer, value)
    state = copy.deepcopy(preconditioner.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match=r"'0\.bias'.*nothing was changed"):
        preconditioner.precondition_(optimizer)
    assert_same_state(preconditioner.state_dict(), state)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_a_bad_gradient_can_be_skipped_without_a_trace():
    model, reference = mlp(), mlp()
    optimizer, preconditioner = (
        sgd(model),
        GradientPreconditioner(model, nonfinite="skip", variant="U"),
    )
    poisoned(model, preconditioner, optimizer, float("inf"))
    assert not preconditioner.precondition_(optimizer)
    assert preconditioner.skipped_steps == 1
    assert not preconditioner.state
    optimizer.zero_grad()
    trained_beside(model, optimizer, preconditioner)
    trained_beside(reference, sgd(reference), GradientPreconditioner(reference, variant="U"))
    assert_same(model, reference, rtol=0.0, atol=0.0)


def test_a_bad_statistic_is_noticed_though_gradients_are_finite():
    model = nn.Linear(2, 1, bias=False)
    preconditioner = GradientPreconditioner(model, variant="U")
    # d = 1e20 squares to infinity in float32, while the gradient stays finite.
    (model(torch.full((3, 2), 1e-20)) * 1e20).sum().backward()
    assert torch.isfinite(model.weight.grad).all()
    with pytest.raises(NonFiniteError, match="'weight'"):
        preconditioner.precondition_(model.parameters())


# ---------------------------------------------------------------- update="backward"


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_backward_updates_beside_sgd_are_neurms(build, variant, momentum):
    model, reference = build(), build()
    optimizer = sgd(model, momentum=momentum)
    settings = {"variant": variant, "weight_decay": 0.01}
    preconditioner = GradientPreconditioner(
        model, optimizers=[optimizer], update="backward", **{"variant": "U", **settings}
    )
    trained_beside(model, optimizer, preconditioner)
    trained(
        reference,
        neurms.NeuRMS(reference, lr=0.05, momentum=momentum, **{"variant": "U", **settings}),
    )
    assert_same(model, reference, rtol=1e-11, atol=1e-13)
    loss_of(model, next(batches(model))).backward()
    assert model[-1].weight.grad is None


def test_backward_updates_follow_a_schedule_and_a_reloaded_optimizer():
    model, reference = mlp(), mlp()
    optimizer, plain = sgd(model, momentum=0.9), sgd(reference, momentum=0.9)
    ours = GradientPreconditioner(model, optimizers=[optimizer], update="backward", variant="U")
    theirs = GradientPreconditioner(reference, variant="U")
    for lr in (0.1, 0.01):
        for each in (optimizer, plain):
            each.load_state_dict(each.state_dict())
            each.param_groups[0]["lr"] = lr
        trained_beside(model, optimizer, ours, steps=2)
        trained_beside(reference, plain, theirs, steps=2)
    assert_same(model, reference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: [], "none of the optimizers given holds it"),
        (lambda m: [torch.optim.Adam(m.parameters())], "its optimizer is Adam"),
        (lambda m: [sgd(m, momentum=0.9, nesterov=True)], "nesterov=True"),
        (lambda m: [sgd(m, momentum=0.9, dampening=0.5)], r"dampening=0\.5"),
        (lambda m: [sgd(m, weight_decay=0.1)], r"weight_decay=0\.1"),
        (lambda m: [sgd(m, maximize=True)], "maximize=True"),
        (lambda m: [sgd(m, momentum=0.9)], "both keep a velocity"),
        (lambda m: [sgd(m.bfloat16())], "bfloat16"),
    ],
)
def test_backward_updates_refuse_what_they_do_not_know(build, message):
    model = mlp()
    with pytest.raises(UnsupportedTrainingError, match=message):
        GradientPreconditioner(
            model, optimizers=build(model), update="backward", momentum=0.5, variant="U"
        )
    assert type(model[0]) is nn.Linear


def test_a_bad_backward_update_is_left_out():
    model = mlp()
    optimizer = sgd(model)
    preconditioner = GradientPreconditioner(
        model, optimizers=[optimizer], update="backward", nonfinite="skip", variant="U"
    )
    before = model[2].weight.detach().clone()
    (model(torch.randn(4, 5).double())[:, :1].sum() * float("nan")).backward()
    assert not preconditioner.precondition_(optimizer)
    assert torch.equal(model[2].weight, before)


def test_backward_updates_notice_clipping_and_uses_outside_the_layer():
    model = mlp()
    optimizer = sgd(model)
    ours = GradientPreconditioner(model, optimizers=[optimizer], update="backward", variant="U")
    loss_of(model, next(batches(model))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(UnsupportedTrainingError, match="gradients were changed"):
        ours.precondition_(optimizer)
    ours.clear()
    optimizer.zero_grad()
    (loss_of(model, next(batches(model))) + model[0].weight.square().sum()).backward()
    with pytest.raises(UnsupportedTrainingError, match=r"'0\.weight'.*has a gradient too"):
        ours.precondition_(optimizer)


# ---------------------------------------------------------------- taps, state, settings


def taps_of(model: nn.Module) -> int:
    return sum(isinstance(h, HookTap) for m in model.modules() for h in m._forward_hooks.values())


def test_taps_come_and_go():
    model = mlp()
    with GradientPreconditioner(model, variant="U") as preconditioner:
        assert preconditioner.attached
        assert taps_of(model) == 2
    assert not preconditioner.attached
    assert taps_of(model) == 0
    preconditioner.attach()
    preconditioner.attach()
    assert taps_of(model) == 2


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_run_resumed_from_a_file_is_bit_equal(update):
    def build():
        model = cnn()
        optimizer = sgd(model, momentum=0.9)
        settings = {"variant": "F", "update": update, "optimizers": [optimizer]}
        return model, optimizer, GradientPreconditioner(model, **{"variant": "U", **settings})

    through = build()
    trained_beside(*through, steps=2)
    file = io.BytesIO()
    parts = [part.state_dict() for part in through]
    torch.save(parts, file)
    trained_beside(*through, steps=2)
    file.seek(0)
    resumed = build()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    trained_beside(*resumed, steps=2)
    assert_same(through[0], resumed[0], rtol=0.0, atol=0.0)


def test_names_in_checkpoints_do_not_show_torch_compile():
    model = mlp()
    compiled = nn.Sequential(torch.compile(model, backend="eager"))
    preconditioner = GradientPreconditioner(compiled, variant="U")
    loss_of(model, next(batches(model))).backward()
    preconditioner.precondition_(compiled.parameters())
    assert set(preconditioner.state_dict()["layers"]) == {"0.0.weight", "0.2.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, "must be what"),
        (lambda s: {**s, "variant": "B"}, "variant='B', now it is 'U'"),
        (lambda s: {**s, "layers": {"9.weight": {}}}, r"'9\.weight', which is not tapped"),
        (lambda s: {**s, "layers": {"0.weight": {"step": 1}}}, r"'0\.weight' differs in \['v'\]"),
        (
            lambda s: {**s, "layers": {"0.weight": {"step": 1, "v": torch.ones(2)}}},
            r"'v' of '0\.weight' is a tensor of shape \(2,\) .* expected a tensor of shape \(7,\)",
        ),
    ],
)
def test_a_foreign_checkpoint_is_refused_before_anything_changes(change, message):
    model = mlp()
    preconditioner = GradientPreconditioner(model, variant="U")
    trained_beside(model, sgd(model), preconditioner, steps=1)
    before = copy.deepcopy(preconditioner.state_dict())
    with pytest.raises(CheckpointError, match=message):
        preconditioner.load_state_dict(change(before))
    assert_same_state(preconditioner.state_dict(), before)


@pytest.mark.parametrize("settings", [{}, {"variant": "F"}, {"momentum": 0.9, "variant": "F"}])
def test_predicted_state_is_the_measured_one(settings):
    model = cnn()
    preconditioner = GradientPreconditioner(model, **{"variant": "U", **settings})
    predicted = preconditioner.plan().state_bytes
    trained_beside(model, sgd(model), preconditioner, steps=1)
    assert preconditioner.state_bytes() == predicted > 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": 0.1}, TypeError, "no setting 'lr'"),
        ({"fallback_lr": 0.1}, TypeError, "no setting 'fallback_lr'.*beside it"),
        ({"variant": "G"}, ValueError, "variant='G'"),
        ({"beta": 1.0}, ValueError, r"beta=1\.0"),
        ({"s_min": 2.0, "s_max": 1.0}, ValueError, "s_min"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"update": "later"}, ValueError, "update='later'"),
        ({"loss_reduction": "max"}, ValueError, "loss_reduction='max'"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"exclude": "0"}, TypeError, "exclude='0'"),
        ({"exclude": ("9",)}, ValueError, "matches no parameter"),
        ({"loss_scale": 2.0}, TypeError, r"loss_scale=2\.0"),
        ({"loss_scale": float, "update": "backward"}, ValueError, "loss_scale"),
        ({"agc": 0.1, "update": "backward"}, ValueError, "agc"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        GradientPreconditioner(model, **{"variant": "U", **settings})
    assert taps_of(model) == 0


def test_it_wants_a_model():
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        GradientPreconditioner(mlp().parameters(), variant="U")


def test_weight_decay_wants_an_optimizer():
    model = mlp()
    preconditioner = GradientPreconditioner(model, weight_decay=0.1, variant="U")
    loss_of(model, next(batches(model))).backward()
    with pytest.raises(ValueError, match="needs a learning rate"):
        preconditioner.precondition_(model.parameters())


def test_a_loss_scale_must_be_positive():
    model = mlp()
    preconditioner = GradientPreconditioner(model, loss_scale=lambda: 0.0, variant="U")
    with pytest.raises(ValueError, match=r"loss_scale\(\) returned 0.0"):
        loss_of(model, next(batches(model))).backward()
    assert not preconditioner.state
