"""One layer's statistics and factors, with an owner of a few lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms.core.optimizers.settings import NonFinite
from neurms.core.routing import route_model
from neurms.core.taps import HookTap, Sink, Sums, UpdateSink
from neurms.core.taps.products import Product
from neurms.core.unitwise.engine import Engine
from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.rule import LossReduction, UnitwiseRule, Variant
from neurms.core.unitwise.statistics import Factors
from neurms.core.unitwise.tapped import TappedLayer
from tests.core.unitwise.root_truth import inverse_root


class Owner:
    nonfinite: NonFinite = "raise"
    backend = "eager"

    def __init__(
        self, variant: Variant = "U", reduction: LossReduction = "mean", **settings: Any
    ) -> None:
        chosen = {**NeuRMS.default_settings(), "variant": variant, **settings}
        self.rule = UnitwiseRule.of(chosen)
        self.state: dict[str, Any] = {}
        self.written: list[Product] = []
        self.engine = Engine(
            self,
            loss_reduction=reduction,
            gemm="float32",
            loss_scale=lambda: 8.0,
            heads=None,
            backend="eager",
        )

    def rule_of(self, weight: Tensor) -> UnitwiseRule:
        return self.rule

    def seat_of(self, weight: Tensor) -> tuple[UnitwiseRule, dict[str, Any]]:
        return self.rule, self.state

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        return self.state

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        return self.state

    def write_in_backward(
        self,
        layer: TappedLayer,
        rule: UnitwiseRule,
        state: dict[str, Any],
        product: Product,
        factors: Factors,
    ) -> None:
        self.written.append(product)


def layer_of(owner: Owner, module: nn.Module | None = None, heads: int = 0) -> TappedLayer:
    module = nn.Linear(3, 4) if module is None else module
    route = next(r for r in route_model(module, "rule", head="rule") if not r.is_fallback)
    layer = TappedLayer(route, None, owner.engine, heads)
    owner.state = layer.new_state(route.parameter)
    return layer


def delivered(rows: int, factor: float = 1.0, features: bool = True) -> tuple[Sums, Tensor, Tensor]:
    d, h = factor * torch.randn(rows, 4), torch.randn(rows, 3)
    features_sum = h.square().sum(0) if features else None
    return Sums(d.square().sum(0), rows, features_sum, rows if features else 0), d, h


def test_it_is_a_sink_of_both_engines() -> None:
    owner = Owner()
    layer = layer_of(owner)
    assert isinstance(layer, Sink)
    assert isinstance(layer, UpdateSink)
    assert layer.loss_scale() == 8.0
    assert layer.name == "weight"
    assert not layer.updated_in_backward


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Linear(3, 4), (4, 3)),
        (nn.Conv2d(6, 4, 3, groups=2), (4, 6)),
        (nn.Conv1d(6, 6, 3, groups=6), (6, 6)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), (4, 6)),
    ],
)
def test_sizes_are_those_of_what_the_tap_delivers(
    module: nn.Module, sizes: tuple[int, int]
) -> None:
    for variant, features in (("U", 0), ("F", sizes[1])):
        owner = Owner(variant)  # type: ignore[arg-type]
        layer = layer_of(owner, module)
        assert layer.sizes == (sizes[0], features)
        assert owner.state["v"].shape == (sizes[0],)
        assert ("u" in owner.state) == (variant == "F")


def test_foreseen_is_what_commit_and_factors_give_and_changes_nothing() -> None:
    owner = Owner("F", beta=0.5)
    layer = layer_of(owner)
    for _ in range(3):
        sums, _, _ = delivered(5)
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in owner.state.items()}
        s, c = layer.foreseen(sums)
        assert before["step"] == owner.state["step"]
        assert torch.equal(before["v"], owner.state["v"])
        layer.add(sums)
        layer.engine.commit([layer])
        committed_s, committed_c = layer.factors()
        assert torch.equal(s, committed_s)
        assert torch.equal(c, committed_c)
        assert layer.pending.rows == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("correction", [True, False])
def test_factors_are_the_formula(reduction: LossReduction, correction: bool) -> None:
    owner = Owner("F", reduction, beta=0.9, bias_correction=correction, s_max=2.0, c_min=0.9)
    layer = layer_of(owner)
    v, u = torch.zeros(4), torch.zeros(3)
    for number in range(1, 4):
        sums, d, h = delivered(6)
        layer.add(sums)
        layer.engine.commit([layer])
        per_row = d * (6 if reduction == "mean" else 1)
        v = 0.9 * v + 0.1 * per_row.square().mean(0)
        u = 0.9 * u + 0.1 * h.square().mean(0)
        divisor = 1 - 0.9**number if correction else 1.0
        s, c = layer.factors()
        torch.testing.assert_close(s, inverse_root(v / divisor).clip(0, 2))
        torch.testing.assert_close(c, inverse_root(u / divisor).clip(0.9, 100))
    assert owner.state["step"] == 3


def test_heads_pool_the_second_moment_of_their_units() -> None:
    owner = Owner()
    layer = layer_of(owner, heads=2)
    sums, d, _ = delivered(6, features=False)
    layer.add(sums)
    layer.engine.commit([layer])
    pooled = (6 * d).square().mean(0).reshape(2, 2).mean(1)
    s, c = layer.factors()
    assert owner.state["v"].shape == (2,)
    torch.testing.assert_close(s, inverse_root(pooled).repeat_interleave(2))
    assert c is None


class TestRescale:
    def test_only_b_rescales(self) -> None:
        sums, _, _ = delivered(4, features=False)
        for variant in ("U", "F"):
            owner = Owner(variant)  # type: ignore[arg-type]
            assert layer_of(owner).rescale(sums) is None

    def test_by_what_has_been_seen_so_far(self) -> None:
        owner = Owner("B", beta=0.0)
        layer = layer_of(owner)
        parts = [delivered(3, features=False), delivered(5, features=False)]
        seen: list[Tensor] = []
        for sums, d, _ in parts:
            seen.append(d)
            rows = torch.cat(seen)
            factors = layer.rescale(sums)
            expected = inverse_root((len(rows) * rows).square().mean(0))
            torch.testing.assert_close(factors, expected)
            layer.add(sums)
        layer.engine.commit([layer])
        torch.testing.assert_close(layer.factors()[0], expected)

    def test_errors_keep_their_dtype(self) -> None:
        owner = Owner("B")
        layer = layer_of(owner)
        _, d, h = delivered(4, features=False)
        errors = layer.rescale_errors(d.bfloat16())
        assert errors.dtype == torch.bfloat16
        layer.update(errors, h.bfloat16())
        (product,) = owner.written
        assert torch.equal(product.errors, errors)
        # The statistics are those of D as it arrived.
        torch.testing.assert_close(layer.pending.units, d.bfloat16().float().square().sum(0))


def test_update_observes_features_only_where_they_are_needed() -> None:
    for variant in ("U", "F"):
        owner = Owner(variant)  # type: ignore[arg-type]
        layer = layer_of(owner)
        _, d, h = delivered(4)
        layer.update(d, h)
        assert len(owner.written) == 1
        assert layer.pending.rows == 4
        if variant == "U":
            assert layer.pending.features is None
        else:
            torch.testing.assert_close(layer.pending.features, h.square().sum(0))
            assert layer.pending.feature_rows == 4


class TestFollowingTheGradient:
    """Sums that are pending go when their gradient is dropped, and stay while it is kept."""

    def tapped(self, variant: Variant = "U") -> tuple[nn.Linear, TappedLayer, Owner]:
        owner, module = Owner(variant), nn.Linear(3, 4)
        layer = layer_of(owner, module)
        layer.tap = HookTap(module, module.weight, layer)
        layer.tap.attach()
        return module, layer, owner

    def backward(self, module: nn.Linear) -> None:
        module(torch.randn(2, 3)).square().sum().backward()

    def test_kept(self) -> None:
        module, layer, _owner = self.tapped()
        for count in range(1, 5):
            self.backward(module)
            assert layer.pending.rows == 2 * count
            if count == 3:
                module.weight.grad.mul_(0.5)

    def test_ordinary_accumulation_reads_no_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # An accelerator would have to wait for each such look.
        module, layer, _owner = self.tapped()
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "any", lambda self: pytest.fail("read"))
            for _ in range(4):
                self.backward(module)
        assert layer.pending.rows == 8

    @pytest.mark.parametrize("variant", ["U", "B"])
    @pytest.mark.parametrize("backwards", [1, 2, 3])
    @pytest.mark.parametrize("to_none", [True, False])
    def test_dropped(self, to_none: bool, backwards: int, variant: Variant) -> None:
        module, layer, _owner = self.tapped(variant)
        for _ in range(3):
            for _ in range(backwards):
                self.backward(module)
            assert layer.pending.rows == 2 * backwards
            module.zero_grad(set_to_none=to_none)
        self.backward(module)
        assert layer.pending.rows == 2

    def test_an_infinite_past_does_not_reach_b(self) -> None:
        module, layer, _owner = self.tapped("B")
        (module(torch.randn(2, 3)).sum() * float("inf")).backward()
        module.zero_grad()
        self.backward(module)
        assert module.weight.grad.isfinite().all()
        assert layer.pending.is_finite()


def test_the_owner_is_held_weakly() -> None:
    owner = Owner()
    layer = layer_of(owner)
    del owner
    with pytest.raises(ReferenceError, match=r"optimizer of layer 'weight' no longer exists"):
        layer.loss_scale()
