"""The generic cases, by the names that torch's own tests give them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from tools.peers.torch_problems import PROBLEMS
from tools.peers.torch_subject import CASES, Subject, case, same

__all__ = ["CASES", "PROBLEMS", "Subject"]


def _error_case(position: int) -> None:
    def run(subject: Subject) -> None:
        error = get_error_inputs_for_all_optims("cpu", torch.float32)[position]
        given = error.optimizer_error_input
        params = subject.model().parameters() if given.params is None else given.params
        if subject.reads_modules and given.params is None:
            params = subject.model()
        assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        kinds = (error.error_type, ValueError)
        try:
            subject.info.optim_cls(params, **given.kwargs)
        except kinds:
            return
        raise AssertionError(f"{error.error_type.__name__} not raised: {given.desc}")

    run.__name__ = f"test_errors_{position}"
    case(once=True)(run)


for _position in range(len(get_error_inputs_for_all_optims("cpu", torch.float32))):
    _error_case(_position)


@case(once=True)
def test_global_cliquey_flags(subject: Subject) -> None:
    """Each of torch's flags serves, or is refused before anything is made."""
    for given in _get_optim_inputs_including_global_cliquey_kwargs("cpu", None, subject.info):
        model = subject.model()
        optimizer = subject.optimizer(model, **given.kwargs)
        subject.train(model, optimizer, 1)


@case()
def test_forloop_goes_right_direction(subject: Subject) -> None:
    schedules = subject.info.scheduler_inputs if subject.description == "default" else ()
    for makers in ((), *schedules):
        first, last = _ends_of_a_loop(subject, makers)
        good = last > first if subject.settings.get("maximize") else last < first
        assert good, f"{first} became {last}"


def _ends_of_a_loop(
    subject: Subject, makers: Sequence[Callable[[Any], Any]]
) -> tuple[float, float]:
    """Return the loss before and after twenty steps under schedules."""
    model = subject.model()
    optimizer = subject.optimizer(model)
    schedulers = [make(optimizer) for make in makers]
    first = float(subject.loss(model, optimizer).detach())
    for _ in range(20):
        loss = subject.loss(model, optimizer).detach()
        optimizer.step()
        for scheduler in schedulers:
            on_loss = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([loss] if on_loss else []))
    return first, float(subject.loss(model, optimizer).detach())


@case()
def test_tensor_lr(subject: Subject) -> None:
    rate = float(subject.settings.get("lr", 0.01))
    plain, _ = subject.trained(lr=rate)
    held, optimizer = subject.trained(lr=torch.tensor(rate, dtype=torch.float64))
    same(plain, held)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


@case()
def test_param_groups_lr(subject: Subject) -> None:
    if subject.reads_modules:
        model = subject.model()
        optimizer = subject.optimizer(model)
        optimizer.param_groups[0]["lr"] = 0.0
    else:
        model = subject.model()
        groups = [{"params": [p], "lr": 0.0} for p in model.parameters()]
        optimizer = subject.info.optim_cls(groups, **subject.settings)
    before = deepcopy(model)
    subject.train(model, optimizer, 3)
    same(model, before)


@case()
def test_maximize_is_minimize_of_the_negative(subject: Subject) -> None:
    if subject.settings.get("maximize"):
        return
    plain, _ = subject.trained(steps=0)
    other, _ = subject.trained(steps=0)
    for model, sign in ((plain, 1.0), (other, -1.0)):
        optimizer = subject.optimizer(model, maximize=sign < 0)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            (sign * model(torch.randn(4, 5, generator=generator)).square().mean()).backward()
            optimizer.step()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@case()
def test_step_is_noop_when_params_have_no_grad(subject: Subject) -> None:
    model, optimizer = subject.trained(steps=0)
    before = deepcopy(model)
    optimizer.step()
    same(model, before)


@case()
def test_step_is_noop_for_empty_grads(subject: Subject) -> None:
    if subject.reads_modules:
        return
    parameter = nn.Parameter(torch.randn(0, 3))
    optimizer = subject.info.optim_cls([parameter], **subject.settings)
    parameter.grad = torch.rand_like(parameter)
    optimizer.step()


@case()
def test_step_is_noop_for_zero_grads(subject: Subject) -> None:
    if subject.settings.get("weight_decay"):
        return
    model, optimizer = subject.trained(steps=0)
    before = deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    same(model, before)


