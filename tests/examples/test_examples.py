"""Every program of examples/ explains itself, runs in its short mode, and learns."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

# Of ln(128) = 4.85, which knows nothing.
LOSS = r"loss 4\.8\d+ -> (?:[23]\.|4\.[01])\d+"
ACCURACY = r"accuracy (\d+\.\d)%"
# program -> what its short mode prints; a number in it is an accuracy that guessing stays below.
PRINTS = {
    "accelerate_loop": ACCURACY,
    "advisor": r"NeuRMS: " + ACCURACY,
    "fabric_loop": ACCURACY,
    "finetune_convnet": r"accuracy on the new digits (\d+\.\d)%",
    "hf_trainer": r"mean loss 4\.\d+ over 20 steps",
    "keras_fit": ACCURACY + r"\ncontinued bit for bit",
    "keras_profiler": ACCURACY,
    "lightning_cli": ACCURACY,
    "lightning_mlp": ACCURACY,
    "llama": LOSS + r" with [\d,]+ bytes",
    "lora": r"loss [45]\.\d+ -> [1-3]\.\d+: [\d,]+ parameters trained",
    "mixed_precision": ACCURACY,
    "own_structure": r"0\.weight +Linear +feature_rms(?s:.*)" + ACCURACY,
    "plain_pytorch": r"epoch  2 .* " + ACCURACY,
    "switching_from_adamw": r"neurms +lr .* " + ACCURACY,
    "timm_optimizer": ACCURACY,
    "update_in_backward": r"NeuRMS in backward +\d\.\d+ +544 bytes",
}
# Several processes: in an interpreter of their own.
DISTRIBUTED = {
    "lightning_ddp": ACCURACY,
    "lightning_ddp --shard": ACCURACY,
}
# Run by tests/core/distributed/test_programs.py, on several numbers of processes.
OTHERWISE_RUN = ("pretraining", "torchrun")

# What a program needs beside the developer's tools.
NEEDS = {"lora": "peft", "timm_optimizer": "timm"}

QUICK = {
    "lightning_cli": [
        "fit",
        "--config=examples/lightning_cli.yaml",
        "--trainer.max_epochs=2",
        "--trainer.enable_progress_bar=false",
    ],
}

pytestmark = [
    # What an example's framework says at every run, on any machine.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    # LightningCLI 2.6 on jsonargparse 4.5x.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture
def run(repository: Path, tmp_path: Path, monkeypatch, capsys):
    """Run a program as __main__ in a scratch folder and return what it printed."""

    def ran(name: str, *options: str) -> str:
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        path = repository / "examples" / f"{name}.py"
        options = tuple(o.replace("examples/", f"{path.parent}/") for o in options)
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return ran


def test_every_program_is_tested(repository: Path) -> None:
    found = {path.stem for path in (repository / "examples").glob("*.py")}
    distributed = {line.split()[0] for line in DISTRIBUTED}
    assert found - set(OTHERWISE_RUN) == set(PRINTS) | distributed


@pytest.mark.parametrize("name", [*PRINTS, "lightning_ddp", *OTHERWISE_RUN])
def test_help(run, capsys, name: str) -> None:
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PRINTS)
def test_short_mode(run, name: str) -> None:
    printed = run(name, *QUICK.get(name, ["--quick"]))
    found = re.search(PRINTS[name], printed)
    assert found, printed
    # Ten classes, or five: twice what guessing gets.
    assert all(float(share) > 40 for share in found.groups()), printed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["neurms", "rmnp", "alice", "eigen_adam", "shared_basis"])
def test_every_keras_rule_continues_from_its_file(run, name: str) -> None:
    accuracy, continued = run("keras_fit", "--optimizer", name).splitlines()
    assert float(accuracy.removeprefix("accuracy ").removesuffix("%")) > 85
    assert continued == "continued bit for bit"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("llama", ["--optimizer", "alice"], LOSS),
        ("mixed_precision", ["--precision", "fp16"], ACCURACY),
        ("lightning_cli", ["--model.rule=racs", "--trainer.callbacks=null"], ACCURACY),
    ],
)
def test_other_settings(run, name: str, options: list[str], printed: str) -> None:
    assert re.search(printed, run(name, *QUICK.get(name, ["--quick"]), *options))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("line", DISTRIBUTED)
def test_several_processes(repository: Path, tmp_path: Path, line: str) -> None:
    name, *options = line.split()
    ended = subprocess.run(
        [sys.executable, str(repository / "examples" / f"{name}.py"), "--quick", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    found = re.search(DISTRIBUTED[line], ended.stdout)
    assert found, ended.stdout
    assert float(found[1]) > 40
