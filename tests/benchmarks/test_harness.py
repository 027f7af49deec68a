import json

import pytest
import torch
from scipy.stats import t

from benchmarks.harness import Results
from benchmarks.significance import paired


@pytest.fixture(autouse=True)
def keep_denormals():
    """Making results flushes denormals, which other tests may need."""
    yield
    torch.set_flush_denormal(False)


def never():
    raise AssertionError("this run is in the file already")


def test_killed_sweep_continues(tmp_path) -> None:
    path, settings = tmp_path / "some.json", {"lr": (0.1, 0.2)}
    first = Results(path, settings)
    first.run("a", lambda: {"accuracy": 0.5})
    with pytest.raises(KeyboardInterrupt):
        first.run("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    second = Results(path, settings)
    assert second.run("a", never) == {"accuracy": 0.5}
    assert second.run("b", lambda: {"accuracy": 0.75}) == {"accuracy": 0.75}
    assert set(json.loads(path.read_text())["runs"]) == {"a", "b"}


def test_other_settings_are_refused(tmp_path) -> None:
    path = tmp_path / "some.json"
    Results(path, {"epochs": 2}).run("a", lambda: {})
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        Results(path, {"epochs": 3})
    assert path.read_bytes() == before


def test_two_that_begin_a_file_at_once_keep_the_settings_of_both(tmp_path) -> None:
    path = tmp_path / "some.json"
    one, other = (
        Results(path, {"seeds": (1, 2), "methods": {name: {"axes": (0.1, 0.2)}}}) for name in "ab"
    )
    one.run("a", lambda: {})
    other.run("b", lambda: {})
    found = json.loads(path.read_text())["settings"]
    assert found == {"seeds": [1, 2], "methods": {name: {"axes": [0.1, 0.2]} for name in "ab"}}


def test_one_that_has_been_overtaken_by_other_settings_writes_nothing(tmp_path) -> None:
    path = tmp_path / "some.json"
    late = Results(path, {"epochs": 3})
    Results(path, {"epochs": 2}).run("a", lambda: {})
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        late.run("b", lambda: {})
    assert path.read_bytes() == before


def test_record_is_of_the_run_not_of_who_only_printed(tmp_path) -> None:
    path = tmp_path / "some.json"
    Results(path, {}).run("a", lambda: {})
    content = json.loads(path.read_text())
    content["environment"]["commit"] = "of the run"
    path.write_text(json.dumps(content))
    again = Results(path, {})
    again.run("a", never)
    again.save(summary=[])
    assert json.loads(path.read_text())["environment"]["commit"] == "of the run"


def test_paired_is_student_s_t() -> None:
    first, second = [0.91, 0.94, 0.95, 0.93], [0.90, 0.90, 0.93, 0.94]
    gaps = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    statistic = float(gaps.mean() / (gaps.std() / 2))
    found = paired(first, second)
    assert found["difference"] == pytest.approx(float(gaps.mean()), rel=1e-9)
    assert found["p"] == pytest.approx(2 * t.sf(abs(statistic), df=3), rel=1e-9)


def test_settings_of_a_method_added_since_are_kept(tmp_path) -> None:
    path = tmp_path / "some.json"
    Results(path, {"steps": 5, "methods": {"a": {"beta": 0.9}}}).run("a", lambda: {})
    Results(path, {"steps": 5, "methods": {"b": {}}}).run("b", lambda: {})
    content = json.loads(path.read_text())
    assert content["settings"] == {"steps": 5, "methods": {"a": {"beta": 0.9}, "b": {}}}
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        Results(path, {"steps": 5, "methods": {"a": {"beta": 0.8}}})


def test_every_machine_and_commit_is_kept(tmp_path) -> None:
    path = tmp_path / "some.json"
    Results(path, {}).run("a", lambda: {})
    content = json.loads(path.read_text())
    here = content["environment"]
    content["environment"] = {**here, "commit": "of before", "machine": "Z80"}
    for key in ("commits", "machines"):
        del content[key]
    path.write_text(json.dumps(content))
    Results(path, {}).run("b", lambda: {})
    content = json.loads(path.read_text())
    assert content["commits"] == ["of before", here["commit"]]
    assert content["machines"] == ["Z80", here["machine"]]
