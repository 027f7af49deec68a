import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import neurms
from neurms.core.errors import CheckpointError, NonFiniteError, UnsupportedTrainingError
from neurms.core.taps.hooks import HookTap
from neurms.core.unitwise.preconditioner import GradientPreconditioner


def mlp(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def cnn(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(3 * 9, 3),
    ).to(dtype)


def language_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)).double()


def batches(model: nn.Module, steps: int = 4):
    generator = torch.Generator().manual_seed(2)
    first = next(model.parameters())
    shape = (6, 2, 4, 4) if first.ndim == 4 else (6, 5)
    for _ in range(steps):
        inputs = torch.randn(shape, dtype=first.dtype, generator=generator)
        yield inputs, torch.randint(0, 3, (6,), generator=generator)


def loss_of(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained_beside(model, optimizer, preconditioner, steps: int = 4) -> nn.Module:
    for batch in batches(model, steps):
        loss_of(model, batch).backward()
        assert preconditioner.precondition_(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(model, optimizer, steps: int = 4) -> nn.Module:
    for batch in batches(model, steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(first: nn.Module, second: nn.Module, **tolerance) -> None:
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def assert_same_state(first: dict, second: dict) -> None:
    assert first["skipped_steps"] == second["skipped_steps"]
    torch.testing.assert_close(first["layers"], second["layers"], rtol=0.0, atol=0.0)


def sgd(model: nn.Module, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, **settings)


# ---------------------------------------------------------------- what it does to gradients


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_beside_sgd_it_is_neurms(build, variant, momentum):
    model, reference = build(), build()
    beside = GradientPreconditioner(model, variant=variant)
    trained_beside(model, sgd(model, momentum=momentum), beside)
    trained(reference, neurms.NeuRMS(reference, lr=0.05, variant=variant, momentum=momentum))
    assert_same(model, reference, rtol=1e-12, atol=1e-14)


def test_beside_sgd_it_is_neurms_in_single_precision():
    model, reference = mlp(torch.float32), mlp(torch.float32)
    trained_beside(model, sgd(model, momentum=0.9), GradientPreconditioner(model))
    trained(reference, neurms.NeuRMS(reference, lr=0.05, momentum=0.9))
    assert_same(model, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity"},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity", "variant": "B"},
        {"agc": 0.05},
        {"agc": 0.05, "momentum": 0.9, "variant": "F"},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "agc": 0.05},
        {"clip": "relative", "kappa": 1.5, "beta": 0.5},
        {"bias_correction": False, "s_min": 0.5, "s_max": 3.0},
        {"loss_reduction": "sum"},
        {"heads": {"0.weight": 2}},
    ],
    ids=str,
)
def test_every_setting_means_what_it_means_in_neurms(settings):
    model, reference = cnn(), cnn()
    trained_beside(model, sgd(model), GradientPreconditioner(model, **settings))
    trained(reference, neurms.NeuRMS(reference, lr=0.05, **settings))
    assert_same(model, reference, rtol=1e-11, atol=1e-13)


