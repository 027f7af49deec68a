import pytest
import torch
from torch import nn

from neurms.core.unitwise.preconditioner import GradientPreconditioner
from neurms.core.unitwise.scale_summary import scale_summary


def observed(v: list[float], u: list[float] | None = None, **settings) -> GradientPreconditioner:
    """A preconditioner of one layer whose committed second moments are the given ones."""
    layer = nn.Linear(len(u) if u else 3, len(v))
    made = GradientPreconditioner(
        layer, bias_correction=False, eps=0.0, **{"variant": "U", **settings}
    )
    state = {"step": 1, "v": torch.tensor(v)}
    if u:
        state["u"] = torch.tensor(u)
    variant = made.settings["variant"]
    made.load_state_dict({"layers": {"weight": state}, "variant": variant, "skipped_steps": 0})
    return made


def test_nothing_before_the_first_commit():
    assert scale_summary(GradientPreconditioner(nn.Linear(3, 2), variant="U")) == {}


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
