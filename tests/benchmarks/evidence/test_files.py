"""Every results file holds to the rules, measures no losses, or is on the list of old ones."""

from __future__ import annotations

import fnmatch
import json

import pytest

from benchmarks.evidence.old import MEASUREMENTS, OLD, notice
from benchmarks.evidence.rules import violations
from benchmarks.harness import RESULTS

FILES = {str(path.relative_to(RESULTS).with_suffix("")): path for path in RESULTS.rglob("*.json")}


def _measures(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in MEASUREMENTS)


@pytest.mark.parametrize("name", sorted(n for n in FILES if n not in OLD and not _measures(n)))
def test_a_comparison_holds_to_the_rules(name: str) -> None:
    assert violations(json.loads(FILES[name].read_text())) == []


def test_the_list_of_old_files_is_true() -> None:
    assert set(OLD) <= set(FILES)
    for name in OLD:
        content = json.loads(FILES[name].read_text())
        assert "design" not in content["settings"], f"{name} is under the rules: strike it off"
    assert not [name for name in OLD if _measures(name)]
    assert [p for p in MEASUREMENTS if not fnmatch.filter(FILES, p)] == []


def test_a_page_names_its_old_files() -> None:
    text = notice(("mnist", "kernels", "llama"))
    assert "`mnist`" in text
    assert "`llama`" in text
    assert "kernels" not in text
    assert notice(("kernels", "contests/text-64")) == ""
