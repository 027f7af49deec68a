"""How failures of other libraries' tests are judged, and that none is unexplained."""

import functools
from pathlib import Path

import pytest

import neurms
from neurms.core.optimizers.registry import is_torch
from tools.peer_suites import PARTS, main, suite
from tools.peers import lightning_suite
from tools.peers.outcome import Outcome, Refusal, judge

RULES = [name for name in neurms.available() if not is_torch(name)]
EXPECTED = Refusal("for another backend", tests=r"sparse\..*", error="not on torch", rules="a|b")


def failure(rule: str = "a", test: str = "sparse.one", error: str = "E: not on torch") -> Outcome:
    return Outcome(rule, test, "failed", error)


def test_an_expected_failure_counts_by_its_reason() -> None:
    verdict = judge([Outcome("a", "x", "passed"), failure(), failure("b")], [EXPECTED])
    assert verdict.good
    assert verdict.refused == {"for another backend": 2}


@pytest.mark.parametrize(
    "other", [failure("c"), failure(test="dense.one"), failure(error="E: out of memory")]
)
def test_any_other_failure_is_unexplained(other: Outcome) -> None:
    verdict = judge([Outcome("a", "x", "passed"), failure(), other], [EXPECTED])
    assert not verdict.good
    assert verdict.unexplained == [other]
    assert any("UNEXPLAINED" in line for line in verdict.lines())


def test_a_refusal_that_covers_nothing_must_go() -> None:
    verdict = judge([Outcome("a", "x", "passed")], [EXPECTED])
    assert not verdict.good
    assert verdict.idle == [EXPECTED]


def test_a_suite_that_ran_nothing_is_not_good() -> None:
    assert not judge([], []).good


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["jax"])
    assert "no part is called 'jax'" in capsys.readouterr().err


def test_a_suite_that_is_not_installed_wants_a_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lightning"])
    assert "pass --checkout PATH" in capsys.readouterr().err


SUITE = """
import torch

def test_of_torchs_interface() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    weight.sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.5

def test_of_settings() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert "rule" not in torch.optim.Adam([weight]).param_groups[0]

def test_that_nobody_passes() -> None:
    raise ValueError
"""


@pytest.mark.slow
def test_lightnings_tests_get_our_optimizers_after_a_control(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "tests_pytorch" / "tuner"
    folder.mkdir(parents=True)
    (folder / "test_it.py").write_text(SUITE)
    found = {o.test.rpartition("::")[2]: o for o in lightning_suite.outcomes(tmp_path, ["tuner"])}
    assert {name: o.result for name, o in found.items()} == {
        "test_of_torchs_interface": "passed",
        "test_of_settings": "failed",
        "test_that_nobody_passes": "skipped",
    }
    assert "'rule' not in" in found["test_of_settings"].error


@functools.cache
def outcomes(part: str, rule: str) -> tuple[Outcome, ...]:
    return tuple(suite(part).outcomes([rule]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("part", PARTS)
def test_no_failure_is_unexplained(part: str, rule: str) -> None:
    verdict = judge(outcomes(part, rule), suite(part).REFUSALS)
    assert verdict.passed
    assert not verdict.unexplained, "\n".join(verdict.lines())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", PARTS)
def test_no_refusal_is_idle_and_no_rule_forgotten(part: str) -> None:
    assert set(suite(part).RULES) == set(RULES)
    verdict = judge((o for rule in RULES for o in outcomes(part, rule)), suite(part).REFUSALS)
    assert not verdict.idle, "\n".join(verdict.lines())
