"""The first screen: what it says of made-up comparisons, and that README and site say it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.evidence import entrants
from benchmarks.tables import headline
from benchmarks.tables.choices import NOTHING, choice, lines
from benchmarks.tables.headline import BEGIN, END, block, replaced
from benchmarks.tables.headline_chart import chart

SEEDS = (1, 2, 3, 4, 5)
NOISE = (0.001, -0.002, 0.003, 0.0, -0.001)
"""Of a row's seeds, turned by one place from row to row; its mean is .0002."""


def comparison(
    task: str, means: dict[str, float], state: dict[str, int] | None = None, **design: Any
) -> dict[str, Any]:
    """Return a results file whose rows have these means, small noise and one trial each."""
    known = entrants.text() if task.startswith("text") else entrants.images(norms=True)
    accuracy = not task.startswith("text")
    runs: dict[str, Any] = {}
    for index, (name, mean) in enumerate(means.items()):
        settings = known[name].space.values(known[name].space.origin)
        base = {"row": name, "settings": settings}
        runs[f"{name} trial"] = {**base, "kind": "trial", "seed": 0, "validation": mean}
        for place, seed in enumerate(SEEDS):
            noise = NOISE[(place + index) % 5]
            own: dict[str, Any] = {"curve": [[50, mean + 1], [100, mean + 0.5 + noise]]}
            own |= {"state_bytes": (state or {}).get(name, 1000)}
            runs[f"{name} {seed}"] = {
                **base, "kind": "seed", "seed": seed, "test": mean + noise, **own
            }  # fmt: skip
    made = {
        "task": task,
        "figure": "accuracy" if accuracy else "loss, nats per byte",
        "better": "higher" if accuracy else "lower",
        "margin": 0.02,
        "trials": 1,
        "seeds": SEEDS,
        "tuning_seeds": (0,),
        "chosen_on": "validation",
        "reported_on": "test",
        "details": {"width": 64},
        **design,
    }
    rows = {name: known[name].recorded() for name in means}
    return {"settings": {"design": made, "rows": rows}, "runs": runs}


def text(means: dict[str, float], state: dict[str, int] | None = None) -> dict[str, Any]:
    return {"contests/text-64": comparison("text-64", means, state)}


def test_a_row_ahead_is_recommended_with_its_cost_and_the_control_that_it_does_not_beat() -> None:
    means = {"AdamW": 2.5, "P": 2.3, "RACS": 2.2, "AdamW, two rates": 2.201}
    found = text(means, {"AdamW": 1000, "RACS": 260, "P": 250})
    steps = {"runs": {"text-64": {"RACS": {"ms": 5.0, "ratio": 1.234}}}}
    language, images, memory = lines(found, steps)
    assert "`RACS`. Test loss 2.200 where tuned AdamW has 2.500" in language
    # From mean + 1 at step 50 to mean + .5 at 100: RACS is at AdamW's 3.0 after 70 of 100 steps.
    assert "for 26 % of its state; AdamW's last validation loss after 70 %" in language
    assert "of the steps and 86 % of the time" in language
    assert re.search(r"With two rates AdamW has 2\.201, (not told apart|level)", language)
    assert images == f"**For images:** {NOTHING}"
    assert '`NeuRMS(variant="P")` keeps 25 % of AdamW\'s state: 2.300 on the same text' in memory
    assert "; behind AdamW with two rates" in memory


@pytest.mark.parametrize(
    ("timed", "said"),
    [
        ({"AdamW": 2.5, "RACS": 2.2, "P": 2.4}, "it has 2.200, AdamW 2.500 (ahead, p < .001)."),
        (
            {"AdamW": 2.5, "RACS": 2.4, "P": 2.2},
            '`NeuRMS(variant="P")` has 2.200, AdamW 2.500 (ahead, p < .001).',
        ),
    ],
)
def test_equal_time_has_a_sentence_of_its_own(timed: dict[str, float], said: str) -> None:
    found = text({"AdamW": 2.5, "RACS": 2.2, "P": 2.3})
    assert "equal time" not in lines(found)[0]
    found["contests/text-64-timed"] = comparison("text-64-timed", timed)
    assert said in lines(found)[0]


def test_what_a_step_of_a_larger_model_takes_is_said_where_it_was_timed() -> None:
    found = text({"AdamW": 2.5, "RACS": 2.2})
    found["llama_cpu"] = {"runs": {"float32 RACS": {"ratio": 1.01}, "float32 Muon": {"ratio": 2}}}
    assert "; 1.01 times AdamW's step with 19 M parameters." in lines(found)[0]


def test_a_control_that_is_ahead_of_the_best_row_is_what_is_recommended() -> None:
    means = {"AdamW": 2.5, "P": 2.3, "AdamW, two rates": 2.1}
    line = lines(text(means, {"AdamW": 1000, "P": 250}))[0]
    assert "CPU:** AdamW with a second rate outside of the rule. Test loss 2.1" in line
    assert "with one 2.50" in line
    assert '`NeuRMS(variant="P")` between them, 2.300' in line
    assert "for 25 % of its state" in line


