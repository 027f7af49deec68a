"""What follows from advice on layers whose answer is known by construction."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.callbacks.profiler import profile
from neurms.report import Advice, AdviceList
from tests.report.test_advice import STEPS, M, N, collinear, independent, taking_turns, whitened

KNOWN = {"a": independent, "b": taking_turns, "c": whitened, "d": collinear}
ANSWERS = {"a": "F", "b": "U", "c": "RMNP", "d": "AdamW"}


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(N, M) for name in KNOWN})


@pytest.fixture(scope="module")
def advice() -> AdviceList:
    """Each layer is fed the D and H of which its answer follows."""
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0, beta=0.8) as profiler:
        for _ in range(STEPS):
            optimizer.zero_grad()
            for name, signals in KNOWN.items():
                errors, inputs = signals(generator)
                (model[name](inputs) * errors).sum().backward()
            optimizer.step()
    return profiler.report().advice()


def listed(**rules: Any) -> AdviceList:
    return AdviceList([Advice(name, rule, "known") for name, rule in rules.items()])


def rules(optimizer: Any) -> dict[str, str]:
    variants = {
        name: group.get("variant")
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    found = {
        row.name.partition(".")[0]: variants[row.name] if row.rule == "neurms" else row.rule
        for row in optimizer.plan()
        if row.name.endswith("weight")
    }
    return dict(sorted(found.items()))


def test_layers_get_the_rule_that_their_signals_call_for(advice: AdviceList) -> None:
    assert {one.layer: one.rule for one in advice} == ANSWERS
    optimizer = advice.apply(network())
    assert isinstance(optimizer, neurms.NeuRMS)
    assert rules(optimizer) == {"a": "F", "b": "U", "c": "rmnp", "d": "fallback"}
    optimizer.detach()


def test_the_code_makes_the_same_optimizer(advice: AdviceList) -> None:
    rates = {"F": 0.3, "U": 0.2, "RMNP": 0.1, "AdamW": 0.01}
    ours, model = advice.apply(network(), rates), network()
    code = advice.choice(model, rates).code()
    assert max(map(len, code.splitlines())) < 100
    names: dict[str, Any] = {"neurms": neurms, "model": model}
    exec(code, names)
    theirs = names["optimizer"]
    assert str(theirs.plan()) == str(ours.plan())
    plain = ("lr", "variant", "rule", "fallback_lr")
    settings = [[[g[k] for k in plain] for g in o.param_groups] for o in (ours, theirs)]
    assert settings[0] == settings[1]
    assert [row[0] for row in settings[0]] == [0.2, 0.1, 0.3]
    assert settings[0][0][3] == 0.01


@pytest.mark.parametrize(
    ("rules_of", "name", "expected"),
    [
        ({"a": "P", "b": "P", "c": "P", "d": "P"}, "neurms", "P P P P"),
        ({"a": "P", "b": "P", "c": "RMNP", "d": "AdamW"}, "neurms", "P P rmnp fallback"),
        # Beside what needs taps P is RACS.
        ({"a": "U", "b": "P", "c": "P", "d": "P"}, "neurms", "U racs racs racs"),
        ({"a": "RMNP", "b": "AdamW", "c": "undecided", "d": "RMNP"}, "rmnp",
         "rmnp fallback fallback rmnp"),
        ({"a": "F", "b": "F", "c": "U", "d": "F"}, "neurms", "F F U F"),
    ],
)  # fmt: skip
def test_rules_that_cannot_share_an_optimizer(rules_of: Any, name: str, expected: str) -> None:
    model = network()
    advice = listed(**rules_of)
    assert advice.choice(model).name == name
    assert " ".join(rules(advice.apply(model)).values()) == expected


def test_nothing_holds_and_adamw_stays() -> None:
    model = network()
    assert type(listed(a="AdamW", b="undecided").apply(model)) is torch.optim.AdamW
    assert listed(a="AdamW").choice(model, {"AdamW": 0.1}).code() == (
        "optimizer = neurms.create('adamw', model, lr=0.1)"
    )


def test_embeddings_and_tied_weights_go_their_own_way() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(6, 4), "f": nn.Linear(4, 5), "h": nn.Linear(4, 6)})
    model["h"].weight = model["e"].weight
    choice = listed(e="AdamW", f="U", h="F").choice(model)
    assert (choice.settings, choice.parts) == ({"variant": "U"}, ())


def test_a_rate_is_never_another_rule_s() -> None:
    parts = listed(a="U", b="U", c="RMNP").choice(network(), {"U": 5.0}).parts
    default = inspect.signature(neurms.RMNP).parameters["lr"].default
    assert parts[0].settings == {"rule": "rmnp", "lr": default}


def test_advice_on_another_model() -> None:
    with pytest.raises(ValueError, match="layer 'z', and the model has none of that name"):
        listed(z="U").apply(network())
