"""The profiler in a real Trainer: loggers, progress bar, precision, callbacks beside it."""

from __future__ import annotations

import csv
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import neurms
from neurms.callbacks import NeuRMSCallback, PreconditionerProfiler
from neurms.core.ground import spans
from neurms.report import ProfilerReport, read_run
from neurms.report.writer import PAGE
from tests.callbacks.profiler import truth


class Module(LightningModule):
    def __init__(self, name: str = "sgd", fail_at: int | None = None) -> None:
        super().__init__()
        self.net = truth.mlp()
        self.optimizer_name = name
        self.fail_at = fail_at

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == self.fail_at:
            raise RuntimeError("out of luck")
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer_name == "neurms":
            return neurms.NeuRMS(self.net, variant="F", momentum=0.9)
        return neurms.create(self.optimizer_name, self.net.parameters(), lr=0.05)


def loader(batch: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 12, generator=generator)
    targets = torch.randint(4, (48,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch)


def fit(
    module: Module,
    *callbacks: Any,
    folder: Path,
    logger: Any = False,
    epochs: int = 1,
    resume: Path | None = None,
    **settings: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=logger,
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return trainer


def profiler(**settings: Any) -> PreconditionerProfiler:
    common = {"every_n_steps": 2, "warmup_steps": 1, "print_table": False}
    return PreconditionerProfiler(**(common | settings))


def test_numbers_reach_the_csv_logger_and_the_progress_bar(tmp_path: Path) -> None:
    watcher = profiler()
    logger = CSVLogger(tmp_path)
    trainer = fit(Module("neurms"), watcher, folder=tmp_path, logger=logger)
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    logged = [float(row["neurms/net.2/rho"]) for row in rows if row.get("neurms/net.2/rho")]
    assert logged == pytest.approx([r for _, r in watcher.report().history("net.2", "rho")])
    steps = [int(row["step"]) for row in rows if row.get("neurms/net.2/rho")]
    assert len(steps) == 3
    assert watcher.report().steps == [1, 3, 5]
    for what in ("overhead", "reduce_us", "r_avg", "factorization_error", "clipped_units"):
        assert f"neurms/net.0/{what}" in rows[0]
    assert "neurms/rho" in trainer.progress_bar_metrics
    assert 0 < trainer.progress_bar_metrics["neurms/overhead"] < 1


@pytest.mark.parametrize("name", ["neurms", "adamw", "racs"])
def test_training_is_bit_identical_with_the_profiler(name: str, tmp_path: Path) -> None:
    modules = [Module(name), Module(name)]
    fit(modules[0], profiler(every_n_steps=1), folder=tmp_path)
    fit(modules[1], folder=tmp_path)
    for watched, alone in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(watched, alone)


@pytest.mark.parametrize("first", [True, False])
def test_beside_the_callback_the_gradient_is_seen_unscaled(first: bool, tmp_path: Path) -> None:
    watcher, beside = profiler(every_n_steps=1, warmup_steps=0), NeuRMSCallback(variant="F")
    callbacks = [watcher, beside] if first else [beside, watcher]
    module = Module("sgd")
    dump = truth.Dump(module.net[2])
    seen: list[None] = []

    class Close(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            dump.close()
            seen.append(None)

    fit(module, *callbacks, Close(), folder=tmp_path)
    v, u = truth.averaged(dump.windows, 0.99)
    found = watcher.report().history("net.2", "rho")[-1][1]
    assert found == pytest.approx(truth.rho(dump.windows[-1]["g"], v, u), abs=1e-5)
    assert watcher.report()[1].rule == "neurms + SGD"
    assert watcher.report()[1].scale_us > 0


def test_micro_batches_are_one_step(tmp_path: Path) -> None:
    watcher = profiler(every_n_steps=1, warmup_steps=0)
    fit(Module("neurms"), watcher, folder=tmp_path, accumulate_grad_batches=3)
    assert watcher.report().steps == [0, 1]
    assert watcher.report()[0].rows == 24


def test_bfloat16_autocast_and_clipping(tmp_path: Path) -> None:
    watcher = profiler(every_n_steps=1)
    fit(Module("neurms"), watcher, folder=tmp_path, precision="bf16-mixed", gradient_clip_val=0.1)
    assert all(math.isfinite(row.rho or math.nan) for row in watcher.report())


def test_the_run_file_is_written_and_holds_the_steps(tmp_path: Path) -> None:
    watcher = profiler(output=tmp_path / "run")
    fit(Module("adamw"), watcher, folder=tmp_path)
    run = read_run(tmp_path / "run")
    assert run.finished
    assert run.header["optimizer"] == "AdamW"
    assert [sample["step"] for sample in run.samples] == [1, 3, 5]


def test_a_failing_training_keeps_its_profile_and_no_hooks(tmp_path: Path) -> None:
    watcher = profiler(output=tmp_path / "run", every_n_steps=1)
    module = Module("adamw", fail_at=4)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, watcher, folder=tmp_path)
    assert len(read_run(tmp_path / "run").samples) == 3
    assert watcher.report().steps == [1, 2, 3]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.net.modules())
    assert spans._observer is None


def test_a_second_fit_counts_on_and_reports_itself(tmp_path: Path) -> None:
    watcher, module = profiler(every_n_steps=1, warmup_steps=0), Module("adamw")
    fit(module, watcher, folder=tmp_path)
    fit(module, watcher, folder=tmp_path)
    assert watcher.report().steps == list(range(6))


def test_the_table_is_printed_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fit(Module("neurms"), profiler(print_table=True), folder=tmp_path)
    assert "NeuRMS: layers" in capsys.readouterr().out


def test_bad_names_stop_before_training(tmp_path: Path) -> None:
    module = Module()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match="matches no layer"):
        fit(module, profiler(layers=["encoder.*"]), folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_barebones_trainers_are_profiled_without_logs(tmp_path: Path) -> None:
    watcher = profiler(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(barebones=True, max_epochs=1, callbacks=[watcher], accelerator="cpu")
        trainer.fit(Module("adamw"), loader())
    assert len(watcher.report().steps) == 5


def test_no_report_before_a_fit() -> None:
    with pytest.raises(RuntimeError, match="has seen no training yet"):
        profiler().report()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_fit_appends_and_another_is_numbered(tmp_path: Path) -> None:
    output, checkpoint = tmp_path / "run", tmp_path / "half.ckpt"
    settings = {"every_n_steps": 1, "warmup_steps": 0, "output": output}

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(checkpoint)

    module = Module("neurms")
    fit(module, profiler(**settings), Save(), folder=tmp_path)
    watcher = profiler(**settings)
    fit(Module("neurms"), watcher, folder=tmp_path, resume=checkpoint, epochs=2)
    assert ProfilerReport.read(output).steps == watcher.report().steps == list(range(12))
    assert (output / PAGE).read_text().count("12 of 12 steps profiled") == 1
    fit(Module("neurms"), profiler(**settings), folder=tmp_path)
    assert ProfilerReport.read(tmp_path / "run-2").steps == list(range(6))
    assert ProfilerReport.read(output).steps == list(range(12))
    fit(Module("neurms"), profiler(**settings, overwrite=True), folder=tmp_path)
    assert ProfilerReport.read(output).steps == list(range(6))


def test_a_fit_shorter_than_the_warmup_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"is empty: 6 steps were trained.*warmup_steps=10"):
        fit(Module("adamw"), profiler(warmup_steps=10), folder=tmp_path)


def test_settings_are_checked_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        profiler(warmup_steps=-1)


# -------------------------------------------------------------------- curves and the page


class Logging(Module):
    """Logs an accuracy of its own for each epoch, and its loss in every batch."""

    def __init__(self) -> None:
        super().__init__("adamw")
        self.losses: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.losses.append(float(loss.detach()))
        self.log("train_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        self.log("train_size", float(len(batch[0])), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.validated.append(float(loss))
        self.log("val_loss", loss)


def test_curves_are_the_losses_of_batches_and_the_metrics_of_epochs(tmp_path: Path) -> None:
    module, watcher = Logging(), profiler(output=tmp_path / "run")
    fit(module, watcher, folder=tmp_path, epochs=2)
    for report in (watcher.report(), ProfilerReport.read(tmp_path / "run")):
        logged = report.run.logged
        assert [step for step, _ in logged["train loss"]] == list(range(12))
        assert [v for _, v in logged["train loss"]] == pytest.approx(module.losses, rel=1e-6)
        # One batch was a sanity check.
        means = [sum(module.validated[a : a + 6]) / 6 for a in (1, 7)]
        assert [step for step, _ in logged["val_loss"]] == [6, 12]
        assert [value for _, value in logged["val_loss"]] == pytest.approx(means, rel=1e-6)
        assert logged["train_size"] == [(6, 8.0), (12, 8.0)]
        assert not any(name.startswith("neurms/") for name in logged)


def test_the_loss_of_a_step_is_the_mean_of_its_micro_batches(tmp_path: Path) -> None:
    module, watcher = Logging(), profiler()
    fit(module, watcher, folder=tmp_path, accumulate_grad_batches=3)
    found = watcher.report().run.logged["train loss"]
    assert [step for step, _ in found] == [0, 0, 0, 1, 1, 1]
    assert [value for _, value in found] == pytest.approx(module.losses, rel=1e-6)


def test_validation_within_an_epoch_and_afterwards(tmp_path: Path) -> None:
    module, watcher = Logging(), profiler(output=tmp_path / "run")
    trainer = fit(module, watcher, folder=tmp_path, val_check_interval=3)
    assert [step for step, _ in watcher.report().run.logged["val_loss"]] == [3, 6]
    before = (tmp_path / "run" / PAGE).read_text()
    trainer.validate(module, loader(), verbose=False)
    assert len(watcher.report().run.logged["val_loss"]) == 2
    assert (tmp_path / "run" / PAGE).read_text() == before


def test_the_page_is_written_and_one_line_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Module("adamw"), profiler(output=tmp_path / "run"), folder=tmp_path)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("report:")]
    assert len(said) == 1
    assert str(tmp_path / "run" / PAGE) in said[0]
    assert "Loss" in (tmp_path / "run" / PAGE).read_text()


