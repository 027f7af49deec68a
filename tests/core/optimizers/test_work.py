"""Equal matrices are processed together, and nothing can tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neurms import RACS
from neurms.core.optimizers.by_recipe import batches
from neurms.core.optimizers.gradients import nonfinite_names
from tests.core.optimizers.training import GRADIENT_RULES, SETTINGS, make, random_gradients


@pytest.mark.parametrize("name", GRADIENT_RULES)
def test_many_equal_matrices_move_as_each_would_alone(name: str) -> None:
    # Square and of full rank: SOAP's bases are arbitrary where a gradient has no energy at all.
    together = [nn.Parameter(torch.randn(5, 5)) for _ in range(5)]
    settings = {"rank": 5, "leading": 5} if name == "low_rank_soap" else {}
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    named = [(f"layer{i}", p) for i, p in enumerate(together)]
    joint = make(name, named, weight_decay=0.1, **settings)  # type: ignore[arg-type]
    single = [
        make(name, [(f"layer{i}", p)], weight_decay=0.1, **settings)  # type: ignore[arg-type]
        for i, p in enumerate(alone)
    ]
    for seed in range(4):
        random_gradients(together, seed)
        for a, b in zip(together, alone, strict=True):
            b.grad = a.grad
        joint.step()
        for optimizer in single:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_batches_hold_equal_shapes_dtypes_steps_and_recipes() -> None:
    shapes = [(4, 3), (4, 3), (3, 4), (4, 3), (400, 300), (400, 300), (4, 3)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    parameters[3] = nn.Parameter(parameters[3].detach().double())
    optimizer = RACS([{"params": parameters[:-1]}, {"params": parameters[-1:], "beta": 0.5}])
    random_gradients(parameters, 0)
    optimizer.step()
    found = [[view.index for view in run] for _, run in batches(optimizer.work().due())]
    assert found == [[0, 1], [2], [3], [4], [5], [6]]


def test_a_parameter_that_missed_steps_is_not_batched_with_the_others() -> None:
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    truth = nn.Parameter(parameters[2].detach().clone())
    settings = {"bias_correction": True}
    optimizer, alone = RACS(parameters, **settings), RACS([truth], **settings)
    random_gradients(parameters[:2], 0)
    optimizer.step()
    random_gradients(parameters, 1)
    truth.grad = parameters[2].grad
    optimizer.step()
    alone.step()
    torch.testing.assert_close(parameters[2], truth)


def test_random_draws_depend_on_names_and_seeds_alone() -> None:
    if "alice" not in GRADIENT_RULES:
        pytest.skip("alice is not in the registry")
    start = torch.randn(8, 12)

    def moved(name: str, others: int, seed: int) -> torch.Tensor:
        named = [(f"other{i}", nn.Parameter(torch.randn(8, 12))) for i in range(others)]
        target = (name, nn.Parameter(start.clone()))
        everyone = [*named, target]
        optimizer = make("alice", everyone, seed=seed, **SETTINGS["alice"])  # type: ignore[arg-type]
        for step in range(6):
            random_gradients([p for _, p in named], 50 + step)
            random_gradients([target[1]], step)
            optimizer.step()
        return target[1].detach()

    reference = moved("layer", 0, seed=1)
    torch.testing.assert_close(moved("layer", 2, seed=1), reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved("layer", 0, seed=2), reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved("other", 0, seed=1), reference, rtol=1e-4, atol=1e-5)


def test_names_of_nonfinite_gradients() -> None:
    parameters = [(f"p{i}", nn.Parameter(torch.zeros(3, 3))) for i in range(4)]
    optimizer = RACS(parameters)
    values = [1.0, float("nan"), 3e38, float("inf")]
    for (_, parameter), value in zip(parameters, values, strict=True):
        parameter.grad = torch.full((3, 3), value)
    views = optimizer.work().due()
    assert nonfinite_names(views) == ["p1", "p3"]
    assert nonfinite_names([]) == []


def test_transforms_see_the_master_copy_of_the_weight() -> None:
    """LAMB's trust ratio from float32 weights, although bfloat16 would round them away."""
    narrow = nn.Parameter(torch.full((4, 3), 1.0, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.full((4, 3), 1.0))
    optimizers = (
        make("lamb", [narrow], lr=1e-4, low_precision="master"),
        make("lamb", [wide], lr=1e-4),
    )
    for _ in range(20):
        narrow.grad, wide.grad = torch.ones_like(narrow), torch.ones_like(wide)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(
        optimizers[0].state[narrow]["master"], wide.detach(), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("how", ["replaced", "popped", "cleared", "swapped"])
def test_a_step_sees_what_became_of_a_state(how: str) -> None:
    """It looks at states by identity: one that is there no more must not be moved on."""
    parameters = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = RACS(parameters)
    for step in range(3):
        random_gradients(parameters, step)
        optimizer.step()
    one, other = (optimizer.state[p] for p in parameters)
    if how == "replaced":
        optimizer.state[parameters[0]] = dict(one, step=7)
    elif how == "popped":
        optimizer.state.pop(parameters[0])
    elif how == "cleared":
        optimizer.state.clear()
    else:
        optimizer.state[parameters[0]], optimizer.state[parameters[1]] = other, one
    random_gradients(parameters, 4)
    optimizer.step()
    expected = {"replaced": [8, 4], "popped": [1, 4], "cleared": [1, 1], "swapped": [4, 4]}[how]
    assert [optimizer.state[p]["step"] for p in parameters] == expected
    views = optimizer.work().due()
    assert all(view.state is optimizer.state[view.parameter] for view in views)
    assert one["step"] == (4 if how == "swapped" else 3)
