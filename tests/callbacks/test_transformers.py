"""The profiler in real Hugging Face Trainers, beside their own optimizer and ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from neurms.callbacks.transformers import PreconditionerProfiler, to_loggers
from neurms.integrations.transformers import trainer_optimizers
from neurms.report import ProfilerReport
from neurms.report.writer import PAGE
from tests.callbacks.profiler import truth

pytestmark = [
    # Trainer 5: its default for CPU loaders, and its own renamed arguments.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]


class Classifier(nn.Module):
    """A model in the form that the Trainer takes: it returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = truth.mlp()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(inputs), labels)}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"inputs": torch.randn(12, generator=generator), "labels": torch.tensor(i % 4)}
        for i in range(48)
    ]


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    chosen = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **(chosen | changed))


def profiler(**settings: Any) -> PreconditionerProfiler:
    common = {"every_n_steps": 1, "warmup_steps": 0, "print_table": False}
    return PreconditionerProfiler(**(common | settings))


def trained(
    folder: Path,
    *callbacks: TrainerCallback,
    name: str | None = "neurms",
    resume: Path | None = None,
    eval_dataset: Any = None,
    **changed: Any,
) -> Trainer:
    torch.manual_seed(3)
    model = Classifier()
    optimizers = trainer_optimizers(model.net, name, lr=0.02) if name else (None, None)
    trainer = Trainer(
        model,
        arguments(folder, **changed),
        train_dataset=rows(),
        eval_dataset=eval_dataset,
        optimizers=optimizers,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("name", ["neurms", "racs", None])
def test_training_is_bit_identical_and_every_optimizer_is_measured(
    name: str | None, tmp_path: Path
) -> None:
    watcher = profiler(every_n_steps=2, warmup_steps=1)
    watched, alone = trained(tmp_path, watcher, name=name), trained(tmp_path, name=name)
    for a, b in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)
    report = watcher.report()
    assert report.steps == [1, 3, 5]
    assert [row.layer for row in report] == ["net.0", "net.2", "net.4"]
    assert {row.rule for row in report[:2]} == {name or "AdamW"}
    for row in report:
        assert row.rows == 8
        assert row.rho is not None
        assert row.update_us > 0
        assert row.state_bytes > 0
    assert not any(m._forward_hooks for m in watched.model.net.modules()) or name == "neurms"


def test_statistics_equal_float64_truth(tmp_path: Path) -> None:
    watcher, seen = profiler(), []

    class Close(TrainerCallback):
        def on_train_begin(self, *positional: Any, model: Any, **named: Any) -> None:
            seen.append(truth.Dump(model.net[2]))

        def on_pre_optimizer_step(self, *positional: Any, **named: Any) -> None:
            seen[0].close()

    trained(tmp_path, watcher, Close(), name="adamw", max_steps=1, max_grad_norm=0.0)
    (window,) = seen[0].windows
    v, u = truth.moments(window)
    found = watcher.profiler.samples[0]["layers"]["net.2"]
    assert found["rho"] == pytest.approx(truth.rho(window["g"], v, u), abs=1e-5)
    assert found["factorization_error"] == pytest.approx(truth.error(window), rel=1e-4)


def test_micro_batches_are_one_step(tmp_path: Path) -> None:
    watcher = profiler()
    trained(tmp_path, watcher, max_steps=2, gradient_accumulation_steps=3)
    assert watcher.report().steps == [0, 1]
    assert watcher.report()[0].rows == 24


def test_means_reach_the_log_and_its_readers_and_all_numbers_a_function(tmp_path: Path) -> None:
    handed: list[dict[str, float]] = []
    read: list[dict[str, float]] = []

    class Reader(TrainerCallback):
        def on_log(self, *positional: Any, logs: Any = None, **named: Any) -> None:
            read.append(dict(logs))

    watcher = profiler(log=handed.append)
    history = trained(tmp_path, watcher, Reader()).state.log_history
    rho = [entry["neurms/rho"] for entry in history if "neurms/rho" in entry]
    assert len(rho) == 3
    assert rho == [entry["neurms/rho"] for entry in read if "neurms/rho" in entry]
    for value, sample in zip(rho, watcher.profiler.samples[1::2], strict=True):
        own = [layer["rho"] for layer in sample["layers"].values()]
        assert value == pytest.approx(sum(own) / len(own))
    assert len(handed) == 6
    assert handed[0]["neurms/net.2/rho"] == watcher.report().history("net.2", "rho")[0][1]


def test_the_trainer_s_own_log_can_take_all_numbers(tmp_path: Path) -> None:
    model = Classifier()
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows())
    trainer.add_callback(profiler(log=trainer.log))
    trainer.train()
    entries = [e for e in trainer.state.log_history if "neurms/net.0/rho" in e]
    assert [entry["step"] for entry in entries] == [1, 2]


