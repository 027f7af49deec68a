import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import neurms
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from tests.core.unitwise.preconditioning import (
    assert_same,
    batches,
    cnn,
    language_model,
    loss_of,
    mlp,
    sgd,
    trained,
    trained_beside,
)
from tests.core.unitwise.root_truth import inverse_root

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
    trained_beside(model, sgd(model, momentum=0.9), GradientPreconditioner(model, variant="U"))
    trained(reference, neurms.NeuRMS(reference, lr=0.05, momentum=0.9, variant="U"))
    assert_same(model, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity"},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity", "variant": "B"},
        {"agc": 0.05},
        {"normalize": "rms"},
        {"normalize": "rms", "momentum": 0.9, "variant": "B"},
        {"normalize": "rms", "momentum": 0.9, "momentum_coupling": "gradient+velocity"},
        {"normalize": "rms", "agc": 0.05, "momentum": 0.9, "variant": "F"},
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
    trained_beside(model, sgd(model), GradientPreconditioner(model, **{"variant": "U", **settings}))
    trained(reference, neurms.NeuRMS(reference, lr=0.05, **{"variant": "U", **settings}))
    assert_same(model, reference, rtol=1e-11, atol=1e-13)


def test_gradient_is_S_G_C_of_autograd_quantities():
    """Truth from autograd alone: D = N dL/dZ, H the layer's input, fresh statistics."""
    model = mlp()
    batch = next(batches(model))
    h = model[1](model[0](batch[0])).detach()
    z = model[2](h).detach().requires_grad_()
    F.cross_entropy(z, batch[1]).backward()
    errors, rows = z.grad, len(h)
    s = inverse_root((rows * errors).square().mean(0)).clamp(max=100.0)
    c = inverse_root(h.square().mean(0)).clamp(max=100.0)
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
    scaled = GradientPreconditioner(model, loss_scale=lambda: form(scale), variant="U")
    plain = GradientPreconditioner(reference, variant="U")
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
    ours, theirs = (
        GradientPreconditioner(model, variant="U"),
        GradientPreconditioner(reference, variant="U"),
    )
    for m in (model, reference):
        loss_of(m, batch).backward()
    weight = model[2].weight
    weight.grad = weight.grad.transpose(0, 3).contiguous().transpose(0, 3)
    ours.precondition_(model.parameters())
    theirs.precondition_(reference.parameters())
    assert_same_gradients(model, reference)


def test_half_precision_gradients_keep_a_float32_velocity():
    model = mlp(torch.bfloat16)
    preconditioner = GradientPreconditioner(model, momentum=0.9, variant="U")
    trained_beside(model, sgd(model), preconditioner, steps=2)
    velocity = preconditioner.state[model[0].weight]["momentum"]
    assert velocity.dtype == torch.float32
    assert preconditioner.state[model[0].weight]["v"].dtype == torch.float32


# ---------------------------------------------------------------- what it leaves alone


def test_other_parameters_keep_their_gradients():
    model = language_model()
    preconditioner = GradientPreconditioner(model, variant="U")
    F.cross_entropy(model(torch.tensor([0, 1, 2])), torch.tensor([1, 2, 3])).backward()
    before = [p.grad.clone() for p in model.parameters()]
    preconditioner.precondition_(model.parameters())
    changed = [not torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, False, True, True]
    assert [row.rule for row in preconditioner.plan()] == ["fallback"] * 3 + ["neurms"] * 2


def test_excluded_and_left_layers_keep_theirs():
    model = mlp()
    preconditioner = GradientPreconditioner(
        model, exclude=("0",), leave=(model[2].weight, model[2].bias), variant="U"
    )
    loss_of(model, next(batches(model))).backward()
    before = [p.grad.clone() for p in model.parameters()]
    preconditioner.precondition_(model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert not list(preconditioner)


def test_only_the_given_optimizers_layers_are_touched():
    model = mlp()
    preconditioner = GradientPreconditioner(model, variant="U")
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
    preconditioner = GradientPreconditioner(model, variant="U")
    kinds = [[p for p in model.parameters() if (p.ndim < 2) == bias] for bias in (False, True)]
    optimizers = [torch.optim.SGD(kinds[i], lr=0.05) for i in order]
    for batch in batches(model):
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            preconditioner.precondition_(optimizer)
            optimizer.step()
        model.zero_grad()
    trained(reference, neurms.NeuRMS(reference, lr=0.05, variant="U"))
    assert_same(model, reference, rtol=1e-12, atol=1e-14)


def test_parameters_of_other_models_in_the_same_optimizer_are_left_alone():
    model, other = mlp(), nn.Linear(5, 1).double()
    preconditioner = GradientPreconditioner(model, variant="U")
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    batch = next(batches(model))
    (loss_of(model, batch) + other(batch[0]).mean()).backward()
    before = other.weight.grad.clone()
    assert preconditioner.precondition_(optimizer)
    assert torch.equal(other.weight.grad, before)


def test_sparse_gradients_of_embeddings_pass():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 6))
    preconditioner = GradientPreconditioner(model, variant="U")
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
    preconditioner = GradientPreconditioner(model, variant="U")
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
    preconditioner = GradientPreconditioner(model, variant="U")
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
    preconditioner = GradientPreconditioner(model, variant="U")
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.05)
    trained_beside(model, optimizer, preconditioner, steps=1)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    trained_beside(model, optimizer, preconditioner, steps=1)
    assert [layer.state["step"] for layer in preconditioner] == [1, 2]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_dropped_gradients_take_their_statistics_along(set_to_none):
    model, reference = mlp(), mlp()
    ours, theirs = (
        GradientPreconditioner(model, variant="U"),
        GradientPreconditioner(reference, variant="U"),
    )
    dropped, kept = itertools.islice(batches(model), 2)
    loss_of(model, dropped).backward()
    model.zero_grad(set_to_none=set_to_none)
    loss_of(model, kept).backward()
    loss_of(reference, kept).backward()
    ours.precondition_(model.parameters())
    theirs.precondition_(reference.parameters())
    assert_same_gradients(model, reference)
