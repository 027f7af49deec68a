"""Variant P at the step: the formulas in float64, and what must leave it unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms import NeuRMS
from neurms.core.ground.errors import NonFiniteError
from tests.core.unitwise.gradient_truth import Truth
from tests.core.unitwise.neurms_models import cnn, images, mlp, signal, transposed, vectors, wide

STEPS = 25


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.values = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, bias=False, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        z, _ = self.values(x, x[..., :4], x[..., 4:], need_weights=False)
        return self.head(y + z).mean(1)


def tokens(rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 5, 8, generator=generator)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def rows(sizes: int = 8) -> tuple[Tensor, Tensor]:
    x, y = images(sizes)
    return x.flatten(2), y


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, vectors),
    "wide": (wide, vectors),
    "cnn": (cnn, images),
    "transposed": (transposed, images),
    "signal": (signal, rows),
    "attention": (Attention, tokens),
}
AVERAGE: dict[str, Any] = {"momentum": 0.8, "nesterov": True, "moments": "average"}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"momentum": 0.6, "weight_decay": 0.1, "kappa": 1.5, "beta": 0.8},
    "average clipped": {
        **{"momentum": 0.6, "moments": "average", "beta": 0.0},
        **{"damping": 0.2, "kappa": 1.2, "lr": 0.002},
    },
    "nesterov": {"momentum": 0.6, "nesterov": True},
    "damped": {"damping": 0.7},
    "average": {"momentum": 0.6, "moments": "average", "beta": 0.5, "damping": 0.0},
    # Slowly: "wide" would learn its few examples until gradients vanish, but for rounding.
    "both": {**AVERAGE, "beta": 0.0, "weight_decay": 0.1, "damping": 0.3, "lr": 0.002},
}


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    model.zero_grad()
    x, y = batch
    (nn.functional.cross_entropy(model(x.double()), y) * scale).backward()


def trained(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 5, **how: Any) -> Any:
    scale = how.pop("scale", 1.0)
    optimizer = NeuRMS(model, variant="P", **how)
    for _ in range(steps):
        backward(model, batch, scale)
        optimizer.step()
    return optimizer


def assert_equal(a: nn.Module, b: nn.Module, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_formulas(case: str, how: str) -> None:
    make, batch = CASES[case]
    settings = {"lr": 0.02, **SETTINGS[how]}
    model = make().double()
    truth = Truth(model, **settings)
    optimizer = NeuRMS(model, variant="P", **settings)
    assert not [row for row in optimizer.plan() if row.rule != "neurms" and "bias" not in row.name]
    start = copy.deepcopy(model)
    for _ in range(STEPS):
        backward(truth.model, batch())
        # The same gradients: how a sum is rounded depends on where memory begins, and training
        # makes a thousand times as much of that.
        for p, q in zip(model.parameters(), truth.model.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        _leave(optimizer)
        optimizer.step()
        truth.step()
    assert_equal(model, truth.model)
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters())]  # noqa: B905
    assert all(moved)


def _leave(optimizer: NeuRMS) -> None:
    """See that nothing is left to the fallback, of which the formulas know nothing."""
    assert not [route.name for route in optimizer.routes.values() if route.is_fallback]


@pytest.mark.parametrize("how", [{"momentum": 0.5}, {**AVERAGE, "beta": 0.0, "damping": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_near_float64(dtype: torch.dtype, how: dict[str, Any]) -> None:
    model = wide().to(dtype)
    truth = Truth(model, **how)
    optimizer = NeuRMS(model, variant="P", low_precision="master", **how)
    for _ in range(5):
        backward(truth.model, vectors())
        for p, q in zip(model.parameters(), truth.model.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.to(dtype)
            q.grad = p.grad.double()
        optimizer.step()
        truth.step()
    for p, q in zip(model.parameters(), truth.model.parameters(), strict=True):
        master = optimizer.state[p].get("master", p)
        torch.testing.assert_close(master.double(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"momentum": 0.5}, AVERAGE])
def test_the_gradients_scale_has_no_part(how: dict[str, Any]) -> None:
    one, other = mlp().double(), mlp().double()
    trained(one, vectors(), **how)
    trained(other, vectors(), **how, scale=1e-30)
    assert_equal(one, other)


def test_an_average_needs_no_second_one_and_is_damped() -> None:
    one, other = mlp().double(), mlp().double()
    trained(one, vectors(), **AVERAGE)
    trained(other, vectors(), **AVERAGE, beta=0.0, damping=0.1)
    assert_equal(one, other, 0.0, 0.0)


@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_a_damped_step_by_an_average_has_a_bound(damping: float) -> None:
    """Energy that moves to where there was little makes P's other steps many times as long."""
    linear = nn.Linear(40, 30, bias=False).double()
    optimizer = NeuRMS(linear, lr=1.0, momentum=0.8, moments="average", damping=damping)
    for step in range(12):
        torch.manual_seed(step)
        gradient = torch.zeros(30, 40, dtype=torch.float64)
        gradient[step % 30, step % 40] = 10.0 ** (3 * step)
        linear.weight.grad = gradient + 1e-3 * torch.randn_like(gradient)
        before = linear.weight.detach().clone()
        optimizer.step()
        rows = (linear.weight.detach() - before).square().mean(1)
        assert float(rows.max()) <= (1 + damping) / damping * (1 + 1e-9)


