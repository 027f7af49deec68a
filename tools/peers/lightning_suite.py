"""Lightning's own optimizer, scheduler, finetuning and checkpoint tests, on RMNP and EigenAdam.

They are not installed with it: ``--checkout`` says where a checkout of its repository is, best of
the tag that is installed. They run twice, first unchanged and then with RMNP where they say
``torch.optim.SGD`` and EigenAdam where they say ``torch.optim.Adam``. What torch's own optimizers
do not pass here counts as left out by the suite.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.peers.outcome import Outcome, Refusal

__all__ = ["REFUSALS", "TESTS", "outcomes"]

RULE = "rmnp, eigen_adam"
TESTS = (
    "callbacks/test_finetuning_callback.py",
    "callbacks/test_gradient_accumulation_scheduler.py",
    "callbacks/test_lr_monitor.py",
    "callbacks/test_stochastic_weight_avg.py",
    "callbacks/test_weight_averaging.py",
    "checkpointing/test_checkpoint_callback_frequency.py",
    "checkpointing/test_model_checkpoint.py",
    "checkpointing/test_torch_saving.py",
    "checkpointing/test_trainer_checkpoint.py",
    "core/test_lightning_module.py",
    "core/test_lightning_optimizer.py",
    "core/test_saving.py",
    "loops/optimization",
    "loops/test_loop_state_dict.py",
    "loops/test_loops.py",
    "loops/test_training_loop.py",
    "models/test_fabric_integration.py",
    "models/test_hooks.py",
    "models/test_restore.py",
    "overrides",
    "plugins/precision",
    "test_cli.py",
    "trainer/connectors/test_checkpoint_connector.py",
    "trainer/logging_/test_train_loop_logging.py",
    "trainer/optimization",
    "trainer/test_config_validator.py",
    "tuner",
    "utilities/test_parameter_tying.py",
)
"""Files and folders below the repository's ``tests/tests_pytorch``."""

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "lists SGD's settings by name",
        tests=r".*test_finetuning_callback\.py::test_callbacks_restore",
        error=r"'rule': 'rmn",
    ),
    Refusal(
        "finds a class by its literal name on a command line, where torch's own is there as well",
        tests=r".*test_cli\.py::.*",
        error=r"SystemExit: 2|'NoneType' object is not subscriptable|== 'usage: any\.py",
    ),
    Refusal(
        "needs ten losses of a search for lr, and Eigen-Adam's first steps, which the paper does "
        "not correct for their start, are three times as long as Adam's: the search ends earlier",
        tests=r".*test_lr_finder\.py::test_call_to_trainer_method\[Adam\]",
        error="assert None is not None",
    ),
)


def outcomes(checkout: Path, tests: Sequence[str] = TESTS) -> Iterator[Outcome]:
    """Run the tests with torch's optimizers and with ours."""
    control = _results(checkout, tests, control=True)
    ours = _results(checkout, tests, control=False)
    for name, (result, _) in control.items():
        found, error = ours.get(name, ("failed", "was not run"))
        if result != "passed":
            yield Outcome(RULE, name, "skipped")
        elif found in ("passed", "skipped"):
            yield Outcome(RULE, name, "passed" if found == "passed" else "skipped")
        else:
            yield Outcome(RULE, name, "failed", error)


def _results(checkout: Path, tests: Sequence[str], *, control: bool) -> dict[str, tuple[str, str]]:
    """Return each test's result and error from a process of its own."""
    home = Path(__file__).parents[2]
    places = [f"tests_pytorch/{test}" for test in tests]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.jsonl"
        path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "NEURMS_PEERS_OUT": str(file)}
        if control:
            environment["NEURMS_PEERS_CONTROL"] = "1"
        options = ("-q", "-p", "tools.peers.lightning_plugin", "--timeout", "300")
        command = [sys.executable, "-m", "pytest", *options, *places]
        done = subprocess.run(
            command, cwd=checkout / "tests", env=environment, capture_output=True, text=True
        )
        # 1: some tests fail, which is for the caller to judge.
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}")
        lines = map(json.loads, file.read_text().splitlines())
        return {line["test"]: (line["result"], line["error"]) for line in lines}
