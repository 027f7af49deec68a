"""The engine's numbers against float64 truth, and that nothing but numbers comes of it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms.callbacks.profiler import profile
from neurms.core.ground import spans
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from tests.callbacks.profiler import truth
from tests.core.unitwise.root_truth import inverse_root

BETA = 0.9
Make = Callable[[nn.Module], torch.optim.Optimizer]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 5,
    *,
    micro: int = 1,
    closing: Callable[[], None] = lambda: None,
    autocast: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for _ in range(micro):
            inputs = torch.randn(24, 12, generator=generator) * torch.linspace(0.2, 3, 12)
            targets = torch.randint(4, (24,), generator=generator)
            context = (
                torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
            )
            with context:
                loss = nn.functional.cross_entropy(model(inputs).float(), targets) / micro
            loss.backward()
        closing()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("micro", "autocast"), [(1, False), (3, False), (1, True)], ids=["eager", "micro", "bfloat16"]
)
@pytest.mark.parametrize("ours", [True, False], ids=["neurms", "adamw"])
def test_statistics_equal_float64_truth(ours: bool, micro: int, autocast: bool) -> None:
    model = truth.mlp()
    dumps = {name: truth.Dump(model[int(name)]) for name in ("0", "2", "4")}
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    if ours:
        optimizer = neurms.NeuRMS(model, variant="F", beta=BETA, momentum=0.9, s_max=30.0)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0, beta=BETA) as profiler:
        close = lambda: [dump.close() for dump in dumps.values()]  # noqa: E731
        train(model, optimizer, micro=micro, closing=close, autocast=autocast)
    for name, dump in dumps.items():
        window, values = dump.windows[-1], profiler.samples[-1]["layers"][name]
        v, u = truth.averaged(dump.windows, BETA)
        assert values["rho"] == pytest.approx(truth.rho(window["g"], v, u), abs=1e-5)
        batch = truth.rho(window["g"], *truth.moments(window))
        assert values["rho_batch"] == pytest.approx(batch, abs=1e-5)
        assert values["v"] == pytest.approx(truth.quantiles(v), rel=1e-5)
        assert values["u"] == pytest.approx(truth.quantiles(u), rel=1e-5)
        assert values["factorization_error"] == pytest.approx(truth.error(window), rel=1e-5)
        assert values["rows"] == len(window["d"])
        assert values["dead_units"] == (window["d"] == 0).all(0).sum()
        state = optimizer.state[model[int(name)].weight]
        momentum = state["momentum" if ours else "exp_avg"].double().numpy()
        assert values["dominance"][:3] == pytest.approx(truth.dominance(momentum), rel=1e-5)
        assert values["dominance_of"] == "momentum"
        if ours:
            s = inverse_root(v)
            assert values["clipped_units"] == (s >= 30.0).sum()


def test_gradient_margins_foretell_the_next_gradient() -> None:
    model = truth.mlp()
    dump, optimizer = truth.Dump(model[2]), torch.optim.SGD(model.parameters(), lr=0.01)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0, beta=BETA) as profiler:
        train(model, optimizer, 3, closing=dump.close)
    rows = columns = 0.0
    for step, window in enumerate(dump.windows):
        values = profiler.samples[step]["layers"]["2"]
        if step:
            expected = truth.rho(window["g"], rows, columns)
            assert values["rho_gradient"] == pytest.approx(expected, abs=1e-5)
        else:
            assert "rho_gradient" not in values
        squares = window["g"] ** 2
        rows = BETA * rows + (1 - BETA) * squares.mean(1)
        columns = BETA * columns + (1 - BETA) * squares.mean(0)


def test_averages_forget_by_steps_not_by_sights() -> None:
    model = truth.mlp()
    dump, optimizer = truth.Dump(model[0]), torch.optim.SGD(model.parameters(), lr=0.01)
    with profile(model, optimizer, every_n_steps=3, warmup_steps=1, beta=BETA) as profiler:
        train(model, optimizer, 5, closing=dump.close)
    assert [s["step"] for s in profiler.samples] == [1, 4]
    (v1, _), (v4, _) = truth.moments(dump.windows[1]), truth.moments(dump.windows[4])
    decay = BETA**3
    v = (decay * v1 + v4) / (decay + 1)
    assert profiler.samples[-1]["layers"]["0"]["v"] == pytest.approx(truth.quantiles(v), rel=1e-5)


def test_convolutions_agree_with_their_unfolded_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(54, 4))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda m, a, o: o.register_hook(seen.append) and None)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(10, 3, 6, 6)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        model(inputs).square().mean().backward()
        g = model[0].weight.grad.double().numpy().copy()
        optimizer.step()
    values = profiler.samples[0]["layers"]["0"]
    d = seen[0].double().movedim(1, -1).reshape(-1, 6).numpy()
    patches = nn.functional.unfold(inputs.double(), 3, padding=1, stride=2)
    h = patches.movedim(1, -1).reshape(-1, 27).numpy()
    v = len(d) * (d**2).sum(0)
    u = inputs.double().square().mean((0, 2, 3)).numpy()
    assert values["rows"] == len(d)
    assert values["rho"] == pytest.approx(truth.rho(g.reshape(6, 27), v, u.repeat(9)), abs=1e-5)
    joint = np.einsum("ri,rj->ij", d**2, h**2) / len(d)
    factored = np.outer((d**2).mean(0), u.repeat(9))
    expected = np.linalg.norm(joint - factored) / np.linalg.norm(joint)
    assert values["factorization_error"] == pytest.approx(expected, rel=1e-5)


MAKERS: dict[str, Make] = {
    "U": lambda m: neurms.NeuRMS(m, variant="U"),
    "F momentum": lambda m: neurms.NeuRMS(m, variant="F", momentum=0.9),
    "B": lambda m: neurms.NeuRMS(m, variant="B"),
    "backward": lambda m: neurms.NeuRMS(m, update="backward", variant="U"),
    "racs": lambda m: neurms.RACS(m, head="rule"),
    "rmnp": lambda m: neurms.RMNP(m),
    "alice": lambda m: neurms.Alice(m, rank=4, leading=2, interval=2),
    "galore": lambda m: neurms.GaLore(m, rank=3),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_weights_are_bit_identical_with_and_without(name: str) -> None:
    models = [truth.mlp(), truth.mlp()]
    optimizers = [MAKERS[name](model) for model in models]
    with profile(models[0], optimizers[0], every_n_steps=2, warmup_steps=1) as profiler:
        train(models[0], optimizers[0], 6)
    train(models[1], optimizers[1], 6)
    assert len(profiler.samples) == 3
    for watched, alone in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(watched, alone)
    for watched, alone in zip(models[0].parameters(), models[1].parameters(), strict=True):
        states = [o.state.get(p, {}) for o, p in zip(optimizers, (watched, alone), strict=True)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key]))


@pytest.mark.parametrize("name", MAKERS)
def test_every_optimizer_gives_times_bytes_and_rho(name: str) -> None:
    model = truth.mlp()
    optimizer = MAKERS[name](model)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=1) as profiler:
        train(model, optimizer, 5)
    report = profiler.report()
    assert [row.layer for row in report] == ["0", "2", "4"]
    for row in report:
        assert row.forward_us > 0
        assert row.backward_us > 0
        assert row.update_us > 0
        assert row.gemm_us is not None
        assert -1 <= (row.rho or math.nan) <= 1
        assert row.dominance is not None
        assert row.state_bytes == sum(
            value.numel() * value.element_size()
            for p in model[int(row.layer)].parameters()
            for value in optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor)
        )
        preconditioned = row.rule not in ("SGD", "AdamW", "fallback")
        assert (row.scale_us > 0) == preconditioned
        assert (row.predicted_overhead is not None) == (row.rule == "neurms")
        if row.predicted_state_bytes is not None:
            assert row.state_bytes == row.predicted_state_bytes


def test_backward_updates_show_the_rho_of_the_gradient_that_nobody_formed() -> None:
    rho = []
    for update in ("step", "backward"):
        model = truth.mlp()
        optimizer = neurms.NeuRMS(model, update=update, variant="U")  # type: ignore[arg-type]
        with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
            train(model, optimizer, 2)
        rho.append([row.rho for row in profiler.report()])
    assert rho[0] == pytest.approx(rho[1], abs=1e-5)


def test_low_rank_methods_tell_the_energy_that_they_keep() -> None:
    model = truth.mlp()
    optimizer = neurms.GaLore(model, rank=3, head="rule")
    seen: list[Tensor] = []
    with profile(model, optimizer, every_n_steps=1, warmup_steps=1) as profiler:
        train(model, optimizer, 2, closing=lambda: seen.append(model[0].weight.grad.clone()))
    g = seen[-1].double()
    basis = optimizer.state[model[0].weight]["basis"].double()
    # (16, 12): taller than wide, so that GaLore projects features.
    kept = (g @ basis).square().sum() / g.square().sum()
    found = profiler.samples[-1]["layers"]["0"]["subspace_energy"]
    assert found == pytest.approx(kept.item(), rel=1e-5)
    assert 0 < kept < 1


def test_limiter_hits_are_steps_in_which_the_norm_grew_by_gamma() -> None:
    model = truth.mlp()
    optimizer = neurms.RACS(model, head="rule")
    norms: list[float] = []
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        for step in range(8):
            factor = 30.0 if step % 3 == 2 else 1.0
            train(model, optimizer, 1, closing=lambda f=factor: model[0].weight.grad.mul_(f))
            norms.append(float(optimizer.state[model[0].weight]["phi"]))
    hits = [sample["layers"]["0"]["limiter_hit"] for sample in profiler.samples]
    assert hits[0] is None
    grown = [b / a for a, b in itertools.pairwise(norms)]
    assert hits[1:] == [factor > 1.01 * (1 - 1e-5) for factor in grown]
    assert len(set(hits[1:])) == 2, "the run must show both"


def test_no_hook_is_left_between_looks_or_afterwards() -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    profiler = profile(model, optimizer, every_n_steps=4, warmup_steps=2)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    counts = []
    with profiler:
        for _ in range(7):
            counts.append(hooks())
            train(model, optimizer, 1)
    # Steps 2 and 6 are due, and those before them are timed.
    assert [count > 0 for count in counts] == [False, True, True, False, False, True, True]
    assert hooks() == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert spans._observer is None


def test_an_exception_in_training_leaves_nothing_behind() -> None:
    model = truth.mlp()
    optimizer = neurms.NeuRMS(model, variant="U")
    before = [len(m._forward_hooks) for m in model.modules()]
    calls: list[None] = []

    def stumble() -> None:
        calls.append(None)
        if len(calls) == 2:
            model(torch.zeros(3, 5))

    with (
        pytest.raises(RuntimeError),
        profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler,
    ):
        train(model, optimizer, 2, closing=stumble)
    assert len(profiler.samples) == 1
    assert [len(m._forward_hooks) for m in model.modules()] == before
    assert spans._observer is None


def test_statistics_of_dropped_gradients_do_not_count() -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        (model(torch.ones(5, 12)).sum() * 1e9).backward()
        model.zero_grad()
        train(model, optimizer, 1)
    assert profiler.samples[0]["layers"]["0"]["rows"] == 24


def test_a_loss_scale_is_divided_out() -> None:
    levels = []
    for scale in (1.0, 1024.0):
        model = truth.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        settings: dict[str, Any] = {"every_n_steps": 1, "warmup_steps": 0}
        with profile(model, optimizer, loss_scale=lambda s=scale: s, **settings) as profiler:
            (model(torch.ones(5, 12)).square().mean() * scale).backward()
            optimizer.step()
        levels.append(profiler.samples[0]["layers"]["2"]["v"])
    assert levels[0] == pytest.approx(levels[1], rel=1e-6)


def test_closures_are_not_charged_to_the_update() -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(5, 12)).square().mean()
        loss.backward()
        for _ in range(200):
            torch.ones(200, 200) @ torch.ones(200, 200)
        return loss

    with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        for _ in range(3):
            assert isinstance(optimizer.step(closure), Tensor)
    sample = profiler.samples[-1]
    charged = sum(layer["update_us"] for layer in sample["layers"].values())
    assert charged / 1e3 < 0.5 * sample["step_ms"]
    assert sample["layers"]["0"]["rho"] is not None


def test_a_preconditioner_beside_a_foreign_optimizer_is_seen_before_it_scales() -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    preconditioner = GradientPreconditioner(model, variant="F", beta=BETA)
    dump = truth.Dump(model[0])

    def before_step() -> None:
        dump.close()
        preconditioner.precondition_(optimizer)

    settings: dict[str, Any] = {"every_n_steps": 1, "warmup_steps": 0, "beta": BETA}
    with profile(model, optimizer, preconditioner=preconditioner, **settings) as profiler:
        train(model, optimizer, 3, closing=before_step)
    values, row = profiler.samples[-1]["layers"]["0"], profiler.report()[0]
    expected = truth.rho(dump.windows[-1]["g"], *truth.averaged(dump.windows, BETA))
    assert values["rho"] == pytest.approx(expected, abs=1e-5)
    assert row.rule == "neurms + SGD"
    assert row.scale_us > 0
    preconditioner.detach()


def test_half_of_the_units_stand_for_all_in_a_large_layer() -> None:
    model = truth.mlp()
    dump, optimizer = truth.Dump(model[0]), torch.optim.SGD(model.parameters(), lr=0.01)
    limit = 8 * 12
    settings: dict[str, Any] = {"every_n_steps": 1, "warmup_steps": 0, "max_elements": limit}
    with profile(model, optimizer, layers=["0"], **settings) as profiler:
        train(model, optimizer, 1, closing=dump.close)
    window = dump.windows[0] | {"d": dump.windows[0]["d"][:, ::2]}
    values = profiler.samples[0]["layers"]["0"]
    assert values["factorization_error"] == pytest.approx(truth.error(window), rel=1e-5)


def test_spans_show_in_torch_profiler_traces() -> None:
    model = truth.mlp()
    optimizer = neurms.NeuRMS(model, variant="U")
    with (
        torch.profiler.profile() as trace,
        profile(model, optimizer, every_n_steps=1, warmup_steps=0),
    ):
        train(model, optimizer, 2)
    names = {event.key for event in trace.key_averages()}
    kinds = ("forward", "backward", "reduce", "scale", "update")
    assert {f"neurms::{kind}::2" for kind in kinds} <= names


def test_layers_embeddings_and_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 20)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            x, _ = self.attention(x, x, x)
            logits: Tensor = self.head(x)
            return logits

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randint(20, (4, 6))).square().mean().backward()
            optimizer.step()
    report = profiler.report()
    assert [row.layer for row in report] == ["embedding", "head"]
    assert report[0].rows == 24
    assert report.advice()[0].rule == "AdamW"
    assert report.samples_per_second is not None


def test_bad_settings_are_refused_before_training() -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layers='encoder' matches no layer; layers are: 0, 2, 4"):
        profile(model, optimizer, layers=["encoder"])
    with pytest.raises(TypeError, match="must be a sequence of patterns"):
        profile(model, optimizer, layers="0")
    with pytest.raises(ValueError, match="every_n_steps=0"):
        profile(model, optimizer, every_n_steps=0)
    with pytest.raises(ValueError, match=r"beta=1\.0"):
        profile(model, optimizer, beta=1.0)
    with pytest.raises(TypeError, match="must be a torch optimizer"):
        profile(model, [])
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        profile(model.parameters(), optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer to profile"):
        profile(nn.LayerNorm(3), optimizer)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_models_are_profiled_too() -> None:
    torch._dynamo.reset()
    model = truth.mlp()
    model.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    with profile(model, optimizer, every_n_steps=2, warmup_steps=1) as profiler:
        train(model, optimizer, 4)
    assert [s["step"] for s in profiler.samples] == [1, 3]
    assert all(row.rho is not None and row.backward_us > 0 for row in profiler.report())


def test_copies_of_a_model_under_observation_hold_no_profiler() -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        other = copy.deepcopy(model)
        restored = pickle.loads(pickle.dumps(model))
        for one in (other, restored):
            one(torch.ones(2, 12)).sum().backward()
        train(model, optimizer, 1)
    assert profiler.samples[0]["layers"]["0"]["rows"] == 24


@pytest.mark.gpu
def test_on_an_accelerator_times_come_from_events() -> None:
    device = torch.accelerator.current_accelerator()
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).to(device)
    optimizer = neurms.NeuRMS(model, variant="F")
    with profile(model, optimizer, every_n_steps=1, warmup_steps=2) as profiler:
        for _ in range(5):
            model(torch.randn(256, 512, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    report = profiler.report()
    assert report.device_peak_bytes
    assert all(row.forward_us > 0 and row.reduce_us > 0 for row in report)


def trained(steps: int, **settings: Any) -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with profile(model, optimizer, **settings):
        for _ in range(steps):
            model(torch.ones(2, 12)).sum().backward()
            optimizer.step()


def test_a_training_shorter_than_the_warmup_says_so() -> None:
    with pytest.warns(UserWarning, match=r"is empty: 5 steps.*warmup_steps=10.*set warmup_steps=0"):
        trained(5)
    with pytest.warns(UserWarning, match="10 steps were trained, and statistics were due after 10"):
        trained(10)
    trained(11)
    with pytest.warns(UserWarning, match="5 steps were trained, and statistics were due after 10"):
        trained(5, first_step=100, every_n_steps=50)


def test_a_profiler_of_an_optimizer_that_never_steps_says_so() -> None:
    with pytest.warns(UserWarning, match="no step of the optimizer was seen"):
        trained(0)


def test_an_error_is_not_followed_by_news_of_an_empty_profile() -> None:
    model = truth.mlp()
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        profile(model, torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"first_step": -1}, "first_step=-1"),
        ({"max_elements": 0}, "max_elements=0"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"loss_reduction": "max"}, "loss_reduction='max'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(0, **settings)