def test_of_a_first_gradient_all_averages_are_alike() -> None:
    """An average of one gradient is that gradient but for its length, which has no part."""
    models = [mlp().double() for _ in range(4)]
    alike: dict[str, Any] = {"kappa": 1e9, "damping": 0.0}
    for model, how in zip(
        models, ({}, {"momentum": 0.5, "moments": "average"}, AVERAGE, {"beta": 0.0}), strict=True
    ):
        trained(model, vectors(), steps=1, **how, **alike)
    for model in models[1:]:
        assert_equal(models[0], model)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"nesterov": True}, ValueError, r"nesterov=True needs an average.* set a momentum"),
        ({"moments": "average"}, ValueError, r"moments='average' needs an average"),
        ({"moments": "averages"}, ValueError, r"moments='averages' is not known.*'average'"),
        ({"damping": -1.0}, ValueError, r"damping=-1.0 must be finite and at least 0"),
        ({"damping": 1.0, "variant": "F"}, ValueError, r"damping=1.0 has a part in variant=\"P\""),
        ({"nesterov": 1, "momentum": 0.5}, TypeError, r"nesterov=1 must be True or False"),
        (
            {**AVERAGE, "variant": "U"},
            ValueError,
            r"nesterov=True has a part in variant=\"P\" alone",
        ),
        ({**AVERAGE, "update": "backward"}, ValueError, r"nesterov=True cannot go with update"),
        (
            {"momentum": 0.5, "moments": "average", "update": "backward"},
            ValueError,
            r"moments='average' cannot go with update=\"backward\"",
        ),
    ],
)
def test_averages_that_cannot_be_had_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NeuRMS(mlp(), **settings)


def test_a_group_that_gives_its_average_up_is_refused_at_the_step() -> None:
    model = mlp().double()
    optimizer = trained(model, vectors(), **AVERAGE)
    start, backwards = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["momentum"] = 0.0
    backward(model, vectors())
    with pytest.raises(ValueError, match="needs an average of gradients"):
        optimizer.step()
    assert_equal(model, start, 0.0, 0.0)
    for key, state in optimizer.state_dict()["state"].items():
        assert state["step"] == backwards["state"][key]["step"]


def test_a_checkpoint_of_before_there_were_averages_is_taken() -> None:
    model = mlp().double()
    optimizer = trained(model, vectors(), momentum=0.5)
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    for group in saved["param_groups"]:
        for name in ("nesterov", "moments", "damping"):
            del group[name]
    other = NeuRMS(twin, momentum=0.5)
    other.load_state_dict(saved)
    for own, by in ((model, optimizer), (twin, other)):
        backward(own, vectors())
        by.step()
    assert_equal(model, twin, 0.0, 0.0)


