"""Run files: how they grow, end, break, and go on."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from neurms.callbacks.profiler import Profiler
from neurms.report import ProfilerReport, Run, RunFileError, read_run
from neurms.report.runs import RUN_FILE
from neurms.report.writer import PAGE
from tests.callbacks.profiler import truth
from tests.report.small_runs import run


def test_the_run_file_equals_the_report_and_grows_step_by_step(tmp_path: Path) -> None:
    profiler = run(tmp_path / "run")
    lines = (tmp_path / "run" / RUN_FILE).read_text().splitlines()
    assert len(lines) == 1 + 5 + 1
    read = ProfilerReport.read(tmp_path / "run")
    assert read.run.finished
    assert [row.rho for row in read] == pytest.approx(
        [row.rho for row in profiler.report()], rel=1e-6
    )
    assert read.step_ms == pytest.approx(profiler.report().step_ms, rel=1e-6)


def test_a_run_without_its_end_is_read_and_says_so(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / RUN_FILE
    file.write_text("\n".join(file.read_text().splitlines()[:4]) + "\n")
    found = read_run(tmp_path)
    assert not found.finished
    assert len(found.samples) == 3
    assert len(ProfilerReport(found)) == 3


def test_a_run_file_cut_in_half_is_an_error_with_a_cure(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / RUN_FILE
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(RunFileError, match=r"cut off or damaged in line \d.*partial=True"):
        read_run(tmp_path)
    found = read_run(tmp_path, partial=True)
    assert 0 < len(found.samples) < 5


def test_other_damage_is_named(tmp_path: Path, report: ProfilerReport) -> None:
    report.to_json(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "half.json").write_text(text[: len(text) // 2])
    with pytest.raises(RunFileError, match="is cut off or damaged"):
        read_run(tmp_path / "half.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(RunFileError, match="is not a run file"):
        read_run(tmp_path / "other.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunFileError, match="is not a run file"):
        read_run(tmp_path / "binary")
    (tmp_path / "new.json").write_text(json.dumps(json.loads(text) | {"version": 2}))
    with pytest.raises(RunFileError, match="has version 2"):
        read_run(tmp_path / "new.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_run(tmp_path / "nothing")


def test_infinities_survive_json(tmp_path: Path) -> None:
    found = Run({"layers": {}}, [{"step": 0, "layers": {"a": {"dominance": [float("inf"), 1.0]}}}])
    (tmp_path / "run.json").write_text(found.dumps())
    assert read_run(tmp_path / "run.json").samples == found.samples


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"output='.*' cannot be written") as caught:
        run(tmp_path / "file" / "run")
    assert caught.value.errno == errno.ENOTDIR


def test_another_run_is_numbered_and_touches_nothing(tmp_path: Path) -> None:
    first = run(tmp_path / "run", steps=4)
    before = (tmp_path / "run" / RUN_FILE).read_bytes()
    later = [run(tmp_path / "run", steps=3).folder for _ in range(2)]
    assert [first.folder, *later] == [tmp_path / name for name in ("run", "run-2", "run-3")]
    assert (tmp_path / "run" / RUN_FILE).read_bytes() == before
    assert [ProfilerReport.read(folder).steps for folder in later] == [[1, 2], [1, 2]]


def test_overwriting_replaces_the_run_and_its_page(tmp_path: Path) -> None:
    run(tmp_path, steps=6)
    page = (tmp_path / PAGE).read_text()
    assert run(tmp_path, steps=3, overwrite=True).folder == tmp_path
    assert ProfilerReport.read(tmp_path).steps == [1, 2]
    assert (tmp_path / PAGE).read_text() != page
    assert [path.name for path in tmp_path.parent.glob(f"{tmp_path.name}*")] == [tmp_path.name]


def test_a_resumed_run_appends_and_what_is_done_again_counts_once(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=6)
    # The checkpoint was of step 4: steps 4 and 5 are done again.
    resumed = run(tmp_path / "run", steps=3, first_step=4, overwrite=True)
    assert resumed.folder == tmp_path / "run"
    found = ProfilerReport.read(tmp_path / "run")
    assert found.steps == resumed.report().steps == [1, 2, 3, 4, 5, 6]
    assert found.run.finished
    assert found.run.totals["steps"] == 7
    assert "6 of 7 steps profiled" in (tmp_path / "run" / PAGE).read_text()


def test_a_crash_in_the_middle_of_a_line_does_not_hinder_a_resumption(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / RUN_FILE
    file.write_text(file.read_text()[:-300])
    seen = len(read_run(tmp_path, partial=True).samples)
    assert seen == 4
    run(tmp_path, steps=2, first_step=20)
    assert ProfilerReport.read(tmp_path).steps == [1, 2, 3, 4, 20, 21]


def test_a_resumption_appends_to_the_newest_run_of_the_same_layers(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path / "run", steps=3)
    assert run(tmp_path / "run", steps=1, first_step=3).folder == tmp_path / "run-2"
    assert run(tmp_path / "run", steps=1, first_step=3, layers=["0"]).folder == tmp_path / "run-3"
    (tmp_path / "run-3" / RUN_FILE).write_text("not a run")
    assert run(tmp_path / "run", steps=1, first_step=3).folder == tmp_path / "run-4"
    assert run(tmp_path / "new", steps=1, first_step=3).folder == tmp_path / "new"


def test_the_current_folder_has_neighbours_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(Path(), steps=2)
    assert run(Path(), steps=2).folder == tmp_path / "here-2"


def test_a_folder_that_closes_while_training_loses_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = truth.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    profiler = Profiler(model, optimizer, every_n_steps=1, warmup_steps=0, output=tmp_path)

    def full(text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert profiler._writer is not None
    monkeypatch.setattr(profiler._writer._stream, "write", full, raising=False)

    def train() -> None:
        with profiler:
            for _ in range(3):
                model(torch.ones(2, 12)).sum().backward()
                optimizer.step()

    with pytest.warns(UserWarning, match="can no longer be written.*No space left"):
        train()
    assert len(profiler.report().steps) == 3