def test_a_resumed_run_appends_and_another_is_numbered(tmp_path: Path) -> None:
    output = tmp_path / "profile"
    saving = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path, profiler(output=output), **saving)
    trained(tmp_path, profiler(output=output), resume=tmp_path / "checkpoint-4", max_steps=8)
    assert ProfilerReport.read(output).steps == list(range(8))
    assert "8 of 8 steps profiled" in (output / PAGE).read_text()
    trained(tmp_path, profiler(output=output))
    assert ProfilerReport.read(tmp_path / "profile-2").steps == list(range(6))
    trained(tmp_path, profiler(output=output, overwrite=True), max_steps=3)
    assert ProfilerReport.read(output).steps == [0, 1, 2]


def test_the_table_and_the_folder_are_printed_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    trained(tmp_path, profiler(print_table=True, output=tmp_path / "profile"))
    shown = capsys.readouterr().out
    assert "NeuRMS: layers" in shown
    assert f"neurms report {tmp_path / 'profile'}" in shown


def test_short_trainings_and_bad_settings_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"is empty: 2 steps were trained.*warmup_steps=10"):
        trained(tmp_path, profiler(warmup_steps=10), max_steps=2)
    with pytest.raises(ValueError, match="every_n_steps=0"):
        profiler(every_n_steps=0)
    with pytest.raises(RuntimeError, match=r"call trainer\.train"):
        profiler().report()


def test_the_page_has_the_losses_that_the_trainer_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile"
    trainer = trained(
        tmp_path,
        profiler(output=output),
        eval_dataset=rows()[:8],
        eval_strategy="steps",
        eval_steps=3,
    )
    logged = ProfilerReport.read(output).run.logged
    history = trainer.state.log_history
    assert logged.keys() == {"train loss", "eval_loss"}
    for ours, theirs in (("train loss", "loss"), ("eval_loss", "eval_loss")):
        expected = [(e["step"], e[theirs]) for e in history if theirs in e]
        assert [step for step, _ in logged[ours]] == [step for step, _ in expected]
        values = [value for _, value in expected]
        assert [value for _, value in logged[ours]] == pytest.approx(values, rel=1e-6)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("report:")]
    assert len(said) == 1
    assert str(output / PAGE) in said[0]


def test_loggers_get_all_numbers_and_the_console_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[dict[str, float]] = []

    class Logger(TrainerCallback):
        def on_log(self, *positional: Any, logs: Any = None, **named: Any) -> None:
            read.append(dict(logs))

    watcher = profiler()
    trainer = Trainer(
        Classifier(), arguments(tmp_path), train_dataset=rows(), callbacks=[watcher, Logger()]
    )
    watcher.log = to_loggers(trainer)
    trainer.train()
    full = [entry for entry in read if "neurms/net.0/rho" in entry]
    assert len(full) == 6
    assert full[0]["neurms/net.2/rho"] == watcher.report().history("net.2", "rho")[0][1]
    entries = trainer.state.log_history
    own = {name for entry in entries for name in entry if name.startswith("neurms/")}
    assert own == {"neurms/rho", "neurms/overhead"}
    assert "neurms/net.0" not in capsys.readouterr().out


def tiny_language_model() -> Any:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def sentences() -> list[dict[str, Tensor]]:
    tokens = torch.randint(40, (36, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["F", "P"])
def test_a_language_model_accumulated_and_resumed(variant: str, tmp_path: Path) -> None:
    output = tmp_path / "profile"
    changed = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def train(steps: int, resume: str | None = None) -> PreconditionerProfiler:
        model, watcher = tiny_language_model(), profiler(output=output)
        settings = {"variant": variant, "lr": 1e-3, "momentum": 0.0}
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=steps, **changed),
            train_dataset=sentences(),
            optimizers=trainer_optimizers(model, "neurms", **settings),
            callbacks=[watcher],
        )
        trainer.train(resume_from_checkpoint=resume)
        return watcher

    train(4)
    watcher = train(6, str(tmp_path / "checkpoint-4"))
    report = ProfilerReport.read(output)
    assert report.steps == watcher.report().steps == list(range(6))
    # Two sentences of eight tokens, three times.
    projection = next(row for row in report if row.layer.endswith("0.self_attn.q_proj"))
    assert projection.rows == 48
    assert projection.clipped_units is not None
    assert (projection.predicted_overhead is None) == (variant == "P")
    assert [step for step, _ in report.run.logged["train loss"]] == [2, 4, 6]


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_a_missing_package_names_the_extra(missing: str) -> None:
    source = f"""
import sys
sys.modules[{missing!r}] = None
try:
    from neurms.callbacks.transformers import PreconditionerProfiler
except ImportError as error:
    assert 'pip install "neurms[transformers]"' in str(error), error
else:
    raise SystemExit("imported")
"""
    command = [sys.executable, "-c", source]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
