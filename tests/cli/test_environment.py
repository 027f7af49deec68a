import subprocess

import torch

from neurms.cli import environment as module
from neurms.cli.environment import environment, flush_denormals, versions


def test_versions_are_the_metadata_s() -> None:
    found = versions(("torch", "no-such-distribution"))
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["no-such-distribution"] is None


def test_record(repository) -> None:
    record = environment(denormals_flushed=True)
    assert record["threads"] == torch.get_num_threads()
    assert record["denormals_flushed"] is True
    assert record["cores"] >= 1
    assert str(repository) not in str(record)


def test_commit_is_that_of_the_checkout(monkeypatch, tmp_path) -> None:
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(module, "checkout", lambda: tmp_path)
    assert environment(denormals_flushed=False)["commit"] is None
    git("init", "-q")
    (tmp_path / "neurms").mkdir()
    (tmp_path / "neurms" / "x.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert environment(denormals_flushed=False)["commit"] == head
    (tmp_path / "neurms" / "x.py").write_text("a = 2\n")
    assert environment(denormals_flushed=False)["commit"] == f"{head}+changes"


def test_flushing_denormals() -> None:
    half = torch.tensor([torch.finfo(torch.float32).tiny]) / 2
    assert float(half) > 0
    try:
        if flush_denormals():
            assert float(torch.tensor([torch.finfo(torch.float32).tiny]) / 2) == 0
    finally:
        torch.set_flush_denormal(False)
