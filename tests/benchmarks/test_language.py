import dataclasses
import math

import pytest
import torch

from benchmarks.language import (
    MOST_RATES,
    Method,
    Scale,
    batch_of,
    bytes_per_word,
    final,
    recorded,
    train,
    tuned,
)

TINY = Scale(width=8, layers=1, heads=2, batch=2, context=8)
ADAMW = Method("adamw", (1e-3, 1e-2))


def text(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, 101, (2000,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_do_not_see_the_future(kind) -> None:
    model = dataclasses.replace(TINY, kind=kind).model(0)
    tokens = torch.randint(256, (1, 8))
    later = tokens.clone()
    later[0, 5:] = (later[0, 5:] + 1) % 256
    before, after = model(tokens), model(later)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5:], after[0, 5:])


def test_targets_are_the_next_bytes() -> None:
    tokens = torch.arange(200, dtype=torch.uint8)
    inputs, targets = batch_of(tokens, torch.Generator().manual_seed(0), TINY)
    assert inputs.shape == targets.shape == (2, 8)
    assert torch.equal(inputs + 1, targets)


def test_same_seed_same_run_and_other_seed_another() -> None:
    data = text(0), text(1)
    losses = [final(train(data, TINY, ADAMW, 1e-2, seed, 3, 0.0)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_training_learns_and_its_curve_ends_at_the_last_step() -> None:
    run = train((text(0), text(1)), TINY, ADAMW, 1e-2, 0, 40, 0.0, every=30)
    assert [point[0] for point in run["curve"]] == [30, 40]
    # Four letters: from about ln 256 towards ln 4.
    assert run["curve"][-1][1] < 4 < math.log(256)


def test_a_run_that_diverges_says_when_and_counts_as_worst() -> None:
    method = Method("sgd", (1.0,))
    run = train((text(0), text(1)), TINY, method, 1e30, 0, 5, 0.0)
    assert run["diverged"] <= 5
    assert final(run) == math.inf


def test_what_the_watch_sees_is_kept() -> None:
    run = train(
        (text(0), text(1)),
        TINY,
        ADAMW,
        1e-2,
        0,
        4,
        0.0,
        watch=lambda step, model, optimizer: {"lr": 1.0} if step % 2 else None,
    )
    assert [seen["step"] for seen in run["watched"]] == [1, 3]


def test_fallback_rate_reaches_what_is_outside_the_rule_only() -> None:
    model = TINY.model(0)
    optimizer = Method("rmnp", (0.01,)).make(model, 0.01, 0.125)
    assert {group["fallback_lr"] for group in optimizer.param_groups} == {0.125}
    assert isinstance(ADAMW.make(model, 0.01, 0.125), torch.optim.AdamW)


@pytest.mark.parametrize(
    ("optimum", "best", "trials"),
    [(2.0, 2.0, 3), (16.0, 16.0, 6), (1024.0, 32.0, MOST_RATES), (0.5, 0.5, 5)],
)
def test_search_goes_on_while_the_best_is_outermost(optimum, best, trials) -> None:
    tried = []

    def loss_at(lr: float) -> float:
        tried.append(lr)
        return abs(math.log2(lr / optimum))

    assert tuned((1.0, 2.0, 4.0), loss_at) == best
    assert len(tried) == len(set(tried)) == trials


def test_bytes_per_word_counts_spaces() -> None:
    assert bytes_per_word(torch.frombuffer(bytearray(b"ab cde f "), dtype=torch.uint8)) == 3.0


def test_rates_are_not_among_the_recorded_settings() -> None:
    assert recorded({"a": ADAMW}) == {"a": {"rule": "adamw", "settings": {}, "warmup": 0.1}}
