import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import neurms
from neurms.core.diagnostics.probe import FactorizationProbe


def correlation(g, v, u):
    """Pearson's correlation with the outer product formed, in float64."""
    pair = torch.stack((g.double().square().flatten(), torch.outer(v, u).flatten()))
    return float(torch.corrcoef(pair / pair.std(1, keepdim=True))[0, 1])


def signals(model, layer, inputs, targets):
    """H and the per-row D of one linear layer under a mean loss, from autograd alone."""
    kept = {}

    def keep(_, args, output):
        kept["h"], kept["z"] = args[0].detach(), output

    handle = layer.register_forward_hook(keep)
    loss = cross_entropy(model(inputs), targets)
    handle.remove()
    (d,) = torch.autograd.grad(loss, kept["z"])
    return kept["h"].double(), d.double() * len(inputs)


def perceptron():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batch(rows=9):
    return torch.randn(rows, 6).double(), torch.randint(4, (rows,))


@pytest.mark.parametrize("name", ["sgd", "adamw", "neurms"])
def test_rho_is_the_correlation_with_averaged_moments(name):
    model, beta = perceptron(), 0.8
    optimizer = neurms.create(name, model, lr=0.05)
    averages = {}
    with FactorizationProbe(model, beta) as probe:
        for step in range(1, 5):
            inputs, targets = batch()
            optimizer.zero_grad()
            for key in ("0", "2"):
                h, d = signals(model, model.get_submodule(key), inputs, targets)
                v, u = averages.get(key, (0.0, 0.0))
                averages[key] = (
                    beta * v + (1 - beta) * d.square().mean(0),
                    beta * u + (1 - beta) * h.square().mean(0),
                )
            cross_entropy(model(inputs), targets).backward()
            # The truth starts at zero and is corrected, as the draft's averages are.
            truth = {
                key: correlation(
                    model.get_submodule(key).weight.grad,
                    *(average / (1 - beta**step) for average in averages[key]),
                )
                for key in averages
            }
            first = probe.rho()
            assert first == probe.rho()
            optimizer.step()
    assert set(first) == set(truth)
    for key, value in truth.items():
        assert first[key] == pytest.approx(value, rel=1e-9)


def test_trajectories_do_not_change() -> None:
    def trained(model, probed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if probed:
            probe = FactorizationProbe(model).attach()
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            inputs = torch.randn(8, 6, generator=generator).double()
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            if probed:
                probe.rho()
            optimizer.step()
        return model

    plain, probed = perceptron(), None
    probed = trained(copy.deepcopy(plain), True)
    for left, right in zip(trained(plain, False).parameters(), probed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_micro_batches_are_one_batch() -> None:
    whole = perceptron()
    split = copy.deepcopy(whole)
    with FactorizationProbe(whole, 0.7) as one, FactorizationProbe(split, 0.7) as two:
        for _ in range(3):
            inputs, targets = batch(8)
            for model in (whole, split):
                model.zero_grad()
            cross_entropy(whole(inputs), targets).backward()
            for part, labels in zip(inputs.split(4), targets.split(4), strict=True):
                (cross_entropy(split(part), labels) / 2).backward()
            assert one.rho() == pytest.approx(two.rho(), rel=1e-12)


def test_gradients_zeroed_in_place_need_a_commit() -> None:
    def rhos(keep_tensors):
        torch.manual_seed(3)
        model = perceptron()
        found = []
        with FactorizationProbe(model, 0.5) as probe:
            for _ in range(4):
                model.zero_grad(set_to_none=not keep_tensors)
                inputs, targets = batch()
                cross_entropy(model(inputs), targets).backward()
                found.append(probe.rho()["0"])
                if keep_tensors:
                    probe.commit()
        return found

    assert rhos(True) == pytest.approx(rhos(False), rel=1e-12)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv1d(4, 3, 2)],
)
def test_convolutions(layer) -> None:
    layer = layer.double()
    spatial = layer.weight.ndim - 2
    inputs = torch.randn(5, 4, *[7] * spatial).double()
    kept = {}
    layer.register_forward_hook(lambda *call: kept.update(z=call[2]))
    with FactorizationProbe(layer) as probe:
        loss = layer(inputs).pow(3).mean()
        (d,) = torch.autograd.grad(loss, kept["z"], retain_graph=True)
        loss.backward()
        (rho,) = probe.rho().values()
    positions = tuple(range(2, inputs.ndim))
    v, u = d.square().sum((0, *positions)), inputs.square().sum((0, *positions))
    groups, weight = layer.groups, layer.weight.grad
    blocks = []
    for group in range(groups):
        if layer.transposed:
            own = weight.unflatten(0, (groups, -1))[group].transpose(0, 1)
        else:
            own = weight.unflatten(0, (groups, -1))[group]
        vu = torch.outer(v.view(groups, -1)[group], u.view(groups, -1)[group])
        blocks.append((own.square().flatten(2), vu[:, :, None].expand_as(own.flatten(2))))
    pair = torch.stack([torch.cat([b[i].flatten() for b in blocks]) for i in (0, 1)])
    truth = float(torch.corrcoef(pair / pair.std(1, keepdim=True))[0, 1])
    assert rho == pytest.approx(truth, rel=1e-9)


