"""Rows, files and the way back from them."""

from __future__ import annotations

import copy
import csv
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from neurms.callbacks.profiler import Profiler
from neurms.report import ProfilerReport
from neurms.report.rows import law_share
from neurms.report.tables import ComparisonTable
from tests.callbacks.profiler import truth


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


def named(report: ProfilerReport, names: list[str]) -> ProfilerReport:
    """The same run with other names for its layers."""
    run = copy.deepcopy(report.run)
    new = dict(zip(run.header["layers"], names, strict=True))
    run.header["layers"] = {new[k]: v for k, v in run.header["layers"].items()}
    for sample in run.samples:
        sample["layers"] = {new[k]: v for k, v in sample["layers"].items()}
    return ProfilerReport(run)


LONG = [f"encoder.layers.{i}.attention.output_projection" for i in range(3)]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_terminal_breaks_a_word(report: ProfilerReport, width: int) -> None:
    shown = named(report, LONG)
    for table in (shown.table(), ComparisonTable(shown, shown)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for word in ("output_projection", "attention.", "overhead"):
            assert word in text
        assert "layers" in text


def test_a_report_says_what_it_is(report: ProfilerReport) -> None:
    assert repr(report).startswith("<Sequential with NeuRMS, 3 layers: ")
    assert report.recommendation() in repr(report)
