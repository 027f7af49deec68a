"""Rows, files and the way back from them."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import neurms
from neurms.callbacks.profiler import Profiler
from neurms.cli import main
from neurms.report import ProfilerReport, Run, RunFileError, read_run
from neurms.report.rows import law_share
from neurms.report.runs import RUN_FILE
from tests.callbacks.profiler import truth


def run(output: Path | None = None, steps: int = 6, variant: str = "F") -> Profiler:
    model = truth.mlp()
    optimizer = neurms.NeuRMS(model, variant=variant)  # type: ignore[arg-type]
    profiler = Profiler(model, optimizer, every_n_steps=1, warmup_steps=1, output=output)
    with profiler:
        for _ in range(steps):
            nn.functional.cross_entropy(
                model(torch.randn(8, 12)), torch.randint(4, (8,))
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
    return profiler


@pytest.fixture(scope="module")
def report() -> ProfilerReport:
    torch.manual_seed(0)
    return run().report()


def test_overhead_is_the_share_of_reduce_and_scale(report: ProfilerReport) -> None:
    for row in report:
        parts = [row.forward_us, row.backward_us, row.reduce_us, row.scale_us, row.update_us]
        parts.append(row.bookkeeping_us)
        assert row.total_us == pytest.approx(sum(parts))
        with_it = row.reduce_us + row.scale_us + row.bookkeeping_us
        assert row.overhead_with_bookkeeping == pytest.approx(with_it / sum(parts))
        assert row.overhead == pytest.approx((row.reduce_us + row.scale_us) / sum(parts))
    assert report[0].predicted_overhead == pytest.approx((16 + 12) / (2 * 16 * 12))
    assert 0 < (report.overhead or 0) < 1


def test_the_law_falls_as_one_over_the_width() -> None:
    shares = [law_share(width, width, "F") for width in (64, 128, 256)]
    assert shares == pytest.approx([1 / 64, 1 / 128, 1 / 256])
    assert law_share(100, 50, "U") == pytest.approx(1 / 100)


def test_totals_of_the_process(report: ProfilerReport) -> None:
    assert report.steps == [1, 2, 3, 4, 5]
    assert report.peak_rss_bytes is not None
    assert report.rss_bytes is not None
    assert report.peak_rss_bytes >= report.rss_bytes > 10**7
    assert report.profiler_ms is not None
    assert report.profiled_step_ms is not None
    assert report.profiler_ms > 0
    assert report.state_bytes == sum(row.state_bytes for row in report)


def test_history_is_the_number_at_every_profiled_step(report: ProfilerReport) -> None:
    history = report.history("2", "rho")
    assert [step for step, _ in history] == report.steps
    assert report[1].rho == pytest.approx(sum(value for _, value in history) / len(history))
    with pytest.raises(KeyError, match="was not profiled"):
        report.history("3", "rho")


def test_json_brings_the_report_back(report: ProfilerReport, tmp_path: Path) -> None:
    report.to_json(tmp_path / "run.json")
    back = ProfilerReport.read(tmp_path / "run.json")
    assert len(back) == len(report)
    for ours, theirs in zip(report, back, strict=True):
        assert theirs.rho == pytest.approx(ours.rho, rel=1e-6)
        assert theirs.dominance == pytest.approx(ours.dominance, rel=1e-6)
        assert theirs.reduce_us == pytest.approx(ours.reduce_us, rel=1e-6)
        assert (theirs.layer, theirs.shape, theirs.state_bytes) == (
            ours.layer,
            ours.shape,
            ours.state_bytes,
        )
    assert [str(a) for a in back.advice()] == [str(a) for a in report.advice()]


def test_csv_has_one_line_for_each_layer_and_one_number_in_each_cell(
    report: ProfilerReport, tmp_path: Path
) -> None:
    report.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["layer"] for row in rows] == ["0", "2", "4"]
    assert rows[0]["shape"] == "16x12"
    for row, expected in zip(rows, report, strict=True):
        assert float(row["rho"]) == expected.rho
        assert expected.dominance is not None
        assert float(row["r_min"]) == expected.dominance.r_min
        assert expected.unit_levels is not None
        assert float(row["v_q95"]) == expected.unit_levels[5]
        assert not any("[" in cell or "(" in cell for cell in row.values())


class Page(HTMLParser):
    """Tags of a page, whether they close, and where they point."""

    VOID = frozenset({"meta", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [v or "" for k, v in attrs if k in ("href", "src", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_whole_and_asks_nobody_for_anything(report: ProfilerReport, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open, "every tag is closed"
    assert page.targets == ["data:,"]
    assert "script" not in page.tags
    assert not re.search(r"https?:|@import|url\(", text)
    assert page.tags.count("svg") == 9
    assert "nan" not in re.findall(r'="([^"]*)"', text)


def test_html_escapes_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"<b>&": nn.Linear(4, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Profiler(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        model["<b>&"](torch.ones(2, 4)).sum().backward()
        optimizer.step()
    profiler.report().to_html(tmp_path / "r.html")
    assert "<b>&<" not in (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;&amp;" in (tmp_path / "r.html").read_text()


def test_an_empty_run_has_a_report_too(tmp_path: Path) -> None:
    model = truth.mlp()
    profiler = Profiler(model, torch.optim.SGD(model.parameters(), lr=0.1))
    report = profiler.report()
    assert len(report) == 0
    assert report.advice() == []
    report.to_html(tmp_path / "empty.html")
    report.to_csv(tmp_path / "empty.csv")
    report.to_json(tmp_path / "empty.json")
    assert len(ProfilerReport.read(tmp_path / "empty.json")) == 0


def test_table_names_every_layer(report: ProfilerReport) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "NeuRMS: layers" in text
    assert "16x12" in text
    assert "9x16" in text


def test_a_narrow_terminal_gets_fewer_columns_whole(report: ProfilerReport) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    lines = console.export_text().splitlines()
    header = next(line for line in lines if "layer" in line and "┃" in line)
    for name in ("reduce", "scale", "overhead", "rho", "advice"):
        assert name in header
    assert "shape" not in header


# -------------------------------------------------------------------- run files


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
    run(tmp_path / "taken", steps=2)
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(tmp_path / "taken", steps=2)


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


# -------------------------------------------------------------------- the command line


def test_the_command_line_rebuilds_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run(tmp_path / "a", steps=5)
    run(tmp_path / "b", steps=5, variant="U")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "NeuRMS: layers" in shown
    assert "written" in shown
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "A NeuRMS against B NeuRMS" in shown
    assert "overhead B" in shown


def test_the_command_line_explains_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err
    run(tmp_path / "a", steps=3)
    file = tmp_path / "a" / RUN_FILE
    file.write_text(file.read_text()[:-30])
    assert main(["report", str(tmp_path / "a")]) == 1
    assert "--partial" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "a"), "--partial"]) == 0
    capsys.readouterr()
    blocked = tmp_path / "a" / RUN_FILE / "page.html"
    assert main(["report", str(tmp_path / "a"), "--partial", "--html", str(blocked)]) == 1
    assert "error:" in capsys.readouterr().err
