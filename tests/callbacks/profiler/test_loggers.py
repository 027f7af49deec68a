"""The profiler's numbers in other people's loggers, through Lightning, without a network.

Each logger's package is an extra of its own; without it the test is skipped.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from tests.callbacks.profiler.test_lightning import Module, fit, profiler

NAME = "neurms/net.2/rho"

# These packages' own deprecations, and files that they close when the program ends.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Points = list[tuple[int, float]]
Reader = Callable[[Logger], Points]


def csv_files(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Logger, Reader]:
    def read(logger: Any) -> Points:
        logger.save()
        with (Path(logger.log_dir) / "metrics.csv").open() as stream:
            rows = [row for row in csv.DictReader(stream) if row.get(NAME)]
        return [(int(row["step"]), float(row[NAME])) for row in rows]

    return CSVLogger(folder), read


def tensorboard(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Logger, Reader]:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    from lightning.pytorch.loggers import TensorBoardLogger

    def read(logger: Any) -> Points:
        logger.finalize("success")
        events = accumulators.EventAccumulator(logger.log_dir)
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(NAME)]

    return TensorBoardLogger(folder), read


def wandb(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Logger, Reader]:
    pytest.importorskip("wandb", exc_type=ImportError)
    from lightning.pytorch.loggers import WandbLogger

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        patch.setenv(name, str(folder))
    patch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=folder, mode="offline")
    handed: Points = []
    run = logger.experiment
    original = run.log

    def log(metrics: dict[str, Any], *positional: Any, **named: Any) -> None:
        # What an offline run holds of a curve no public function reads back.
        if NAME in metrics:
            handed.append((metrics["trainer/global_step"], metrics[NAME]))
        original(metrics, *positional, **named)

    patch.setattr(run, "log", log)

    def read(logger: Any) -> Points:
        assert run.summary[NAME] == pytest.approx(handed[-1][1])
        run.finish()
        assert list(folder.rglob("*.wandb"))
        return handed

    return logger, read


def mlflow(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Logger, Reader]:
    pytest.importorskip("mlflow", exc_type=ImportError)
    from lightning.pytorch.loggers import MLFlowLogger

    # Its newest releases want a database, of which the light package brings none.
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def read(logger: Any) -> Points:
        history = logger.experiment.get_metric_history(logger.run_id, NAME)
        return sorted((metric.step, metric.value) for metric in history)

    return MLFlowLogger("profile", tracking_uri=(folder / "mlruns").as_uri()), read


@pytest.mark.parametrize("made", [csv_files, tensorboard, wandb, mlflow])
def test_every_layer_s_numbers_reach_the_logger(
    made: Callable[[Path, pytest.MonkeyPatch], tuple[Logger, Reader]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logger, read = made(tmp_path, monkeypatch)
    watcher = profiler()
    fit(Module("neurms"), watcher, folder=tmp_path, logger=logger)
    expected = watcher.report().history("net.2", "rho")
    found = read(logger)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([v for _, v in expected], rel=1e-5)