@pytest.mark.parametrize("damping", [None, 0.5])
def test_averages_resume_bit_for_bit(damping: float | None) -> None:
    model = mlp().double()
    optimizer = trained(model, vectors(), damping=damping, **AVERAGE)
    twin = copy.deepcopy(model)
    other = NeuRMS(twin, damping=damping, **AVERAGE)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state_bytes() == optimizer.state_bytes() == optimizer.plan().state_bytes
    for own, by in ((model, optimizer), (twin, other)):
        for _ in range(3):
            backward(own, vectors())
            by.step()
    assert_equal(model, twin, 0.0, 0.0)


def test_a_layer_shares_what_its_moments_are_of() -> None:
    model = mlp()
    bias = next(module.bias for module in model.modules() if isinstance(module, nn.Linear))
    with pytest.raises(ValueError, match=r"moments='gradient' in the group of .* cannot both hold"):
        NeuRMS(model, **AVERAGE, groups=[{"params": [bias], "moments": "gradient"}])


def test_units_and_features_may_be_permuted() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(4, 6, dtype=torch.float64) for _ in range(5)]
    rows, columns = torch.randperm(4), torch.randperm(6)
    start = torch.randn(4, 6, dtype=torch.float64)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start[rows][:, columns].clone())
    optimizers = [NeuRMS([p], variant="P", kappa=1.3) for p in (one, other)]
    for gradient in gradients:
        one.grad, other.grad = gradient, gradient[rows][:, columns]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(one[rows][:, columns], other, rtol=1e-13, atol=0)


def test_zero_rows_and_columns_stay() -> None:
    weight = nn.Parameter(torch.ones(4, 5))
    optimizer = NeuRMS([weight], variant="P", lr=0.1)
    gradient = torch.randn(4, 5)
    gradient[1] = 0.0
    gradient[:, 2] = 0.0
    for _ in range(3):
        weight.grad = gradient
        optimizer.step()
    assert (weight[1] == 1).all()
    assert (weight[:, 2] == 1).all()
    assert torch.isfinite(weight).all()
    other = torch.ones(4, 5, dtype=torch.bool)
    other[1] = other[:, 2] = False
    assert (weight[other] != 1).all()
    weight.grad = torch.zeros(4, 5)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)


def test_parts_of_a_batch_are_the_batch() -> None:
    whole, parts = mlp().double(), mlp().double()
    optimizers = [NeuRMS(m, variant="P", momentum=0.3) for m in (whole, parts)]
    x, y = vectors()
    for _ in range(5):
        backward(whole, (x, y))
        parts.zero_grad()
        for own_x, own_y in zip(x.chunk(4), y.chunk(4), strict=True):
            (nn.functional.cross_entropy(parts(own_x.double()), own_y) / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(whole, parts, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_resumes_bit_for_bit(momentum: float) -> None:
    model = cnn().double()
    optimizer = trained(model, images(), 3, momentum=momentum)
    twin = copy.deepcopy(model)
    other = NeuRMS(twin, variant="P", momentum=momentum)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, opt in ((model, optimizer), (twin, other)):
        for _ in range(3):
            backward(own, images())
            opt.step()
    assert_equal(model, twin, 0, 0)


def test_copies_and_pickles_go_on_alike() -> None:
    model = mlp().double()
    optimizer = trained(model, vectors(), 2)
    twin, other = copy.deepcopy((model, optimizer))
    for own, opt in ((model, optimizer), (twin, other)):
        backward(own, vectors())
        opt.step()
    assert_equal(model, twin, 0, 0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_is_what_the_plan_says(momentum: float) -> None:
    model = cnn().double()
    optimizer = trained(model, images(), 1, momentum=momentum)
    assert optimizer.state_bytes() == optimizer.plan().state_bytes
    sizes = sum(
        p.shape[0] + p[0].numel() + (p.dim() > 1) for p in model.parameters() if p.dim() > 1
    )
    numbers = sum(p.numel() for p in model.parameters()) if momentum else 0
    without_bias = 1
    assert optimizer.state_bytes() == 8 * (sizes - without_bias + numbers)


def test_a_bias_without_gradient_counts_as_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model[0].bias.requires_grad_(False)
    bare = nn.Parameter(model[0].weight.detach().clone())
    optimizer, other = NeuRMS(model, variant="P"), NeuRMS([bare], variant="P")
    model[0].weight.grad = torch.randn(2, 3).double()
    bare.grad = model[0].weight.grad.clone()
    optimizer.step()
    other.step()
    torch.testing.assert_close(bare, model[0].weight, rtol=1e-14, atol=0)


def test_a_weight_without_gradient_counts_as_zero() -> None:
    model = nn.Linear(3, 2).double()
    optimizer = NeuRMS(model, variant="P", lr=0.1)
    before = copy.deepcopy(model)
    model.bias.grad = torch.tensor([3.0, -4.0]).double()
    optimizer.step()
    assert torch.equal(model.weight, before.weight)
    # T = 25, q = g^2, s = 25: each moves by its sign.
    torch.testing.assert_close(before.bias - model.bias, torch.tensor([0.1, -0.1]).double())


def test_momentum_may_be_switched_on() -> None:
    model = mlp().double()
    optimizer = trained(model, vectors(), 2)
    optimizer.param_groups[0]["momentum"] = 0.5
    backward(model, vectors())
    optimizer.step()
    assert all("momentum" in state for state in optimizer.state.values())
    other = NeuRMS(mlp().double(), variant="P")
    other.load_state_dict(optimizer.state_dict())


def test_groups_have_rates_and_widths_of_their_own() -> None:
    a, b, c = (nn.Parameter(torch.ones(3, 4).double()) for _ in range(3))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "kappa": 1.0}, {"params": [c]}]
    optimizer = NeuRMS(groups, variant="P", lr=0.2)
    gradient = torch.randn(3, 4).double()
    for p in (a, b, c):
        p.grad = gradient
    optimizer.step()
    torch.testing.assert_close(2 * (1 - a), 1 - c)
    # With a width of 1 all factors of a side are its median: a multiple of G.
    ratio = (1 - b) / gradient
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()))