@case()
def test_optimizer_can_be_printed(subject: Subject) -> None:
    _, optimizer = subject.trained()
    assert type(optimizer).__name__ in repr(optimizer)


@case()
def test_state_dict_deterministic(subject: Subject) -> None:
    model, optimizer = subject.trained()
    twin = subject.model()
    twin.load_state_dict(model.state_dict())
    other = subject.optimizer(twin)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for step in range(3, 8):
        subject.train(model, optimizer, 1, step)
        subject.train(twin, other, 1, step)
    same(model, twin)
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


@case()
def test_can_load_older_state_dict(subject: Subject) -> None:
    _, optimizer = subject.trained()
    saved = deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in subject.info.not_og_supported_flags:
            group.pop(flag, None)
    subject.optimizer(subject.model()).load_state_dict(saved)


@case()
def test_save_load_equality_with_weights_only(subject: Subject) -> None:
    model, optimizer = subject.trained()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin = deepcopy(model)
    other = subject.optimizer(twin)
    other.load_state_dict(loaded)
    subject.train(model, optimizer, 2, 3)
    subject.train(twin, other, 2, 3)
    same(model, twin)


@case()
def test_deepcopy_copies_all_public_attrs(subject: Subject) -> None:
    _, optimizer = subject.trained()
    copied = deepcopy(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(copied) if not name.startswith("_")}


@case()
def test_pickle(subject: Subject) -> None:
    _, optimizer = subject.trained()
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@case()
def test_non_empty_state(subject: Subject) -> None:
    _, optimizer = subject.trained()
    assert all(optimizer.state.values())
    assert len(optimizer.state) == 4


@case()
def test_step_hooks(subject: Subject) -> None:
    model, optimizer = subject.trained(steps=0)
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        subject.train(model, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"], seen
    subject.train(model, optimizer, 1)
    assert len(seen) == 4


@case()
def test_state_dict_hooks(subject: Subject) -> None:
    _, optimizer = subject.trained()
    seen: list[str] = []

    def unwrap(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("unwrap")
        inner: dict[str, Any] = state_dict["inner"]
        return inner

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {"inner": saved})
    saved = optimizer.state_dict()
    assert set(saved) == {"inner"}
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("second"))
    optimizer.register_load_state_dict_pre_hook(unwrap, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(saved)
    assert seen == ["before", "unwrap", "second", "after"], seen


@case()
def test_grad_scaling_autocast(subject: Subject) -> None:
    model = subject.model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    more = {"loss_scale": scaler.get_scale} if subject.reads_errors else {}
    optimizer = subject.optimizer(model, **more)
    twin, plain = subject.trained(steps=0)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 5, generator=generator)
        optimizer.zero_grad()
        scaler.scale(model(inputs).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        subject.train(twin, plain, 1, step)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@case(once=True)
def test_sparse_gradients_are_refused(subject: Subject) -> None:
    model, optimizer = subject.trained(steps=0)
    weight = model[0].weight
    weight.grad = torch.eye(6, 5).to_sparse()
    try:
        optimizer.step()
    except RuntimeError:
        return
    raise AssertionError("RuntimeError not raised")


@case(once=True)
def test_complex_2d(subject: Subject) -> None:
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64))
    subject.train(model, subject.optimizer(model), 1)


@case()
def test_noncontiguous_params(subject: Subject) -> None:
    plain, other = _square_model(), _square_model()
    for layer in other:
        strided = torch.empty_like(layer.weight).T.copy_(layer.weight.detach())
        layer.weight = nn.Parameter(strided)
        assert not layer.weight.is_contiguous()
    # Of LowRankSOAP's two bases one is always whole.
    rank = {"rank": 6} if subject.rule == "low_rank_soap" else {}
    for model in (plain, other):
        optimizer = subject.optimizer(model, **rank)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def _square_model() -> nn.Sequential:
    """Return a model whose gradients have full rank.

    Elsewhere the order of sums, which goes by strides, decides how a full basis turns in the null
    space of the gradients, and with it what moves along those directions.
    """
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(2)))


@case()
def test_load_nontensor_step(subject: Subject) -> None:
    model, optimizer = subject.trained()
    assert {state["step"] for state in optimizer.state.values()} == {3}
    subject.train(model, optimizer, 1, 3)
    assert {state["step"] for state in optimizer.state.values()} == {4}