def test_one_row_factorises_exactly() -> None:
    """G = d h^T for a batch of one, so that G_ij^2 is v_i u_j itself."""
    model = perceptron()
    with FactorizationProbe(model) as probe:
        model(torch.randn(1, 6).double()).square().sum().backward()
        assert probe.rho() == pytest.approx({"0": 1.0, "2": 1.0}, rel=1e-9)


def test_loss_scale_is_divided_out() -> None:
    """Averages over steps of different scales; a common factor alone would leave rho as it is."""

    def rho(scales):
        torch.manual_seed(5)
        model, current = perceptron(), [1.0]
        with FactorizationProbe(model, 0.5, loss_scale=lambda: current[0]) as probe:
            for current[0] in scales:
                model.zero_grad()
                inputs, targets = batch()
                (cross_entropy(model(inputs), targets) * current[0]).backward()
            return probe.rho()["0"]

    assert rho((1.0, 64.0, 8.0)) == pytest.approx(rho((1.0, 1.0, 1.0)), rel=1e-9)


def test_variant_b_is_probed_with_the_errors_that_make_its_gradient() -> None:
    model = perceptron()
    probe = FactorizationProbe(model).attach()
    neurms.NeuRMS(model, variant="B")
    model(torch.randn(1, 6).double()).square().sum().backward()
    assert probe.rho() == pytest.approx({"0": 1.0, "2": 1.0}, rel=1e-9)


def test_overflow_does_not_stay_in_the_averages() -> None:
    model = perceptron()
    with FactorizationProbe(model) as probe:
        for factor in (1.0, float("inf"), 1.0):
            model.zero_grad()
            (model(batch()[0]).square().mean() * factor).backward()
        assert all(abs(value) <= 1 for value in probe.rho().values())


def test_layers_without_a_gradient_are_left_out() -> None:
    model = perceptron()
    model[0].requires_grad_(False)
    with FactorizationProbe(model) as probe:
        assert probe.rho() == {}
        model(batch()[0]).square().mean().backward()
        assert list(probe.rho()) == ["2"]


def test_detached_probe_sees_nothing() -> None:
    model = perceptron()
    with FactorizationProbe(model) as probe:
        pass
    model(batch()[0]).square().mean().backward()
    assert probe.rho() == {}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, "beta=1.0 must lie in"),
        ({"loss_reduction": "max"}, "loss_reduction='max' is not known"),
        ({"backend": "numpy"}, "backend='numpy' is unknown"),
        ({"exclude": ("nothing",)}, "matches no parameter"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        FactorizationProbe(perceptron(), **settings)


def test_model_without_layers() -> None:
    with pytest.raises(ValueError, match="no layer that FactorizationProbe can tap"):
        FactorizationProbe(nn.LayerNorm(3))