class TestRefusals:
    def test_settings_of_other_variants(self) -> None:
        for name, value in {
            "agc": 0.1,
            "s_max": 3.0,
            "clip": "relative",
            "normalize": "rms",
        }.items():
            with pytest.raises(ValueError, match=f'{name}=.* has no part in variant="P"'):
                NeuRMS(mlp(), variant="P", **{name: value})
        with pytest.raises(ValueError, match="heads="):
            NeuRMS(mlp(), variant="P", heads={"0.weight": 1})

    def test_groups_of_another_variant(self) -> None:
        with pytest.raises(ValueError, match="use two optimizers"):
            NeuRMS([{"params": [torch.ones(2, 2)], "variant": "U"}], variant="P")

    def test_a_variant_that_changes(self) -> None:
        model = mlp().double()
        optimizer = trained(model, vectors(), 1)
        optimizer.param_groups[0]["variant"] = "F"
        with pytest.raises(ValueError, match="build it with the other one"):
            optimizer.step()

    def test_bad_gradients_change_nothing(self) -> None:
        model = mlp().double()
        optimizer = trained(model, vectors(), 1)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        assert model[2].weight.grad is not None
        model[2].weight.grad[0, 0] = float("inf")
        with pytest.raises(NonFiniteError, match=r"2\.weight"):
            optimizer.step()
        after = model.state_dict(), optimizer.state_dict()["state"]
        torch.testing.assert_close(before, after, rtol=0, atol=0)

    def test_plain_parameters_of_other_variants(self) -> None:
        with pytest.raises(TypeError, match=r"must be an nn\.Module"):
            NeuRMS([torch.ones(2, 2)], variant="U")


@pytest.mark.slow
def test_a_compiled_model_stays_whole_over_schedules_and_evaluations() -> None:
    model = mlp().double()
    compiles: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiles.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = NeuRMS(compiled, variant="P", lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    plain = mlp().double()
    for step in range(200):
        backward(compiled, vectors())
        optimizer.step()
        schedule.step()
        if step == 50:
            with torch.no_grad():
                compiled(vectors()[0].double())
    # One graph with gradients and one without.
    assert len(compiles) == 2
    other = NeuRMS(plain, variant="P", lr=0.05)
    again = torch.optim.lr_scheduler.CosineAnnealingLR(other, 200)
    for _ in range(200):
        backward(plain, vectors())
        other.step()
        again.step()
    assert_equal(plain, model)
