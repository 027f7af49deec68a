"""The look for bad numbers, form by form."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled.backends import PROMPT
from neurms.compiled.finite import GREATEST, within

FORMS = ["eager", "auto", PROMPT]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_anywhere_is_found(form: str, bad: float) -> None:
    for count, places in ((40_000, (0, 8191, 8192, 39_999)), (5, (0, 4))):
        for place in places:
            x = torch.full((count,), 3e38)  # their sum overflows, they do not
            assert within.on(form)([x, torch.zeros(0), x], [GREATEST] * 3)
            x[place] = bad
            assert not within.on(form)([x], [GREATEST])
            assert not within.on(form)([torch.ones(3), x], [GREATEST] * 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -2.0])
@pytest.mark.parametrize("position", [0, 70_000, 99_999])
@pytest.mark.parametrize("threads", [1, 2])
def test_each_has_its_own_bound(form: str, bad: float, position: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    tensors = [torch.full((3,), 5.0), torch.ones(100_000), torch.zeros(0)]
    look = within.on(form)
    found = look(tensors, [5.0, 1.0, 0.0]), look(tensors, [4.0, 1.0, 0.0])
    tensors[1][position] = bad
    after = look(tensors, [5.0, 1.0, 0.0])
    torch.set_num_threads(before)
    assert (*found, after) == (True, False, False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bfloat16(form: str, bad: float) -> None:
    x, look = torch.ones(200, 300, dtype=torch.bfloat16), within.on(form)
    assert look([x], [1.0])
    assert not look([x], [0.99])
    x[199, 299] = bad
    assert not look([x], [3e38])


@pytest.mark.parametrize("form", FORMS)
def test_mixed_lists(form: str) -> None:
    look = within.on(form)
    tensors = [
        torch.full((3,), 1e300, dtype=torch.float64),
        torch.ones(40_000),
        torch.ones(4, 5, dtype=torch.float16).T,
        torch.ones(6, dtype=torch.bfloat16),
    ]
    bounds = [torch.finfo(x.dtype).max for x in tensors]
    assert look(tensors, bounds)
    assert not look(tensors, [GREATEST, *bounds[1:]])
    for x in tensors:
        kept = x.clone()
        x[..., -1] = float("nan")
        assert not look(tensors, bounds)
        x.copy_(kept)
    assert look(tensors, bounds)
    assert look([], [])