def test_a_missing_rich_costs_the_table_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "80")
    watcher = profiler(output=tmp_path / "run", print_table=True, every_n_steps=1)
    fit(Module("adamw"), watcher, folder=tmp_path)
    shown = capsys.readouterr().out
    assert 'pip install "neurms[report]"' in shown
    assert watcher.report().recommendation() in " ".join(shown.split())
    assert max(map(len, shown.splitlines()[1:-1])) <= 80
    assert (tmp_path / "run" / PAGE).is_file()


def test_a_missing_psutil_costs_nothing_on_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    watcher = profiler()
    fit(Module("adamw"), watcher, folder=tmp_path)
    if sys.platform == "linux":
        assert (watcher.report().rss_bytes or 0) > 10**7


def test_the_progress_bar_gets_two_values_and_loggers_the_rest(tmp_path: Path) -> None:
    callbacks = [profiler(), NeuRMSCallback(variant="F")]
    logger = CSVLogger(tmp_path)
    trainer = fit(Module("sgd"), *callbacks, folder=tmp_path, logger=logger)
    own = {name for name in trainer.progress_bar_metrics if name.startswith("neurms/")}
    assert own == {"neurms/rho", "neurms/overhead"}
    assert len([k for k in logger.experiment.metrics_keys if k.startswith("neurms/")]) > 20


def test_only_the_first_rank_writes_and_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda trainer: False))
    watcher = profiler(output=tmp_path / "run", print_table=True)
    fit(Module("adamw"), watcher, folder=tmp_path)
    assert watcher.report().steps == [1, 3, 5]
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""
