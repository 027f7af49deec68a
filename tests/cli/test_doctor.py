import json
from functools import partial

import torch

from neurms.cli import doctor, main
from neurms.cli.kernel_times import BACKENDS_TIMED, kernel_times


def verdicts():
    return {finding.subject: finding.verdict for finding in doctor.findings()}


def test_everything_needed_is_here(capsys) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch uses {torch.get_num_threads()}" in printed
    assert torch.__version__ in printed
    assert "Nothing is missing." in printed


def test_no_compiler_is_a_note(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = verdicts()
    assert found["C++ compiler"] == found["backend inductor"] == "note"
    assert "missing" not in found.values()


def test_old_torch_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    assert main(["doctor"]) == 1
    assert "Missing: torch" in capsys.readouterr().out


def test_absent_extra_is_a_note_with_its_cure(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "versions", lambda names: dict.fromkeys(names))
    found = {finding.subject: finding for finding in doctor.findings()}
    assert found["keras"].verdict == "note"
    assert 'pip install "neurms[keras]"' in found["keras"].detail


def test_denormals_are_left_as_they_are() -> None:
    """Half of the smallest normal number is a denormal; flushed, it would be zero."""
    list(doctor.findings())
    tiny = torch.tensor([torch.finfo(torch.float32).tiny])
    assert float(tiny / 2) > 0


def test_json_holds_findings_and_every_kernel_on_every_backend(capsys, monkeypatch) -> None:
    quick = partial(kernel_times, sizes=(8,), rounds=2)
    monkeypatch.setattr(doctor, "kernel_times", quick)
    assert main(["doctor", "--kernels", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"torch", "native kernels", "bfloat16 products", "oneDNN"} <= {
        f["subject"] for f in record["findings"]
    }
    pairs = {(row["kernel"], row["backend"]) for row in record["kernels"]}
    kernels = {kernel for kernel, _ in pairs}
    assert len(kernels) == 8
    assert pairs == {(kernel, backend) for kernel in kernels for backend in BACKENDS_TIMED}
    assert all(row["microseconds"] > 0 for row in record["kernels"])