def test_a_control_that_is_beaten_goes_without_saying() -> None:
    assert "second rate" not in lines(text({"AdamW": 2.5, "P": 2.2, "AdamW, two rates": 2.4}))[0]


@pytest.mark.parametrize(
    ("own", "margin", "words"),
    [
        (2.5005, 0.02, "`RACS` or AdamW. Test loss 2.5.. and 2.5.., level within 0.02"),
        (2.5005, 0.001, "AdamW or `RACS`. .*not told apart"),
        (2.7, 0.02, "AdamW. Test loss 2.500 .*the nearest here, `RACS`, is behind with 2.7"),
        (2.49, 0.2, "`RACS`. .*a small lead"),
    ],
)
def test_every_verdict_has_its_words(own: float, margin: float, words: str) -> None:
    content = comparison("text-64", {"AdamW": 2.5, "RACS": own}, margin=margin)
    assert re.search(words, lines({"contests/text-64": content})[0])


def test_more_is_better_for_accuracies_and_the_first_comparison_counts() -> None:
    found = {
        "contests/mnist": comparison("mnist", {"AdamW": 0.98, "P": 0.90}),
        "contests/fashion-conv": comparison("fashion-conv", {"AdamW": 0.90, "P momentum": 0.95}),
    }
    images = lines(found)[1]
    assert "momentum=0.5" in images
    assert "Accuracy 95.02 % where tuned AdamW has 90.02 %" in images
    del found["contests/fashion-conv"]
    assert "AdamW. Accuracy 98.0" in lines(found)[1]


def test_rows_that_are_missing_unfinished_or_diverged_are_left_out() -> None:
    content = comparison("text-64", {"AdamW": 2.5, "P": 2.3, "RACS": 2.2, "Muon": 2.1})
    del content["runs"]["RACS 3"]
    content["runs"]["Muon 2"]["test"] = None
    found = {"contests/text-64": content}
    best = choice(found, ("text-64",))
    assert best is not None
    assert best.row.name == "P"
    for key in [key for key in content["runs"] if key.startswith("AdamW")]:
        del content["runs"][key]
    assert choice(found, ("text-64",)) is None
    assert lines({}) == [
        f"**For language models on a CPU:** {NOTHING}",
        f"**For images:** {NOTHING}",
        f"**When memory is short:** {NOTHING}",
    ]


def test_the_chart_has_every_row_its_state_and_its_seconds() -> None:
    found = text({"AdamW": 2.5, "P": 2.3, "SGD": 2.9}, {"AdamW": 1_040_000, "P": 274_000})
    assert chart(found).count("<polyline") == 2
    found["contest_step_text"] = {"runs": {"text-64": {n: {"ms": 10.0} for n in ("AdamW", "P")}}}
    drawn = chart(found)
    ET.fromstring(drawn)
    assert drawn.count("<polyline") == 4
    for shown in ("NeuRMS P<", "2.300<", "274 kB", "1.04 MB", ">seconds<", ">step<"):
        assert shown in drawn
    assert "SGD" not in drawn
    assert chart({}) == ""


@pytest.mark.parametrize("best", ["P momentum", "RACS", "SGD", "NeuRMS-U normalized", "Muon"])
def test_the_code_of_the_block_runs(best: str) -> None:
    made = block(text({"AdamW": 2.5, best: 2.2}), "chart.svg")
    (code,) = re.findall(r"```python\n(.*?)```", made, re.DOTALL)
    exec(code, {})
    assert "![Validation loss" in made
    exec(re.findall(r"```python\n(.*?)```", block({}, ""), re.DOTALL)[0], {})


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(page, f"{BEGIN}\nnew\n{END}") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="write them where it goes"):
        replaced("no markers", "new")


def test_the_first_screen_is_read_aloud_in_a_minute() -> None:
    """At 160 words a minute; code and the picture's description are not read."""
    page = (tables.ROOT / "README.md").read_text().split(headline.END)[0]
    spoken = re.sub(r"```.*?```|!\[.*?\]\(.*?\)|<!--.*?-->", "", page, flags=re.DOTALL)
    assert len(spoken.split()) < 160


def test_what_could_not_be_told_apart_is_no_answer_where_another_row_is_ahead() -> None:
    """RACS keeps least, and its seeds lie too far apart to say anything; P is ahead."""
    found = text({"AdamW": 2.5, "P": 2.3, "RACS": 2.5}, {"AdamW": 1000, "RACS": 10, "P": 250})
    runs = found["contests/text-64"]["runs"]
    for place, seed in enumerate(SEEDS):
        runs[f"RACS {seed}"]["test"] += 0.2 * (place - 2)
    *_, memory = lines(found, None)
    assert '`NeuRMS(variant="P")` keeps 25 %' in memory
    assert "RACS" not in memory
