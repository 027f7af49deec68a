import math

import pytest
import torch
from torch import Tensor, nn

from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from neurms.core.unitwise.scale_summary import scale_summary


def observed(v: list[float], u: list[float] | None = None, **settings) -> GradientPreconditioner:
    """A preconditioner of one layer whose committed second moments are the given ones."""
    layer = nn.Linear(len(u) if u else 3, len(v))
    made = GradientPreconditioner(layer, bias_correction=False, eps=0.0, **settings)
    state = {"step": 1, "v": torch.tensor(v)}
    if u:
        state["u"] = torch.tensor(u)
    variant = made.settings["variant"]
    made.load_state_dict({"layers": {"weight": state}, "variant": variant, "skipped_steps": 0})
    return made


def test_nothing_before_the_first_commit():
    assert scale_summary(GradientPreconditioner(nn.Linear(3, 2))) == {}


def test_unit_factors_and_those_at_either_bound():
    summary = scale_summary(observed([4.0, 1.0, 1e-6, 100.0], s_min=0.2, s_max=10.0))
    assert summary["scale_median"] == pytest.approx(0.5)
    assert summary["clipped_fraction"] == 0.5
    assert summary.keys() == {"scale_median", "clipped_fraction"}


def test_features_count_in_variant_f():
    summary = scale_summary(observed([1.0, 1.0], [0.25, 4.0, 4.0, 1e-9], variant="F", c_max=50.0))
    assert summary["feature_scale_median"] == pytest.approx(0.5)
    assert summary["clipped_fraction"] == pytest.approx(1 / 6)


def test_relative_bounds_follow_the_median():
    summary = scale_summary(observed([1.0, 1.0, 1.0, 1e6, 1e-6], clip="relative", kappa=10.0))
    assert summary["clipped_fraction"] == pytest.approx(0.4)


# -------------------------------------------------------------------- variant P


def gradients(steps: int = 3, units: int = 6, features: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Gradients of a weight and a bias, one row and one column far from the others."""
    made = []
    for _ in range(steps):
        weight = torch.randn(units, features)
        weight[0] *= 1e3
        weight[:, 1] *= 1e-3
        made.append((weight, torch.randn(units)))
    return made


def true_factors(
    seen: list[tuple[Tensor, Tensor]], beta: float, kappa: float
) -> tuple[list[float], list[float], int]:
    """Variant P's factors in float64, straight from its formula, and how many are clipped."""
    units, features = seen[0][0].shape
    q, s = torch.zeros(units).double(), torch.zeros(features + 1).double()
    for weight, bias in seen:
        squares = torch.cat([weight, bias[:, None]], 1).double().square()
        q = beta * q + (1 - beta) * squares.sum(1)
        s = beta * s + (1 - beta) * squares.sum(0)
    correction = 1 - beta ** len(seen)
    total = float(q.sum() + s.sum()) / 2 / correction
    clipped, sides = 0, []
    for moments, scale in ((q / correction, math.sqrt(total)), (s / correction, 1.0)):
        inverse = moments.rsqrt().tolist()
        # A lower median: of an even number, the smaller of the two in the middle.
        median = sorted(inverse)[(len(inverse) - 1) // 2]
        clipped += sum(not median / kappa < x < median * kappa for x in inverse)
        sides.append([scale * min(max(x, median / kappa), median * kappa) for x in inverse])
    return sides[0], sides[1], clipped


def lower_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


@pytest.mark.parametrize("owner", ["optimizer", "preconditioner"])
def test_variant_p_equals_float64_truth(owner: str) -> None:
    layer, seen, kappa = nn.Linear(4, 6), gradients(), 4.0
    settings = {"variant": "P", "beta": 0.8, "kappa": kappa}
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    made = (
        NeuRMS(layer, lr=0.1, **settings)
        if owner == "optimizer"
        else GradientPreconditioner(layer, **settings)
    )
    assert scale_summary(made.moment_layers()) == {}
    for weight, bias in seen:
        layer.weight.grad, layer.bias.grad = weight.clone(), bias.clone()
        if isinstance(made, NeuRMS):
            made.step()
        else:
            made.precondition_(sgd)
    units, features, clipped = true_factors(seen, 0.8, kappa)
    summary = scale_summary(made.moment_layers())
    assert clipped >= 2
    assert summary["clipped_fraction"] == pytest.approx(clipped / 11)
    assert summary["scale_median"] == pytest.approx(lower_median(units), rel=1e-5)
    assert summary["feature_scale_median"] == pytest.approx(lower_median(features), rel=1e-5)


def test_dead_rows_of_variant_p_are_not_clipped() -> None:
    layer = nn.Linear(4, 3, bias=False)
    optimizer = NeuRMS(layer, variant="P")
    layer.weight.grad = torch.ones(3, 4)
    layer.weight.grad[1] = 0.0
    optimizer.step()
    assert scale_summary(optimizer.moment_layers())["clipped_fraction"] == 0


def test_other_variants_have_no_layers_of_moments() -> None:
    layer = nn.Linear(4, 3)
    assert list(NeuRMS(layer, variant="F").moment_layers()) == []
    assert list(GradientPreconditioner(nn.Linear(4, 3)).moment_layers()) == []