def test_gradient_is_S_G_C_of_autograd_quantities():
    """Truth from autograd alone: D = N dL/dZ, H the layer's input, fresh statistics."""
    model = mlp()
    batch = next(batches(model))
    h = model[1](model[0](batch[0])).detach()
    z = model[2](h).detach().requires_grad_()
    F.cross_entropy(z, batch[1]).backward()
    errors, rows = z.grad, len(h)
    s = ((rows * errors).square().mean(0) + 1e-8).rsqrt().clamp(max=100.0)
    c = (h.square().mean(0) + 1e-8).rsqrt().clamp(max=100.0)
    expected = s[:, None] * (errors.T @ h) * c
    with GradientPreconditioner(model, variant="F") as preconditioner:
        loss_of(model, batch).backward()
        preconditioner.precondition_(model.parameters())
    torch.testing.assert_close(model[2].weight.grad, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(model[2].bias.grad, s * errors.sum(0), rtol=1e-6, atol=0.0)
    assert model[2].weight.grad.abs().max() <= 1.0


def test_accumulated_micro_batches_are_one_big_batch():
    whole, parts = mlp(), mlp()
    one, two = (
        GradientPreconditioner(whole, variant="F"),
        GradientPreconditioner(parts, variant="F"),
    )
    for inputs, labels in batches(whole):
        for model, preconditioner, count in ((whole, one, 1), (parts, two, 3)):
            optimizer = sgd(model)
            for x, y in zip(inputs.chunk(count), labels.chunk(count), strict=True):
                (loss_of(model, (x, y)) / count).backward()
            preconditioner.precondition_(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(whole, parts, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", [float, torch.tensor])
def test_loss_scale_is_divided_out_of_the_statistics(form):
    model, reference = mlp(), mlp()
    scale = 1024.0
    scaled = GradientPreconditioner(model, loss_scale=lambda: form(scale))
    plain = GradientPreconditioner(reference)
    batch = next(batches(model))
    (loss_of(model, batch) * scale).backward()
    for parameter in model.parameters():
        parameter.grad /= scale
    loss_of(reference, batch).backward()
    scaled.precondition_(sgd(model))
    plain.precondition_(sgd(reference))
    assert_same_gradients(model, reference)


def assert_same_gradients(first: nn.Module, second: nn.Module) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-12)


def test_gradients_in_any_memory_format_are_scaled():
    model, reference = cnn(), cnn()
    batch = next(batches(model))
    ours, theirs = GradientPreconditioner(model), GradientPreconditioner(reference)
    for m in (model, reference):
        loss_of(m, batch).backward()
    weight = model[2].weight
    weight.grad = weight.grad.transpose(0, 3).contiguous().transpose(0, 3)
    ours.precondition_(model.parameters())
    theirs.precondition_(reference.parameters())
    assert_same_gradients(model, reference)


def test_half_precision_gradients_keep_a_float32_velocity():
    model = mlp(torch.bfloat16)
    preconditioner = GradientPreconditioner(model, momentum=0.9)
    trained_beside(model, sgd(model), preconditioner, steps=2)
    velocity = preconditioner.state[model[0].weight]["momentum"]
    assert velocity.dtype == torch.float32
    assert preconditioner.state[model[0].weight]["v"].dtype == torch.float32


# ---------------------------------------------------------------- what it leaves alone


def test_other_parameters_keep_their_gradients():
    model = language_model()
    preconditioner = GradientPreconditioner(model)
    F.cross_entropy(model(torch.tensor([0, 1, 2])), torch.tensor([1, 2, 3])).backward()
    before = [p.grad.clone() for p in model.parameters()]
    preconditioner.precondition_(model.parameters())
    changed = [not torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, False, True, True]
    assert [row.rule for row in preconditioner.plan()] == ["fallback"] * 3 + ["neurms"] * 2


def test_excluded_and_left_layers_keep_theirs():
    model = mlp()
    preconditioner = GradientPreconditioner(
        model, exclude=("0",), leave=(model[2].weight, model[2].bias)
    )
    loss_of(model, next(batches(model))).backward()
    before = [p.grad.clone() for p in model.parameters()]
    preconditioner.precondition_(model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert not list(preconditioner)


def test_only_the_given_optimizers_layers_are_touched():
    model = mlp()
    preconditioner = GradientPreconditioner(model)
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    loss_of(model, next(batches(model))).backward()
    waiting = model[2].weight.grad.clone()
    preconditioner.precondition_(first)
    assert torch.equal(model[2].weight.grad, waiting)
    assert model[2].weight not in preconditioner.state
    preconditioner.precondition_(second)
    assert preconditioner.state[model[2].weight]["step"] == 1
    assert preconditioner.state[model[0].weight]["step"] == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_layer_divided_among_two_optimizers_gets_one_commit(order):
    model, reference = mlp(), mlp()
    preconditioner = GradientPreconditioner(model)
    kinds = [[p for p in model.parameters() if (p.ndim < 2) == bias] for bias in (False, True)]
    optimizers = [torch.optim.SGD(kinds[i], lr=0.05) for i in order]
    for batch in batches(model):
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            preconditioner.precondition_(optimizer)
            optimizer.step()
        model.zero_grad()
    trained(reference, neurms.NeuRMS(reference, lr=0.05))
    assert_same(model, reference, rtol=1e-12, atol=1e-14)


def test_parameters_of_other_models_in_the_same_optimizer_are_left_alone():
    model, other = mlp(), nn.Linear(5, 1).double()
    preconditioner = GradientPreconditioner(model)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    batch = next(batches(model))
    (loss_of(model, batch) + other(batch[0]).mean()).backward()
    before = other.weight.grad.clone()
    assert preconditioner.precondition_(optimizer)
    assert torch.equal(other.weight.grad, before)


def test_sparse_gradients_of_embeddings_pass():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 6))
    preconditioner = GradientPreconditioner(model)
    F.cross_entropy(model(torch.tensor([0, 1])), torch.tensor([1, 2])).backward()
    assert preconditioner.precondition_(model.parameters())
    assert model[0].weight.grad.is_sparse


class _Bypass(nn.Module):
    """A layer used through its weight, and one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.bypassed = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, inputs):
        return F.linear(self.called(inputs), self.bypassed.weight, self.bypassed.bias)


def test_a_layer_that_is_never_called_is_named_once_and_left_to_the_optimizer():
    model = _Bypass().double()
    preconditioner = GradientPreconditioner(model)
    steps = batches(model, 2)
    loss_of(model, next(steps)).backward()
    before = model.bypassed.weight.grad.clone()
    with pytest.warns(UserWarning, match=r"'bypassed\.weight' has a gradient but no error signal"):
        preconditioner.precondition_(model.parameters())
    assert torch.equal(model.bypassed.weight.grad, before)
    loss_of(model, next(steps)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preconditioner.precondition_(model.parameters())


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_bias_of_a_frozen_weight_goes_to_the_optimizer(frozen_first):
    model = mlp()
    model[2].weight.requires_grad_(not frozen_first)
    preconditioner = GradientPreconditioner(model)
    model[2].weight.requires_grad_(False)
    loss_of(model, next(batches(model))).backward()
    before = model[2].bias.grad.clone()
    if frozen_first:
        assert "frozen" in preconditioner.plan()[3].reason
        preconditioner.precondition_(model.parameters())
    else:
        with pytest.warns(UserWarning, match="its weight is frozen"):
            preconditioner.precondition_(model.parameters())
    assert torch.equal(model[2].bias.grad, before)


def test_a_layer_thawed_in_training_is_preconditioned_from_then_on():
    model = mlp()
    model[0].requires_grad_(False)
    preconditioner = GradientPreconditioner(model)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.05)
    trained_beside(model, optimizer, preconditioner, steps=1)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    trained_beside(model, optimizer, preconditioner, steps=1)
    assert [preconditioner.state_of(layer)["step"] for layer in preconditioner] == [1, 2]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_dropped_gradients_take_their_statistics_along(set_to_none):
    model, reference = mlp(), mlp()
    ours, theirs = GradientPreconditioner(model), GradientPreconditioner(reference)
    dropped, kept = itertools.islice(batches(model), 2)
    loss_of(model, dropped).backward()
    model.zero_grad(set_to_none=set_to_none)
    loss_of(model, kept).backward()
    loss_of(reference, kept).backward()
    ours.precondition_(model.parameters())
    theirs.precondition_(reference.parameters())
    assert_same_gradients(model, reference)


# ---------------------------------------------------------------- bad steps


def poisoned(model: nn.Module, preconditioner, optimizer, value: float) -> None:
    loss_of(model, next(batches(model))).backward()
    model[0].bias.grad[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_raises_by_name_and_changes_nothing(value):
    model = mlp()
    optimizer, preconditioner = sgd(model), GradientPreconditioner(model, momentum=0.9)
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
    optimizer, preconditioner = sgd(model), GradientPreconditioner(model, nonfinite="skip")
    poisoned(model, preconditioner, optimizer, float("inf"))
    assert not preconditioner.precondition_(optimizer)
    assert preconditioner.skipped_steps == 1
    assert not preconditioner.state
    optimizer.zero_grad()
    trained_beside(model, optimizer, preconditioner)
    trained_beside(reference, sgd(reference), GradientPreconditioner(reference))
    assert_same(model, reference, rtol=0.0, atol=0.0)


def test_a_bad_statistic_is_noticed_though_gradients_are_finite():
    model = nn.Linear(2, 1, bias=False)
    preconditioner = GradientPreconditioner(model)
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
        model, optimizers=[optimizer], update="backward", **settings
    )
    trained_beside(model, optimizer, preconditioner)
    trained(reference, neurms.NeuRMS(reference, lr=0.05, momentum=momentum, **settings))
    assert_same(model, reference, rtol=1e-11, atol=1e-13)
    loss_of(model, next(batches(model))).backward()
    assert model[-1].weight.grad is None


def test_backward_updates_follow_a_schedule_and_a_reloaded_optimizer():
    model, reference = mlp(), mlp()
    optimizer, plain = sgd(model, momentum=0.9), sgd(reference, momentum=0.9)
    ours = GradientPreconditioner(model, optimizers=[optimizer], update="backward")
    theirs = GradientPreconditioner(reference)
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
        GradientPreconditioner(model, optimizers=build(model), update="backward", momentum=0.5)
    assert type(model[0]) is nn.Linear


def test_a_bad_backward_update_is_left_out():
    model = mlp()
    optimizer = sgd(model)
    preconditioner = GradientPreconditioner(
        model, optimizers=[optimizer], update="backward", nonfinite="skip"
    )
    before = model[2].weight.detach().clone()
    (model(torch.randn(4, 5).double())[:, :1].sum() * float("nan")).backward()
    assert not preconditioner.precondition_(optimizer)
    assert torch.equal(model[2].weight, before)


def test_backward_updates_notice_clipping_and_uses_outside_the_layer():
    model = mlp()
    optimizer = sgd(model)
    ours = GradientPreconditioner(model, optimizers=[optimizer], update="backward")
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
    with GradientPreconditioner(model) as preconditioner:
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
        return model, optimizer, GradientPreconditioner(model, **settings)

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
    preconditioner = GradientPreconditioner(compiled)
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
    preconditioner = GradientPreconditioner(model)
    trained_beside(model, sgd(model), preconditioner, steps=1)
    before = copy.deepcopy(preconditioner.state_dict())
    with pytest.raises(CheckpointError, match=message):
        preconditioner.load_state_dict(change(before))
    assert_same_state(preconditioner.state_dict(), before)


@pytest.mark.parametrize("settings", [{}, {"variant": "F"}, {"momentum": 0.9, "variant": "F"}])
def test_predicted_state_is_the_measured_one(settings):
    model = cnn()
    preconditioner = GradientPreconditioner(model, **settings)
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
        GradientPreconditioner(model, **settings)
    assert taps_of(model) == 0


def test_it_wants_a_model():
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        GradientPreconditioner(mlp().parameters())


def test_weight_decay_wants_an_optimizer():
    model = mlp()
    preconditioner = GradientPreconditioner(model, weight_decay=0.1)
    loss_of(model, next(batches(model))).backward()
    with pytest.raises(ValueError, match="needs a learning rate"):
        preconditioner.precondition_(model.parameters())


def test_a_loss_scale_must_be_positive():
    model = mlp()
    preconditioner = GradientPreconditioner(model, loss_scale=lambda: 0.0)
    with pytest.raises(ValueError, match=r"loss_scale\(\) returned 0.0"):
        loss_of(model, next(batches(model))).backward()
    assert not preconditioner.state
